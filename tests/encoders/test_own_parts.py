"""What a processor keeps of live encoders: small, without weights, fit to travel; with a clear error where it is not."""

import copy
import functools
import gc
import pickle
import weakref

import datasets
import pytest
import tiny
import torch
import user_parts
from datasets.fingerprint import Hasher
from helpers import compose_tiny
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalCollator,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    register_callback,
)
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.parts.registries import CALLBACKS, PROJECTORS

datasets.disable_progress_bars()
PLACES = {"images": "clip", "audio": "wav2vec2", "grids": "qwen2_vl", "proteins": "esm"}


@pytest.fixture
def registered(monkeypatch):
    for registry in (CALLBACKS, PROJECTORS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def halve(inputs, output):
    output.last_hidden_state = output[0][:, ::2]
    return output


class Every(nn.Module):
    """A callback with weights."""

    def __init__(self, step):
        super().__init__()
        self.step, self.weight = step, nn.Parameter(torch.ones(16, 65_536))
        self.register_buffer("order", torch.arange(100), persistent=False)

    def forward(self, inputs, output):
        assert self.order[99] == 99
        output.last_hidden_state = output[0][:, :: self.step] + self.weight[:, 0]
        return output


class Wide(nn.Module):
    """A projection with large weights that is not registered, and leaves half."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 20_000), nn.Linear(20_000, out_features)

    def forward(self, x):
        return self.last(self.first(x[:, ::2]))


def processor_of(key="clip", projector=None, **callbacks):
    encoder = ModalEncoderModule(tiny.ENCODERS[key][1](), projector, **callbacks)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    return model, MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS[key][2]()}, model=model)


def ids(processor, size=(12, 10)):
    return processor(text="a <image>", images=tiny.image(size=size))["input_ids"]


def test_no_encoder_is_kept_alive():
    model, processor = compose_tiny(["clip", "whisper"])
    encoders = [weakref.ref(encoder) for encoder in model.encoders.values()]
    del model
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None] and not processor.counter.own


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"postprocess_projector_callback": halve}, 3),
        ({"postprocess_module_callback": Every(2)}, 3),
        ({"projector": MultimodalProjector(MultimodalProjectorConfig(), Wide(16, 32))}, 3),
        ({"postprocess_projector_callback": lambda inputs, output: halve(inputs, output)}, 3),
    ],
)
def test_unregistered_parts_count_without_their_weights(options, expected):
    model, processor = processor_of(**options)
    item = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    with torch.no_grad():
        assert len(model.vision_encoder(**item).pooler_output[0]) == expected
    del model
    assert processor.counter.count("vision", item) == expected
    other = copy.deepcopy(processor)
    assert other.counter.count("vision", item) == expected and ids(other) == ids(processor)
    own = processor.counter.own["vision"]
    assert all(p.is_meta for part in (own.projector, *own.callbacks.values()) if isinstance(part, nn.Module) for p in part.parameters())  # fmt: skip
    if "lambda" not in repr(options):
        pickled = pickle.dumps(MultimodalCollator(processor))
        assert len(pickled) < 100_000 and pickle.loads(pickled).processor.counter.count("vision", item) == expected


def test_what_cannot_be_pickled_says_so_and_copies_and_fingerprints_can():
    _, processor = processor_of(postprocess_module_callback=lambda inputs, output: halve(inputs, output))
    with pytest.raises(TypeError, match=r"vision.postprocess_module_callback cannot be pickled .*register_callback"):
        pickle.dumps(MultimodalCollator(processor))
    assert Hasher.hash(processor) == Hasher.hash(processor)
    assert ids(copy.deepcopy(processor)) == ids(processor)
    rows = datasets.Dataset.from_dict({"i": [0, 1, 2, 3]}).map(
        lambda row: {"n": len(ids(processor)[0])}, num_proc=2, load_from_cache_file=False
    )
    assert rows["n"] == [len(ids(processor)[0])] * 4


def test_registered_parts_stand_in_the_configuration_and_later_ones_when_it_is_saved(registered, tmp_path):
    register_callback("every_other", halve)
    model, processor = processor_of(postprocess_module_callback=halve)
    assert not processor.counter.own
    assert processor.config.modality("vision")["callbacks"]["postprocess_module_callback"]["name"] == "every_other"
    assert not model.config.modality("vision")["callbacks"], "the model's own configuration is left alone"

    def thirds(inputs, output, step=3):
        output.last_hidden_state = output[0][:, ::step]
        return output

    _, processor = processor_of(postprocess_module_callback=functools.partial(thirds, step=2))
    with pytest.raises(ValueError, match="vision.postprocess_module_callback cannot be saved"):
        processor.save_pretrained(tmp_path)
    register_callback("thirds", thirds)
    processor.save_pretrained(tmp_path)
    assert ids(AutoProcessor.from_pretrained(tmp_path)) == ids(processor)


def test_wrapped_projections_of_registered_and_torch_classes_need_no_copy(registered):
    for projection in (nn.Sequential(nn.Linear(16, 32), nn.GELU()), nn.Linear(16, 32)):
        _, processor = processor_of(projector=MultimodalProjector(MultimodalProjectorConfig(), projection))
        assert not processor.counter.own and len(ids(processor)[0]) == 7
    PROJECTORS.add("halving", user_parts.Halving)
    given = MultimodalProjector(MultimodalProjectorConfig(), user_parts.Halving(16, 32))
    _, processor = processor_of(projector=given)
    assert (
        not processor.counter.own and processor.counter.count("vision", {"pixel_values": torch.zeros(1, 3, 8, 8)}) == 2
    )


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_a_processor_is_the_same_before_and_after_use(key, tmp_path):
    (name, *_, item), (_, processor) = tiny.ENCODERS[key], compose_tiny([key])
    del processor.items
    processor.save_pretrained(tmp_path)
    loaded, again = (AutoProcessor.from_pretrained(tmp_path) for _ in range(2))
    for one in (processor, loaded):
        before = Hasher.hash(one)
        for i in range(3):
            one(
                text=f"a {one.tokens[name]}",
                **{name: item(i)},
                **({"sampling_rate": 16_000} if name == "audio" else {}),
            )
        assert Hasher.hash(one) == before and len(pickle.dumps(one)) < 100_000
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert Hasher.hash(other) == before
    assert Hasher.hash(loaded) == Hasher.hash(again)
    _, twin = compose_tiny([key])
    del twin.items
    assert Hasher.hash(FeatureCounter(twin.config)) == Hasher.hash(FeatureCounter(processor.config))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["clip", "wav2vec2", "whisper"])
def test_collators_work_in_workers_of_any_kind(key):
    (name, *_, item), (_, processor) = tiny.ENCODERS[key], compose_tiny([key])
    del processor.items
    rows = [{"text": f"a {processor.tokens[name]}", name: item(i)} for i in range(4)]
    collator = MultimodalCollator(processor, sampling_rate=16_000 if name == "audio" else None)
    expected = [collator(rows[i : i + 2]) for i in (0, 2)]
    for context in ("spawn", "fork"):
        found = list(DataLoader(rows, 2, num_workers=1, collate_fn=collator, multiprocessing_context=context))
        for got, wanted in zip(found, expected, strict=True):
            assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)


def test_a_number_of_shapes_without_end_is_not_remembered():
    _, processor = compose_tiny(["convnext"])
    processor.counter._cache.most = 5
    for width in range(32, 60):
        processor.counter.count("vision", {"pixel_values": torch.zeros(1, 3, 32, width)})
    assert len(processor.counter._cache) == 5


class Thinner:
    """A callback that is no module and holds one."""

    def __init__(self):
        self.every = Every(2)

    def __call__(self, inputs, output):
        return self.every(inputs, output)

    def method(self, inputs, output):
        return self.every(inputs, output)


def through(every, inputs, output):
    return every(inputs, output)


WEIGHTY = {
    "module": lambda: Every(2),
    "method of a module": lambda: Every(2).forward,
    "object": lambda: Thinner(),
    "method of an object": lambda: Thinner().method,
    "partial": lambda: functools.partial(through, Every(2)),
    "partial by keyword": lambda: functools.partial(through_keyword, every=Every(2)),
}


def through_keyword(inputs, output, every):
    return every(inputs, output)


@pytest.mark.parametrize("kind", WEIGHTY)
def test_callbacks_of_every_kind_leave_their_weights_behind(kind):
    callback = WEIGHTY[kind]()
    model, processor = compose_tiny(["clip"], vision={"postprocess_module_callback": callback})
    before = Hasher.hash(processor), Hasher.hash(MultimodalCollator(processor))
    made = pickle.dumps(MultimodalCollator(processor))
    assert len(made) < 100_000, "4 MB with the weights"
    item = {"text": "<image>", "images": tiny.image(), "return_tensors": "pt"}
    expected = processor(**item)["input_ids"]
    assert expected.eq(processor.config.modality("vision")["token_id"]).sum() == 3  # every second of 5
    for again in (processor, copy.deepcopy(processor), pickle.loads(made).processor):
        assert torch.equal(again(**item)["input_ids"], expected)
        assert (Hasher.hash(again), Hasher.hash(MultimodalCollator(again))) == before
    with torch.no_grad():
        assert len(model.get_image_features(pixel_values=torch.zeros(1, 3, 8, 8)).pooler_output[0]) == 3


def test_a_projection_that_is_not_registered_is_hashed_and_counted_after_a_pickle():
    projection = nn.Sequential(nn.Linear(16, 512), nn.Dropout1d(), nn.Linear(512, 32))
    config = MultimodalProjectorConfig(in_features=16, out_features=32)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = projection

        def forward(self, features):
            return self.inner(features)

    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(tiny.clip(), MultimodalProjector(config, projection=Own()))},
        language_model=tiny.llama(),
    )
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    before = Hasher.hash(processor)
    assert processor(text="<image>", images=tiny.image(), return_tensors="pt")["input_ids"].shape[1] >= 5
    assert Hasher.hash(processor) == before


@pytest.mark.parametrize("name", PLACES.values())
def test_saving_leaves_the_fingerprint_and_keeps_the_sides(name, tmp_path):
    _, processor = compose_tiny([name])
    processor.tokenizer.padding_side = "left"
    before = Hasher.hash(processor)
    processor.save_pretrained(tmp_path)
    assert Hasher.hash(processor) == before
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"
