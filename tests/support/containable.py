"""Compositions that never were native, made of towers and language models by name, and inputs of them and of their containers.

A plain module, no tests.
"""

import copy

import torch
import transformers
from convertible_models import VOCABULARY, batch, small
from convertible_models import Media as _Media
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig

TOKEN = 90
LLAVA_TOWERS = {
    "clip_vision_model": {}, "siglip_vision_model": {}, "dinov2": {}, "dinov3_vit": {}, "vit": {}, "aimv2_vision_model": {},
    "mlcd_vision_model": {}, "internvl_vision": {},
}  # fmt: skip
LANGUAGE_MODELS = ["llama", "qwen3", "qwen3_moe", "gemma3_text", "olmo2", "smollm3", "qwen2", "mistral"]
WITHOUT_CLASS_TOKEN = {"siglip_vision_model", "aimv2_vision_model"}


def randomized(module, seed):
    """A module in evaluation mode whose parameters are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values * 0.1) if parameter.ndim > 1 else parameter.data.add_(values * 0.1)
    return module.eval()


def tower(model_type, **changes):
    """A tiny random encoder of a type."""
    config = small(CONFIG_MAPPING[model_type], changes)
    if model_type == "whisper":
        return randomized(transformers.models.whisper.modeling_whisper.WhisperEncoder(config), 1)
    return randomized(AutoModel.from_config(config), 1)


def language_model(model_type, **changes):
    """A tiny random causal language model of a type."""
    return randomized(AutoModelForCausalLM.from_config(small(CONFIG_MAPPING[model_type], changes)), 2)


def composed(encoder, text, projector=None, name="vision", token=TOKEN, **selection):
    """A composition of live parts, its projector random too."""
    options = dict(projector or {"projection_type": "mlp"})
    made = MultimodalProjector(MultimodalProjectorConfig(**options))
    model = MultimodalModel(encoders={name: ModalEncoderModule(encoder, made, **selection)}, language_model=text).eval()
    randomized(model.encoders[name].projector, 3)
    if token is not None:
        model.set_modality_token_ids({name: token})
    return model


def llava_like(encoder_type, text_type, **changes):
    """A composition that LLaVA holds: the last hidden state before the norm, without class token."""
    encoder = tower(encoder_type)
    drop = 0 if encoder_type in WITHOUT_CLASS_TOKEN else 1
    options = {"layer": encoder.config.num_hidden_layers, "drop_prefix": drop} | changes
    return composed(encoder, language_model(text_type), **options)


def pixels(count=3, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def image_batch(model, images=None):
    """Left-padded rows with one and two images, and one of text."""
    images = pixels() if images is None else images
    with torch.no_grad():
        counts = [len(x) for x in model.get_image_features(pixel_values=images).pooler_output]
    return batch(_Media({"pixel_values": images}, {TOKEN: counts}))


def mel(model, count=3, seed=0):
    """Sounds of whole windows."""
    config = model.encoders["audio"].module.config
    shape = count, config.num_mel_bins, 2 * config.max_source_positions
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sound_batch(model, **more):
    """Left-padded rows with one and two sounds, and one of text; `more` are inputs beside the sounds."""
    sounds = mel(model)
    with torch.no_grad():
        found = model.encoders["audio"](input_features=sounds, **more).pooler_output
    return batch(_Media({"input_features": sounds, **more}, {TOKEN: [len(x) for x in found]}))


def whole_mask(model):
    return torch.ones(3, mel(model).shape[-1], dtype=torch.long)


def copies(*models):
    """Copies with equal shapes, layouts and memory of their own."""
    return [copy.deepcopy(model) for model in models]


assert VOCABULARY > TOKEN
