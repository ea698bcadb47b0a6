"""Builders of tiny random parts.  A plain module, so that subprocesses of tests import it too."""

import random

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    EsmConfig,
    EsmModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import is_torchvision_available

# Image processors of the backend that a saved one loads as: torchvision's where it is installed, else Pillow's.
BACKEND = "" if is_torchvision_available() else "Pil"
IMAGES = {
    name: getattr(transformers, f"{name}ImageProcessor{BACKEND}") for name in ("CLIP", "ConvNext", "Qwen2VL", "Siglip")
}
VOCABULARY = 320
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def seeded(build):
    """A builder that gives the same weights each time."""

    def built(*args, seed=0, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(*args, **kwargs).eval()

    return built


# ---- encoders


@seeded
def clip(**changes):
    return CLIPVisionModel(
        CLIPVisionConfig(**{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                                "image_size": 8, "patch_size": 4, "projection_dim": 8} | changes))  # fmt: skip


@seeded
def siglip(**changes):
    return SiglipVisionModel(
        SiglipVisionConfig(**{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                  "image_size": 8, "patch_size": 4} | changes))  # fmt: skip


@seeded
def dinov2(**changes):
    return Dinov2Model(
        Dinov2Config(**{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
                            "mlp_ratio": 2} | changes))  # fmt: skip


@seeded
def convnext(**changes):
    return ConvNextModel(
        ConvNextConfig(**{"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "num_channels": 3} | changes)
    )


@seeded
def qwen2_vl(**changes):
    return Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(**{"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                                   "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3} | changes))  # fmt: skip


@seeded
def whisper(**changes):
    return WhisperEncoder(
        WhisperConfig(**{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
                             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
                             "max_source_positions": 6, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                             "decoder_start_token_id": 1} | changes))  # fmt: skip


@seeded
def wav2vec2(**changes):
    return Wav2Vec2Model(
        Wav2Vec2Config(**{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                              "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8,
                              "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "mask_time_prob": 0.0,
                              "apply_spec_augment": False} | changes))  # fmt: skip


@seeded
def speech_to_text(**changes):
    return Speech2TextEncoder(
        Speech2TextConfig(**{"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                                 "input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 100} | changes))  # fmt: skip


@seeded
def esm(**changes):
    return EsmModel(
        EsmConfig(**{"vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                         "max_position_embeddings": 64, "pad_token_id": 1, "mask_token_id": 32,
                         "position_embedding_type": "rotary"} | changes), add_pooling_layer=False)  # fmt: skip


# ---- language models


@seeded
def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**TEXT | changes))


@seeded
def qwen3(**changes):
    return Qwen3ForCausalLM(Qwen3Config(**TEXT | {"head_dim": 8} | changes))


@seeded
def gpt2(**changes):
    return GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
                          "eos_token_id": 2, "pad_token_id": 0} | changes))  # fmt: skip


@seeded
def gemma3(**changes):
    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT | {"head_dim": 8, "sliding_window": 64} | changes))


@seeded
def qwen3_moe(**changes):
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TEXT | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                     "decoder_sparse_step": 1} | changes))  # fmt: skip


@seeded
def falcon_h1(**changes):
    return FalconH1ForCausalLM(
        FalconH1Config(**TEXT | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
                                     "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_chunk_size": 8, "mamba_expand": 1} | changes))  # fmt: skip


LANGUAGE_MODELS = {
    "llama": llama, "qwen3": qwen3, "gpt2": gpt2, "gemma3": gemma3, "qwen3_moe": qwen3_moe, "falcon_h1": falcon_h1,
}  # fmt: skip

# ---- processors


def clip_processor(**changes):
    return IMAGES["CLIP"](**{"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}} | changes)


def siglip_processor():
    return IMAGES["Siglip"](size={"height": 8, "width": 8})


def convnext_processor():
    return IMAGES["ConvNext"](size={"shortest_edge": 64}, crop_pct=1.0)


def qwen2_vl_processor():
    return IMAGES["Qwen2VL"](patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1024)


def whisper_processor():
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=1333, n_fft=400, sampling_rate=16_000)


def wav2vec2_processor():
    return Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16_000, do_normalize=True)


def speech_to_text_processor():
    return Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16)


def protein_tokenizer():
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>",
                                   eos_token="<eos>", model_input_names=["input_ids", "attention_mask"])  # fmt: skip


def tokenizer(chat_template=None):
    """A byte-level BPE tokenizer of 300 tokens, smaller than the language models' vocabulary."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "image",
        "sound",
        "sum",
        "seven",
        "five",
        "plus",
        "what",
        "is",
        "user",
        "assistant",
    ]
    random.Random(0).shuffle(words)
    inner.train_from_iterator([" ".join(words)] * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


# encoder -> (builder, processor builder, item builder)
def image(seed=0, size=(12, 10)):
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator).to(torch.uint8).numpy())


def sound(seed=0, length=1600):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).numpy() * 0.1


def protein(seed=0, length=7):
    return "".join(random.Random(seed).choices("LAGVSERTIDPKQNFYMHWC", k=length))


ENCODERS = {
    "clip": ("vision", clip, clip_processor, image),
    "siglip": ("vision", siglip, siglip_processor, image),
    "dinov2": ("vision", dinov2, clip_processor, image),
    "convnext": ("vision", convnext, convnext_processor, image),
    "qwen2_vl": ("vision", qwen2_vl, qwen2_vl_processor, image),
    "whisper": ("audio", whisper, whisper_processor, sound),
    "wav2vec2": ("audio", wav2vec2, wav2vec2_processor, sound),
    "esm": ("protein", esm, protein_tokenizer, protein),
}


def whisper_model():
    return WhisperModel(WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
                                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0,
                                      bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=6,
                                      max_target_positions=8, suppress_tokens=None, begin_suppress_tokens=None))  # fmt: skip


class Bare(nn.Module):
    """Takes ids and labels alone: no slice of the logits, no number of items, no cache."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 10)
        self.seen = []

    def forward(self, input_ids, labels=None, return_dict=True):
        self.seen.append(labels is not None)
        logits = self.table(input_ids)
        loss = None if labels is None else logits.sum()
        return CausalLMOutput(loss=loss, logits=logits)
