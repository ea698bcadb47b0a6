"""One row of speech from a plain composition to a tuned one: what each step of `docs/speed.md` gains over the one before."""

import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from cornstarch_hf import (
    MultimodalCollator,
    MultimodalProcessor,
    PrecomputedFeatures,
    PrecomputedFeaturesConfig,
    compose,
)

from .results import Result, in_turn
from .sizes import FULL, Sizes
from .speed import LOSS_TOLERANCE
from .timing import elapsed, one_thread, quiet

# The sizes of Whisper tiny.en and of SmolLM2-135M; small ones show that all runs.
SPEECH: dict[str, Any] = {
    "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "num_mel_bins": 80,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_SPEECH = SPEECH | {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
SMALL_TEXT = TEXT | {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SECONDS, RATE, STACK = 2.5, 16_000, 8
SYSTEM = "You are a helpful AI assistant named Small , trained by someone with much care and patience ."
ASKED, ANSWERED = "write down what is said", "the quick brown fox jumps over the lazy dog and then goes home"
TURN = "{% for part in m.content %}{{ '<audio>' if part.type == 'audio' else part.text }}{% endfor %}"
SHORT = "{% for m in messages %}{{ m.role[0] }} " + TURN + "{{ eos_token }}{% endfor %}"
LONG = (
    "start system " + SYSTEM + " stop {% for m in messages %}start {{ m.role }} : " + TURN + " stop {{ eos_token }}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Rung:
    """How a composition is set up.

    Attributes:
        name: what this one changes of the one before.
        at_labels: the loss is taken where the labels are.
        trim: features of valid frames alone.
        dtype: of encoder and language model; the projector stays float32.
        template: the chat template.
        attention: its implementation.
        cached: the encoder's features are computed once, before.
    """

    name: str = "defaults of a plain composition"
    at_labels: bool = False
    trim: bool = False
    dtype: torch.dtype = torch.float32
    template: str = LONG
    attention: str = "sdpa"
    cached: bool = False


@functools.cache
def rungs() -> tuple[Rung, ...]:
    """The ladder from below; each has what those before it have."""
    made = [Rung()]
    for name, change in (
        ("loss at labels", {"at_labels": True}),
        ("valid frames alone", {"trim": True}),
        ("bfloat16", {"dtype": torch.bfloat16}),
        ("a short chat template", {"template": SHORT}),
        ("eager attention", {"attention": "eager"}),
        ("features computed once", {"cached": True}),
    ):
        made.append(replace(made[-1], name=name, **change))
    return tuple(made)


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer by words, those of the row."""
    words = f"{SYSTEM} {ASKED} {ANSWERED} start stop system user assistant u a :".split()
    found = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    inner = Tokenizer(models.WordLevel(found, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if len(found) >= size:
        raise ValueError(f"The row has {len(found)} words, which a vocabulary of {size} does not hold.")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build(rung: Rung, judged: bool) -> tuple[Any, MultimodalProcessor]:
    """The composition of one rung, its projector alone trainable."""
    torch.manual_seed(0)
    text = LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=1, **(TEXT if judged else SMALL_TEXT))
    language_model: Any = LlamaForCausalLM(text)
    settings = SPEECH if judged else SMALL_SPEECH
    source: dict[str, Any] = {"projector": {"projection_type": "frame_stack", "stack_factor": STACK}}
    if rung.cached:
        source["model"] = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=settings["d_model"]))
        source["kind"] = "audio"
    else:
        ids: dict[str, Any] = dict.fromkeys(["bos_token_id", "eos_token_id", "decoder_start_token_id"], 1)
        encoder: Any = WhisperEncoder(WhisperConfig(**settings, **ids, vocab_size=2, pad_token_id=0))
        source |= {"model": encoder.to(rung.dtype), "trim": rung.trim}
        source["processor"] = WhisperFeatureExtractor(feature_size=settings["num_mel_bins"])
    options: dict[str, Any] = {"tokens": {"audio": "<audio>"}, "chat_template": rung.template}
    options["tokenizer"] = tokenizer_of(text.vocab_size)
    model, processor = compose(language_model.to(rung.dtype), {"audio": source}, **options)
    model.audio_encoder.projector.float()
    model.set_attn_implementation(rung.attention)
    model.config.loss_at_labels = rung.at_labels
    model.freeze("audio_encoder.module", "language_model")  # the projector trains
    return model.train(), processor


def sound() -> Any:
    """Noise of `SECONDS`, ``(samples,)``."""
    return np.random.default_rng(0).standard_normal(int(SECONDS * RATE)).astype(np.float32)


def batch_of(processor: MultimodalProcessor, item: Any) -> dict[str, Tensor]:
    """The row, with a sound or its features, as a batch of one."""
    asked = [{"type": "audio", "audio": item}, {"type": "text", "text": f" {ASKED}"}]
    answered = [{"type": "text", "text": ANSWERED}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    return MultimodalCollator(processor)([row])


@torch.no_grad()
def encoded(rung: Rung, judged: bool) -> Tensor:
    """What the encoder of a rung without features gives for the row's sound: ``(valid frames, width)``."""
    model, processor = build(replace(rung, cached=False), judged)
    batch = batch_of(processor, sound())
    frames = model.audio_encoder.module(batch["input_features"].to(rung.dtype)).last_hidden_state[0]
    return frames[: batch["audio_attention_mask"].sum() // 2]  # a frame of Whisper stands for two of its input


class Step:
    """Training steps of one rung on the row."""

    def __init__(self, rung: Rung, judged: bool):
        item = encoded(rung, judged) if rung.cached else sound()
        self.model, processor = build(rung, judged)
        self.batch = batch_of(processor, item)
        self.length = self.batch["input_ids"].shape[1]
        self.loss = float("nan")

    def seconds(self) -> float:
        """CPU time of one."""
        self.model.zero_grad()
        return elapsed(self.run, time.process_time)

    def run(self) -> None:
        """Forward and backward pass."""
        loss = self.model(**self.batch).loss
        loss.backward()
        self.loss = loss.item()


def ladder(sizes: Sizes) -> list[Result]:
    """Each rung against the one before, in turn, in CPU time on one thread; the last row is the whole ladder.

    Raises:
        ValueError: the first two rungs, which compute the same, have other losses.
    """
    results, pairs = [], sizes.pairs["ladder"]
    with one_thread(), quiet():
        below = first = Step(rungs()[0], sizes.judged)
        for rung in rungs()[1:]:
            above = Step(rung, sizes.judged)
            samples = in_turn(below.seconds, above.seconds, pairs)
            notes = {"tokens_before": below.length, "tokens": above.length, "losses": [below.loss, above.loss]}
            results.append(Result("ladder", f"ladder, + {rung.name}", "CPU s", *samples, notes=notes))
            if below is first and not abs(above.loss - below.loss) <= LOSS_TOLERANCE * abs(below.loss):
                raise ValueError(f"The loss at labels is {above.loss}, with all logits it is {below.loss}.")
            below = above
        samples = in_turn(first.seconds, below.seconds, pairs)
    return [*results, Result("ladder", "ladder, all of it", "CPU s", *samples)]


def main() -> None:
    """The ladder alone: a table of factors."""
    for result in ladder(FULL):
        print(f"{result.name}: {result.inverse:.2f} times faster, {result.notes}")


if __name__ == "__main__":
    main()
