"""Image-text pairs per second: the native processor and ours, with the same image processor and tokenizer."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from cornstarch_hf import MultimodalProcessor

from .models import Pair, image_token
from .results import Result, in_turn
from .sizes import Sizes
from .timing import seconds

BATCH = 8
TEXT = "user: <image> what is in this picture, and where? assistant: a quick brown fox jumps over the lazy dog"


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose placeholder is the last id of the vocabulary."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT.replace("<image>", "")] * 5, trainer)
    inner.add_tokens([f"<unused_{i}>" for i in range(image_token(vocabulary) - inner.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer


def build_processors(pair: Pair, sizes: Sizes) -> tuple[LlavaProcessor, MultimodalProcessor]:
    """The native processor and ours."""
    side = sizes.vision["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = build_tokenizer(pair.vocabulary)
    native = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=sizes.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return native, MultimodalProcessor(tokenizer, {"vision": image_processor}, model=pair.ours)


def processor(pair: Pair, sizes: Sizes) -> list[Result]:
    """Batches of photographs with text, up to tensors.

    Raises:
        ValueError: the two processors give other tensors.
    """
    native, ours = build_processors(pair, sizes)
    width, height = sizes.image
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8)
    batch = {"text": [TEXT] * BATCH, "images": [Image.fromarray(x) for x in pixels]}
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    expected, got = native(**batch, **options), ours(**batch, **options)
    if set(expected) != set(got) or not all(torch.equal(expected[key], got[key]) for key in got):
        raise ValueError(f"The processors do not give the same tensors: {list(expected)}, {list(got)}.")
    samples = in_turn(
        lambda: BATCH / seconds(lambda: native(**batch, **options)),
        lambda: BATCH / seconds(lambda: ours(**batch, **options)),
        sizes.pairs["processor"],
    )
    notes = {"batch": BATCH, "image": sizes.image}
    return [Result("processor", "processor", "pairs/s", *samples, notes=notes)]
