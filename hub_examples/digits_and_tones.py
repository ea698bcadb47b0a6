"""Handwritten digits, telephone tones and small models that learn to add them: what several examples share.

The digits are the UCI ones bundled with scikit-learn, some of them held out; the tones are DTMF (ITU-T Q.23: two sine
waves).
"""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from cornstarch_hf import MultimodalCollator

SAMPLING_RATE = 8_000
HELD_OUT = 360
PROMPT = "{image} + {audio} ="
# Keys 0..9 of a telephone: a row frequency and a column frequency in Hz (ITU-T Q.23).
ROWS = {1: 697, 2: 697, 3: 697, 4: 770, 5: 770, 6: 770, 7: 852, 8: 852, 9: 852, 0: 941}
COLUMNS = {1: 1209, 4: 1209, 7: 1209, 2: 1336, 5: 1336, 8: 1336, 0: 1336, 3: 1477, 6: 1477, 9: 1477}


def tone(key: int, generator: np.random.Generator, rate: int = SAMPLING_RATE) -> np.ndarray:
    """A DTMF tone of random phase, loudness, start and length, with noise: float32 (rate,), one second."""
    seconds = np.arange(rate) / rate
    start, length = generator.uniform(0.0, 0.3), generator.uniform(0.25, 0.6)
    audible = (seconds >= start) & (seconds < start + length)
    phases, loudness = generator.uniform(0, 2 * np.pi, 2), generator.uniform(0.1, 0.45)
    waves = sum(
        np.sin(2 * np.pi * frequency * seconds + phase)
        for frequency, phase in zip((ROWS[key], COLUMNS[key]), phases, strict=True)
    )
    return (loudness * waves * audible + generator.normal(0, 0.01, rate)).astype(np.float32)


def digits(held_out: bool) -> tuple[list[Image.Image], list[int]]:
    """The bundled digits as images, the last ones held out."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[-HELD_OUT:] if held_out else order[:-HELD_OUT]
    images = [Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)) for i in chosen]
    return images, [int(data.target[i]) for i in chosen]


def jittered(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The digit a little turned, scaled, shifted and noisy, so that the model sees more hands than the data has."""
    angle, scale = np.deg2rad(generator.uniform(-8, 8)), generator.uniform(0.95, 1.05)
    shift, centre = generator.uniform(-0.4, 0.4, 2), (np.array(image.size) - 1) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    offset = centre - turn @ centre + shift
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    moved = np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    return Image.fromarray((moved + generator.normal(0, 12, moved.shape)).clip(0, 255).astype(np.uint8))


def questions(processor, count: int | None, held_out: bool, seed: int) -> list[dict]:
    """Rows of `prompt`, `completion`, an image and a tone; every held-out image once, else `count` random pairs."""
    images, values = digits(held_out)
    generator = np.random.default_rng(seed)
    chosen = range(len(images)) if count is None else generator.integers(len(images), size=count)
    prompt = PROMPT.format(image=processor.image_token, audio=processor.audio_token)
    rate = processor.feature_extractor.sampling_rate
    rows = []
    for index in chosen:
        key = int(generator.integers(10))
        answer = f" {values[index]} + {key} = {values[index] + key}"
        completion = answer + processor.tokenizer.eos_token
        image = images[index] if held_out else jittered(images[index], generator)
        sound = tone(key, generator, rate)
        row = {"prompt": prompt, "completion": completion, "images": [image], "audio": [sound]}
        rows.append(row)
    return rows


class EncodedRows(Dataset):
    """Rows that went through the collator once: one image, one sound and one text each, all of one length."""

    def __init__(self, processor, rows: list[dict], chunk: int = 64):
        collator = MultimodalCollator(processor, pad_to_multiple_of=8)
        batches = [
            collator(rows[i : i + chunk]) for i in tqdm(range(0, len(rows), chunk), desc="encoding", unit="batch")
        ]
        length = max(batch["input_ids"].shape[1] for batch in batches)
        blank = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        self.columns = {}
        for key in batches[0]:
            parts = [batch[key] for batch in batches]
            if key in blank:
                parts = [torch.nn.functional.pad(p, (0, length - p.shape[1]), value=blank[key]) for p in parts]
            self.columns[key] = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: column[index] for key, column in self.columns.items()}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the questions and answers."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"0123456789+= "])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def small_parts() -> dict:
    """Arguments of `compose` for small parts with fresh weights."""
    vision = ViTModel(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
        ),
        add_pooling_layer=False,
    )
    audio = WhisperModel(
        WhisperConfig(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
                      decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=32, max_source_positions=25, vocab_size=8,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    )  # fmt: skip
    tokenizer = character_tokenizer()
    language_model = LlamaForCausalLM(
        LlamaConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=256,
                    vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256)
    )  # fmt: skip
    vision_processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    audio_processor = WhisperFeatureExtractor(
        feature_size=32, sampling_rate=SAMPLING_RATE, hop_length=160, chunk_length=1
    )
    return {
        "language_model": language_model,
        "tokenizer": tokenizer,
        "encoders": {
            "vision": {"model": vision, "processor": vision_processor},
            "audio": {"model": audio, "processor": audio_processor},
        },
    }


def answered(model, processor, rows: list[dict], batch_size: int) -> list[tuple[str, str]]:
    """Generate on the prompts of rows; ``(expected, answered)`` for each."""
    answers: list[str] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="answering", unit="batch"):
        batch = rows[start : start + batch_size]
        inputs = processor(
            text=[row["prompt"] for row in batch],
            images=[row["images"] for row in batch],
            audio=[row["audio"] for row in batch],
            sampling_rate=processor.feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    expected = [row["completion"].removesuffix(processor.tokenizer.eos_token).strip() for row in rows]
    return list(zip(expected, answers, strict=True))
