"""torch.compile on composed models: whole graphs for calls, training at labels and decoding, and how many of them."""

import copy

import pytest
import torch
from helpers import compose_tiny, needs_5_23, uneven_inputs
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

LENGTHS, IMAGES = (12, 14, 21, 37), (1, 2, 3, 5)
FEATURES = 5  # of an image
# A size that changes makes one more graph, which then holds for all sizes of it; one image is a size of its own.
GRAPHS = 5


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    made, processor = compose_tiny(["clip"])
    made.placeholder = processor.placeholder_ids["vision"]
    return made


def batch(model, length, images, labels=False):
    """Two rows with as many words and images spread over them."""
    generator = torch.Generator().manual_seed(100 * length + images)
    ids = torch.randint(3, 60, (2, length + FEATURES * images), generator=generator)
    for image in range(images):
        start = 1 + FEATURES * (image // 2)
        ids[image % 2, start : start + FEATURES] = model.placeholder
    size = model.config.vision_config.image_size
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found |= {"pixel_values": torch.randn(images, 3, size, size, generator=generator)} if images else {}
    if labels:
        found["labels"] = ids.masked_fill(ids == model.placeholder, -100)
        found["labels"][:, : -3 - length // 8] = -100
    return found


MODES = {"forward": (False, False), "training": (True, False), "training at labels": (True, True)}
# The last one is in the fast suite: compiling takes long.
SLOW_BUT_ONE = [pytest.param(m, marks=[] if m == "training at labels" else pytest.mark.slow) for m in MODES]


@pytest.mark.parametrize("mode", SLOW_BUT_ONE)
def test_one_graph_for_every_size(model, mode):
    trains, model.config.loss_at_labels = MODES[mode]
    model.train(trains)
    counter = CompileCounter()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    for length in LENGTHS:
        for images in IMAGES:
            given = batch(model, length, images, labels=trains) | {"use_cache": False}
            expected, found = model(**given), compiled(**given)
            for key in expected.keys() & {"loss", "logits"}:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
            if trains:
                model.zero_grad()
                compiled.zero_grad()
                expected.loss.backward()
                found.loss.backward()
                for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
                    assert (one.grad is None) == (other.grad is None)
                    if one.grad is not None:
                        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_text_alone_is_one_graph_more(model, mode):
    trains, model.config.loss_at_labels = MODES[mode]
    counter = CompileCounter()
    compiled = torch.compile(model.train(trains), fullgraph=True, backend=counter)
    for length in LENGTHS:
        for images in (2, 0):
            compiled(**batch(model, length, images, labels=trains), use_cache=False)
    assert counter.frame_count <= 4


def test_rows_without_a_label_have_the_loss_of_none(model):
    model.config.loss_at_labels = True
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    given = batch(model, 12, 1, labels=True)
    given["labels"] = torch.full_like(given["labels"], -100)
    assert compiled(**given, use_cache=False).loss.isnan()
    counted = compiled(**given, use_cache=False, num_items_in_batch=torch.tensor(7))
    assert counted.loss == 0


@needs_5_23
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph(model):
    counter = CompileCounter()
    given = batch(model, 12, 2)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    whole = model(**given, use_cache=True)
    model(**given, cache=cache)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens = torch.tensor([[7], [9]])
    for step in range(3):
        mask = torch.ones(2, given["input_ids"].shape[1] + step + 1, dtype=torch.long)
        whole = model(input_ids=tokens, attention_mask=mask, cache=whole.cache)
        found = compiled(input_ids=tokens, attention_mask=mask, cache=cache)
        torch.testing.assert_close(found.logits, whole.logits, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("encoders", [["siglip"], ["dinov2"], ["whisper"], ["clip", "whisper"]], ids=" ".join)
@pytest.mark.parametrize("mode", SLOW_BUT_ONE)
def test_other_encoders(encoders, mode):
    trains, at_labels = MODES[mode]
    made, processor = compose_tiny(encoders)
    made.config.loss_at_labels = at_labels
    given = uneven_inputs(processor)
    if trains:
        ids = given["input_ids"]
        labels = ids.masked_fill(given["attention_mask"] == 0, -100)
        for token in processor.placeholder_ids.values():
            labels = labels.masked_fill(ids == token, -100)
        given["labels"] = labels
    compiled = torch.compile(copy.deepcopy(made.train(trains)), fullgraph=True, backend="eager")
    expected, found = made(**given, use_cache=False), compiled(**given, use_cache=False)
    for key in expected.keys() & {"loss", "logits"}:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_by_inductor(model):
    """Code is generated once: a step of training at labels, and a second one of another size."""
    model.config.loss_at_labels = True
    compiled = torch.compile(copy.deepcopy(model.train()), fullgraph=True)
    for length, images in ((12, 2), (14, 3)):
        given = batch(model, length, images, labels=True) | {"use_cache": False}
        model.zero_grad()
        compiled.zero_grad()
        expected, found = model(**given), compiled(**given)
        expected.loss.backward()
        found.loss.backward()
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)
