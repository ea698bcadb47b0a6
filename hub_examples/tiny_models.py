"""Small models with random weights, saved like Hub checkpoints, for examples that are run without the Hub."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    EsmConfig,
    EsmModel,
    EsmTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TimesFm2_5Config,
    TimesFm2_5Model,
)

WORDS = "what is in the picture ? a red green blue square describe it user assistant"


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_language_model(folder: Path) -> Path:
    """A small Llama with its tokenizer."""
    tokenizer = save_tokenizer(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_vision_encoder(folder: Path, size: int = 16, any_resolution: bool = False) -> Path:
    """A small CLIP vision tower with its image processor."""
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                              image_size=size, patch_size=4, projection_dim=16)  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if any_resolution:
        grids = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
        LlavaNextImageProcessorPil(**shape, image_grid_pinpoints=grids).save_pretrained(folder)
    else:
        CLIPImageProcessorPil(**shape).save_pretrained(folder)
    return folder


def make_llava(folder: Path, size: int = 16) -> Path:
    """A small LLaVA with its processor: CLIP, two layers, Llama."""
    tokenizer = save_tokenizer(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**layers, image_size=size, patch_size=4, projection_dim=16)
    text = LlamaConfig(**layers, vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
                       eos_token_id=2)  # fmt: skip
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=token)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    LlavaProcessor(
        CLIPImageProcessorPil(**shape), tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_protein_encoder(folder: Path) -> Path:
    """A small ESM with its tokenizer."""
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    config = EsmConfig(vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, max_position_embeddings=512, pad_token_id=1, mask_token_id=32,
                       position_embedding_type="rotary")  # fmt: skip
    EsmModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(letters))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def make_time_series_encoder(folder: Path) -> Path:
    """A small TimesFM 2.5, which has no processor of its own."""
    config = TimesFm2_5Config(patch_length=8, context_length=256, hidden_size=32, intermediate_size=64, head_dim=8,
                              num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)  # fmt: skip
    TimesFm2_5Model(config).save_pretrained(folder)
    return folder
