"""Real processors: whatever size an item has, its placeholders are the features that the encoder gives for it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from catalog_processors import IN_TRANSFORMERS, PAIRS, REFUSED, SOUNDS, Pair, build_encoder, build_processor
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor, compose

SIZES = 20  # that each processor is tried on, at least
MODES = ("RGB", "RGBA", "L")


def composed(name, pair):
    modality = "audio" if name in SOUNDS else "vision"
    torch.manual_seed(0)
    encoder = ModalEncoderModule(build_encoder(pair), **pair.module)
    model = MultimodalModel(encoders={modality: encoder}, language_model=tiny.llama()).eval()
    single = build_processor(name, pair)
    return model, MultimodalProcessor(tiny.tokenizer(), {modality: single}, model=model), modality


def by_compose(name, pair):
    """As `composed`, with what `compose` decides by itself."""
    torch.manual_seed(0)
    entry = {"model": build_encoder(pair), "processor": build_processor(name, pair), **pair.module}
    return *compose(tiny.llama(), {"audio": entry}, tokenizer=tiny.tokenizer()), "audio"


def side(chance, pair):
    return chance.randint(pair.smallest, pair.largest)


def size_of(chance, pair, sounds, strip):
    """A length, or (height, width): any, or a strip of a pixel or two; as far as the processor goes."""
    if sounds:
        return chance.randint(pair.shortest, pair.longest)
    while True:
        size = [side(chance, pair), chance.randint(pair.smallest, pair.smallest + 1) if strip else side(chance, pair)]
        chance.shuffle(size)
        if max(size) < pair.ratio * min(size):
            return tuple(size)


@st.composite
def batches(draw, pair, sounds):
    """One to three rows with at most three items together, at least one; an item is (size, mode)."""
    counts = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(lambda counts: 0 < sum(counts) <= 3))
    chance, strips = draw(st.randoms(use_true_random=True)), st.booleans() if pair.ratio > 100 else st.just(False)
    only = size_of(chance, pair, sounds, draw(strips)) if pair.one_size else None
    return [
        [(only or size_of(chance, pair, sounds, draw(strips)), draw(st.sampled_from(MODES))) for _ in range(count)]
        for count in counts
    ]


def item(size, mode, seed):
    if isinstance(size, int):
        return tiny.sound(seed, size)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def runs(ids, token):
    """Lengths of the runs of a token."""
    return [len(list(run)) for found, run in itertools.groupby(ids.tolist(), key=lambda i: i == token) if found]


def encoded(model, modality, batch):
    """Features of each item of a batch, by the composed model's encoder."""
    names = model.config.modality(modality)["input_names"]
    inputs = {names[key]: value for key, value in batch.items() if key in names}
    return [len(x) for x in getattr(model, f"{modality}_encoder")(**inputs).pooler_output]


class Checker:
    """What holds for every batch of a pair, and the sizes that were tried."""

    def __init__(self, name, pair, made=composed):
        self.model, self.processor, self.modality = made(name, pair)
        self.token, self.token_id = (
            self.processor.tokens[self.modality],
            self.model.config.modality(self.modality)["token_id"],
        )
        rate = getattr(self.processor.processors[self.modality], "sampling_rate", None)
        self.options = {"return_tensors": "pt", **pair.call, **({"sampling_rate": rate} if name in SOUNDS else {})}
        self.sizes = set()

    @torch.no_grad()
    def check(self, rows):
        self.sizes |= {size for row in rows for size, _ in row}
        items = [[item(*one, seed) for seed, one in enumerate(row)] for row in rows]
        alone = []
        for one in itertools.chain(*items):
            batch = self.processor(text=self.token, **{self.modality: one}, **self.options)
            alone.append(encoded(self.model, self.modality, batch))
            assert runs(batch["input_ids"][0], self.token_id) == alone[-1] and len(alone[-1]) == 1
        texts = [" and ".join(["see", *[self.token] * len(row), "x"]) for row in rows]
        batch = self.processor(text=texts, **{self.modality: items}, padding=True, **self.options)
        counted = [runs(ids, self.token_id) for ids in batch["input_ids"]]
        features = iter(n for (n,) in alone)
        assert counted == [list(itertools.islice(features, len(row))) for row in rows]
        assert encoded(self.model, self.modality, batch) == [n for row in counted for n in row]
        asked = {"text": texts, "item_lengths": True, "by_size": True}  # as the collator asks for lengths alone
        sized = self.processor(llm_inputs=asked, **{self.modality: items}, **self.options | {"return_tensors": None})
        assert sized["item_lengths"][self.modality] == [n for row in counted for n in row]
        assert self.model(**batch).logits.shape[:2] == batch["input_ids"].shape


# Sides of an image, in pixels, below which torchvision's backend of a processor fails where Pillow's does not.
SMALLEST = {"PerceiverImageProcessor": 8, "ZoeDepthImageProcessor": 8}


def with_torchvision(names):
    """The names, and torchvision's classes beside Pillow's where it is installed; `make test-torchvision` runs those."""
    names = list(names)
    return [*names, *(name.removesuffix("Pil") for name in names if not tiny.BACKEND and name.endswith("Pil"))]


@pytest.mark.catalog
# Older versions lack some.
@pytest.mark.parametrize("name", with_torchvision(name for name in PAIRS if name in IN_TRANSFORMERS))
def test_an_item_has_as_many_placeholders_as_features(name):
    pair = PAIRS.get(name) or PAIRS[f"{name}Pil"]
    pair = replace(pair, smallest=max(pair.smallest, SMALLEST.get(name, 1)))
    checker = Checker(name, pair)

    @settings(
        max_examples=60 if pair.one_size else 24,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink takes minutes
    )
    @given(batches(pair, name in SOUNDS))
    def holds(rows):
        checker.check(rows)

    holds()
    assert len(checker.sizes) >= SIZES


@pytest.mark.catalog
@pytest.mark.parametrize("name", with_torchvision(REFUSED))
def test_a_processor_whose_images_cannot_be_told_apart_says_why(name):
    pair, reason = REFUSED.get(name) or REFUSED[f"{name}Pil"]
    _, processor, modality = composed(name, pair)
    items = [item(size, "RGB", seed) for seed, size in enumerate([(40, 64), (64, 40)])]
    with pytest.raises((ValueError, TypeError), match=f"(?s)vision.*{reason}"):
        processor(text=processor.tokens[modality] * 2, **{modality: items}, return_tensors="pt")


# Encoders beside Whisper's extractor that do not follow its mask.
WHOLE_WINDOWS = {
    encoder: Pair(encoder, SOUNDS["WhisperFeatureExtractor"].settings, SOUNDS["WhisperFeatureExtractor"].changes)
    for encoder in ("qwen2_audio.Qwen2AudioEncoder", "voxtral.VoxtralEncoder")
}


@pytest.mark.catalog
@pytest.mark.parametrize("name", [name for name in [*SOUNDS, *WHOLE_WINDOWS] if name in IN_TRANSFORMERS or "." in name])
def test_compose_leaves_out_a_windows_padding_where_the_encoder_follows_its_mask(name):
    extractor = "WhisperFeatureExtractor" if name in WHOLE_WINDOWS else name
    pair = (SOUNDS | WHOLE_WINDOWS)[name]
    checker = Checker(extractor, pair, by_compose)
    assert checker.processor.config.audio_modality["trim"] == (name == "WhisperFeatureExtractor")
    short, long = ((length, None) for length in (pair.shortest, pair.longest))
    for rows in ([[short], [long, short]], [[((pair.shortest + pair.longest) // 2, None)] * 2]):
        checker.check(rows)
