"""What the first count of an item's features costs, against preprocessing that item: full-size encoders, no weights."""

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel
from cornstarch_hf.encoders.counting import FeatureCounter

from .results import Result, in_turn
from .sizes import Sizes
from .timing import seconds

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
# how it is counted -> encoder, its configuration, what is selected
ENCODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "by rule, CLIP-L, layer -2": ("CLIPVision", LARGE | {"image_size": 336, "patch_size": 14}, {"layer": -2}),
    "run of one layer, DINOv2-g with registers": ("Dinov2WithRegisters", GIANT | {"patch_size": 14}, {}),
    "run of one layer per stage, Swin-L": (
        "Swin",
        {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "image_size": 384, "window_size": 12},
        {},
    ),
}


def composed_config(
    name: str, config: dict[str, Any], selection: dict[str, Any], depth: int | None
) -> MultimodalConfig:
    """The configuration of a composition with a small Llama; `depth` replaces the encoder's layers."""
    if depth is not None and "num_hidden_layers" in config:
        config = config | {"num_hidden_layers": depth}
    text = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    with torch.device("meta"):
        encoder = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
        module = ModalEncoderModule(encoder, kind="image", **selection)
        return MultimodalModel(encoders={"vision": module}, language_model=LlamaForCausalLM(text)).config


def counting(sizes: Sizes) -> list[Result]:
    """The first count of each encoder in turn with preprocessing one photograph."""
    width, height = sizes.image
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return [first_count(how, photo, sizes) for how in ENCODERS]


def first_count(how: str, photo: Image.Image, sizes: Sizes) -> Result:
    """What a fresh counter needs for one item, and what the image processor needs for it."""
    name, config, selection = ENCODERS[how]
    side = config.get("image_size", 336)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    item = dict(image_processor(photo, return_tensors="pt"))
    composed = composed_config(name, config, selection, None if sizes.judged else 2)
    native, ours = in_turn(
        lambda: seconds(lambda: image_processor(photo, return_tensors="pt")),
        lambda: seconds(lambda: FeatureCounter(composed).count("vision", item)),
        sizes.pairs["counting"],
    )
    notes = {"features": FeatureCounter(composed).count("vision", item)}
    return Result("counting", f"first count {how}", "s", native, ours, notes=notes)
