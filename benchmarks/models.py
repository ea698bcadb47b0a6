"""The two models under comparison: a native LLaVA and our composition of the same parts, proven equal before use."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig

from .sizes import Sizes

LAYER, PREFIX = -2, 1  # LLaVA projects the last but one hidden state without its CLS token
FROZEN = ("vision_encoder.module", "language_model")
MODES = ("projector", "all")
OUR_NAMES = (
    (r"^vision_encoder\.module\.", "model.vision_tower."),
    (r"^vision_encoder\.projector\.projection\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^vision_encoder\.projector\.projection\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


@dataclass(frozen=True)
class Pair:
    """Two models of equal weights and the inputs on which their logits were found equal to the bit.

    Attributes:
        native: `LlavaForConditionalGeneration`.
        ours: `MultimodalModel`.
        inputs: `input_ids`, `attention_mask` ``(batch, length)`` and `pixel_values`.
        labels: ``(batch, length)``.
        vocabulary: number of tokens.
    """

    native: Any
    ours: Any
    inputs: dict[str, Tensor]
    labels: Tensor
    vocabulary: int


def image_token(vocabulary: int) -> int:
    """Id of the placeholder token."""
    return vocabulary - 1


def build_native(sizes: Sizes, vocabulary: int) -> LlavaForConditionalGeneration:
    """A native LLaVA with random weights, the same in each process."""
    torch.manual_seed(0)
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options: dict[str, Any] = {
        "vision_config": {"model_type": "clip_vision_model", **sizes.vision},
        "text_config": LlamaConfig(vocab_size=vocabulary, **special, **sizes.text).to_dict(),
        "image_token_id": image_token(vocabulary),
        "image_seq_length": sizes.image_tokens,
        "vision_feature_layer": LAYER,
        "vision_feature_select_strategy": "default",
    }
    return LlavaForConditionalGeneration(LlavaConfig(**options)).eval()


def compose_parts_of(native: LlavaForConditionalGeneration) -> MultimodalModel:
    """Our composition of a native model's own parts: it shares every weight with it, and uses no memory for more."""
    inner = native.model
    with torch.device("meta"):
        language_model = LlamaForCausalLM(inner.language_model.config)
    language_model.model, language_model.lm_head = inner.language_model, native.lm_head
    mlp = inner.multi_modal_projector
    projection = nn.Sequential(mlp.linear_1, mlp.act, mlp.linear_2)
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp"), projection=projection)
    encoder = ModalEncoderModule(inner.vision_tower, projector, layer=LAYER, drop_prefix=PREFIX)
    ours = MultimodalModel(encoders={"vision": encoder}, language_model=language_model.eval()).eval()
    ours.set_modality_token_ids({"vision": native.config.image_token_id})
    return ours


def build_one(side: str, mode: str, vocabulary: int, sizes: Sizes) -> Any:
    """One of the two models alone, ready for training steps, ours with its loss at labels."""
    model: Any = build_native(sizes, vocabulary)
    if side == "ours":
        model = compose_parts_of(model)
        model.config.loss_at_labels = True
    set_trainable(model, mode)
    return model


def build_inputs(sizes: Sizes, vocabulary: int, batch: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """One image and some text in each sample.

    Returns:
        the inputs, and labels ``(batch, length)`` of the last tokens.
    """
    batch = sizes.batch if batch is None else batch
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, image_token(vocabulary), (batch, sizes.text_tokens), generator=generator)
    image = torch.full((batch, sizes.image_tokens), image_token(vocabulary))
    before = (sizes.text_tokens - sizes.labelled) // 2
    ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)  # (batch, length)
    labels = ids.clone()
    labels[:, : -sizes.labelled] = -100
    side = sizes.vision["image_size"]
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, labels


def build_pair(sizes: Sizes, vocabulary: int) -> Pair:
    """Both models with weights of their own, and the proof that they are equal.

    Raises:
        ValueError: weights or logits differ.
    """
    native = build_native(sizes, vocabulary)
    ours = compose_parts_of(copy.deepcopy(native))
    inputs, labels = build_inputs(sizes, vocabulary)
    check_weights(native, ours)
    check_logits(native, ours, inputs)
    return Pair(native, ours, inputs, labels, vocabulary)


def native_name(key: str) -> str:
    """The name that a tensor of ours has in the native model.

    >>> native_name("language_model.lm_head.weight")
    'lm_head.weight'
    """
    for pattern, replacement in OUR_NAMES:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    raise ValueError(f"{key} is a tensor of the composed model that the native one does not have.")


def check_weights(native: nn.Module, ours: nn.Module) -> None:
    """ValueError, with the tensor, unless both models have the same weights and share none."""
    theirs = native.state_dict()
    mine = {native_name(key): tensor for key, tensor in ours.state_dict().items()}
    if missing := sorted(set(theirs) ^ set(mine)):
        raise ValueError(f"The two models do not have the same tensors: {missing[:6]} are in one of them alone.")
    for key, tensor in theirs.items():
        if not torch.equal(tensor, mine[key]):
            raise ValueError(
                f"The weights differ in {key}, so nothing can be compared: build both from the same parts."
            )
        if tensor.data_ptr() == mine[key].data_ptr():
            raise ValueError(f"The two models share {key}, so gradients of one would be counted for the other.")


@torch.no_grad()
def check_logits(native: nn.Module, ours: nn.Module, inputs: dict[str, Tensor]) -> None:
    """ValueError, with the largest difference, unless the logits are equal to the bit."""
    expected, got = native(**inputs).logits, ours(**inputs).logits
    if not torch.equal(expected, got):
        gap = (expected - got).abs().max().item() if expected.shape == got.shape else (expected.shape, got.shape)
        raise ValueError(f"The logits are not equal to the bit, they differ by {gap}: the two models do other things.")


def set_trainable(model: nn.Module, mode: str) -> None:
    """Put either model into training mode with the projector alone or all of it trainable.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown training mode {mode!r}, expected one of {MODES}.")
    if isinstance(model, MultimodalModel):
        model.unfreeze()
        if mode == "projector":
            model.freeze(*FROZEN)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(mode == "all" or "multi_modal_projector" in name)
    model.train()
