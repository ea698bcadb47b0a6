"""How often a call waits for its device: no more than a native model, and not more for more items, tokens or modalities."""

import native_processors
import pytest
import tiny
import torch
from helpers import compose_tiny, needs_5_24
from transformers import StaticCache
from waits import waits_of

from cornstarch_hf import from_native
from cornstarch_hf.language_model import label_loss

IMAGE_TYPES = ["llava", "llava_next", "janus", "aya_vision", "deepseek_vl"]
# Before 5.24 these check their placeholders without waiting, or not at all.
IMAGE_TYPES += [pytest.param(name, marks=needs_5_24) for name in ("vipllava", "idefics2", "idefics3")]
GREEDY = {"do_sample": False, "min_new_tokens": 1}


def inputs_of(processor, counts, words=4):
    """One row of so many items of each modality, by name, and some words behind them."""
    text = "b" + "".join(processor.tokens[name] * count for name, count in counts.items()) + " a" * words
    media = {name: [processor.items[name](i) for i in range(count)] for name, count in counts.items() if count}
    if media.get("audio"):
        media["sampling_rate"] = 16_000
    return dict(processor(text=[text], return_tensors="pt", **media))


def forward_waits(model, inputs):
    """Waits of a forward pass in evaluation mode; the first one, in which torch and transformers look things up, is not counted."""
    model.eval()
    with torch.no_grad():
        model(**inputs)
        return waits_of(lambda: model(**inputs))


def step_waits(model, inputs, labelled=3):
    """Waits of a training step as Trainer makes it: with labels, and with their number in a tensor that is there already.

    The first one is not counted, in which layers that are not needed are looked for.
    """
    model.train()
    labels = inputs["input_ids"].clone()
    labels[:, :-labelled] = -100
    number = torch.tensor(labelled)
    given = inputs | {"labels": labels, "num_items_in_batch": number}
    model(**given)
    return waits_of(lambda: model(**given).loss.backward())


def same(found):
    """Whether all counts of waits are one; the texts, which pytest then shows, say where more come from."""
    return len({len(texts) for texts in found}) == 1


def composed(*encoders, at_labels=True):
    model, processor = compose_tiny(list(encoders), tiny.llama(max_position_embeddings=4096))
    model.config.loss_at_labels = at_labels
    return model, processor


# ---- against native models


@pytest.mark.parametrize("model_type", IMAGE_TYPES)
def test_a_forward_pass_waits_no_more_than_a_native_one_and_a_step_twice_more_at_most(model_type):
    if model_type not in native_processors.PROCESSORS:
        pytest.skip(f"the processor of {model_type} needs torchvision")
    pair = native_processors.pair(model_type)
    native, (model, processor) = pair[0], from_native(pair)
    inputs = dict(processor(text=[f"a {processor.tokens['vision']} b c"], images=[tiny.image(0)], return_tensors="pt"))
    assert len(forward_waits(model, inputs)) <= len(forward_waits(native, inputs))
    allowed = len(step_waits(native, inputs))
    for model.config.loss_at_labels in (False, True):
        assert len(step_waits(model, inputs)) <= allowed + 1 + model.config.loss_at_labels


def test_a_generated_token_waits_as_often_as_a_native_one():
    pair = native_processors.pair("llava")
    native, (model, processor) = pair[0], from_native(pair)
    inputs = dict(processor(text=[f"a {processor.tokens['vision']} b"], images=[tiny.image(0)], return_tensors="pt"))
    counts = {}
    for name, each in (("native", native), ("ours", model)):
        each.generation_config.eos_token_id = None
        each.generate(**inputs, max_new_tokens=1, **GREEDY)
        runs = [waits_of(lambda n=n, each=each: each.generate(**inputs, max_new_tokens=n, **GREEDY)) for n in (2, 6)]
        counts[name] = len(runs[1]) - len(runs[0])
    assert counts == {"native": 4, "ours": 4}, "one for each token: whether all rows have ended"


@needs_5_24
@torch.no_grad()
def test_a_token_with_a_static_cache_does_not_wait_for_the_length_of_it():
    pair = native_processors.pair("llava")
    native, (model, processor) = pair[0], from_native(pair)
    inputs = dict(processor(text=[f"a {processor.tokens['vision']} b"], images=[tiny.image(0)], return_tensors="pt"))
    found = []
    for each in (native, model):
        cache = StaticCache(config=each.config.get_text_config(), max_cache_len=64)
        each(**inputs, cache=cache)
        given = {"input_ids": torch.tensor([[5]]), "cache": cache}
        each(**given)
        found.append(len(waits_of(lambda each=each, given=given: each(**given))))
    assert found[1] <= found[0]


# ---- growth


# Grids say how many patches an item of Qwen2-VL has; they and its lengths lie on the CPU by then, where reading does not wait.
@pytest.mark.parametrize("encoder", [key for key in tiny.ENCODERS if key != "qwen2_vl"])
def test_more_items_wait_no_more(encoder):
    model, processor = composed(encoder)
    rows = [inputs_of(processor, {tiny.ENCODERS[encoder][0]: count}) for count in (1, 4, 16)]
    assert same([forward_waits(model, row) for row in rows])
    assert same([step_waits(model, row) for row in rows])


@pytest.mark.parametrize("at_labels", [False, True])
def test_longer_texts_wait_no_more(at_labels):
    model, processor = composed("clip", at_labels=at_labels)
    rows = [inputs_of(processor, {"vision": 2}, words) for words in (3, 30, 300)]
    assert same([forward_waits(model, row) for row in rows])
    assert same([step_waits(model, row) for row in rows])


def test_more_rows_wait_no_more():
    model, processor = composed("clip")
    row = inputs_of(processor, {"vision": 2})
    rows = [{key: value.repeat(count, *[1] * (value.ndim - 1)) for key, value in row.items()} for count in (1, 3, 8)]
    assert same([forward_waits(model, row) for row in rows])
    assert same([step_waits(model, row) for row in rows])


def test_many_labels_wait_no_more(monkeypatch):
    model, processor = composed("clip")
    inputs = inputs_of(processor, {"vision": 1}, words=60)
    whole = [step_waits(model, inputs, labelled) for labelled in (2, 50)]
    monkeypatch.setattr(label_loss, "LOGITS_AT_ONCE", 20 * tiny.VOCABULARY)  # the head runs in parts
    assert same([*whole, *(step_waits(model, inputs, labelled) for labelled in (22, 50))])


@pytest.mark.parametrize("encoders", [("clip", "whisper"), ("clip", "wav2vec2", "esm")])
def test_several_modalities_wait_no_more_for_more_items(encoders):
    model, processor = composed(*encoders)
    names = [tiny.ENCODERS[key][0] for key in encoders]
    counts = [dict.fromkeys(names, 1), {name: i + 2 for i, name in enumerate(names)}, dict.fromkeys(names, 8)]
    rows = [inputs_of(processor, each) for each in counts]
    assert same([forward_waits(model, row) for row in rows])
    assert same([step_waits(model, row) for row in rows])


def test_a_modality_more_costs_its_encoder_and_one_check():
    """Counts of all modalities are read together; what each has is the check that features fit their places."""
    model, processor = composed("clip", "whisper")
    one, both = (inputs_of(processor, each) for each in ({"vision": 1}, {"vision": 1, "audio": 1}))
    assert len(forward_waits(model, both)) == len(forward_waits(model, one)) + 1


@pytest.mark.parametrize("items", [0, 1, 4])
def test_generated_tokens_wait_no_more_for_more_items(items):
    model, processor = composed("clip")
    model.generation_config.eos_token_id = None
    inputs = inputs_of(processor, {"vision": items})
    runs = [waits_of(lambda n=n: model.generate(**inputs, max_new_tokens=n, **GREEDY)) for n in (2, 10)]
    assert len(runs[1]) - len(runs[0]) == 8


# ---- the counting itself

NUMBERS = torch.arange(6.0)
MASK = NUMBERS > 2
WAITS = {
    "item": lambda: NUMBERS[0].item(), "bool": lambda: bool(MASK.any()), "tolist": lambda: NUMBERS.tolist(),
    "nonzero": lambda: MASK.nonzero(), "mask": lambda: NUMBERS[MASK], "select": lambda: NUMBERS.masked_select(MASK),
    "put": lambda: NUMBERS.clone().__setitem__(MASK, torch.ones(3)), "numbers": lambda: torch.tensor([1, 2]),
    "cpu": lambda: NUMBERS.cpu(), "to": lambda: NUMBERS.to("cpu"), "numpy": lambda: NUMBERS.numpy(),
    "equal": lambda: torch.equal(NUMBERS, NUMBERS), "unique": lambda: NUMBERS.unique(), "where": lambda: torch.where(MASK),
    "repeat": lambda: NUMBERS.repeat_interleave(torch.full((6,), 2)),
}  # fmt: skip
FREE = {
    "fill": lambda: NUMBERS.masked_fill(MASK, 0), "put": lambda: NUMBERS.clone().__setitem__(MASK, 0.0),
    "empty": lambda: torch.tensor([]), "scatter": lambda: NUMBERS.masked_scatter(MASK, NUMBERS), "to": lambda: NUMBERS.to(torch.float64),
    "index": lambda: NUMBERS[torch.zeros(2, dtype=torch.long)], "repeat": lambda: NUMBERS.repeat_interleave(2),
    "split": lambda: NUMBERS.split([2, 4]), "sized": lambda: NUMBERS.repeat_interleave(torch.full((6,), 2), output_size=12),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted(name):
    assert len(waits_of(WAITS[name])) == 1


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name):
    assert waits_of(FREE[name]) == []


def test_the_line_is_said():
    model, processor = composed("clip")
    assert any("merging.py" in text for text in forward_waits(model, inputs_of(processor, {"vision": 1})))
