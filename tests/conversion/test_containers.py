"""Compositions that never were native, in native classes that hold them: equal to the bit there and back; what is refused, and why."""

import native_processors
import pytest
import torch
import transformers
from containable import (
    LANGUAGE_MODELS,
    LLAVA_TOWERS,
    TOKEN,
    composed,
    copies,
    image_batch,
    language_model,
    llava_like,
    pixels,
    sound_batch,
    tower,
    whole_mask,
)
from native_types import check_equal, digests, logits_of

from cornstarch_hf import MultimodalModel, from_native, to_native
from cornstarch_hf.conversion.containers import CONTAINERS

SHUFFLE = {"projection_type": "pixel_shuffle", "projection_kwargs": {"scale_factor": 2}}
ONE_LAYER = {"projection_type": "pixel_shuffle", "projection_kwargs": {"num_layers": 1, "norm": "none", "bias": False}}
STACK = {"projection_type": "frame_stack", "projection_kwargs": {"stack_factor": 4}}
LINEAR = {"projection_type": "linear"}
WIDE = {"encoder_ffn_dim": 128, "intermediate_size": 128}  # four times the width, as Whisper has


def internvl(text="qwen3", projector=None, **changes):
    options = {"drop_prefix": 1} | changes
    return composed(tower("internvl_vision"), language_model(text), projector or SHUFFLE, **options)


def idefics3(encoder="siglip_vision_model", text="llama"):
    return composed(tower(encoder), language_model(text), ONE_LAYER, name="image")


def whisper(text="qwen3", projector=None, **changes):
    return composed(
        tower("whisper", **{"encoder_ffn_dim": 128} | changes), language_model(text), projector or STACK, "audio"
    )


def heard(encoder, projector, text="qwen3", **changes):
    return composed(tower(encoder, **changes), language_model(text), projector, "audio")


def rows_of_images(inputs):
    """As Idefics3's processor gives them: by rows."""
    return inputs | {"pixel_values": inputs["pixel_values"][None]}


def settings(model):
    """Its configuration, without what saving and converting write there of the live model."""
    return {key: value for key, value in model.config.to_dict().items() if key not in ("frozen", "part_dtypes")}


def check_held(model, model_type, inputs, folder, native_inputs=None, **loading):
    """A native model equals the composition, also reloaded, and taken apart again; the composition stays as it is."""
    before = digests(model), settings(model)
    native = to_native(model, model_type=model_type)
    assert (digests(model), settings(model)) == before and model.config.native is None
    given = inputs if native_inputs is None else native_inputs
    live, ours = copies(native, model)
    expected = logits_of(ours, inputs)
    assert torch.equal(logits_of(live, given), expected)
    louder = {key: x * 1.5 if x.is_floating_point() else x for key, x in inputs.items()}
    assert not torch.equal(logits_of(ours, louder), expected)  # or else the media did not matter
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [TOKEN]}
    tokens = ours.generate(**inputs, **options)
    assert torch.equal(live.generate(**given, **options)[:, -4:], tokens[:, -4:])
    native.save_pretrained(folder)
    loaded, told = type(native).from_pretrained(folder, output_loading_info=True, **loading)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert digests(loaded) == digests(native)
    assert torch.equal(logits_of(copies(loaded)[0].eval(), given), expected)
    back, _ = from_native(folder, **loading)
    assert torch.equal(logits_of(copies(back)[0].eval(), given), expected)
    assert digests(to_native(back)) == digests(native)
    return native


DIAGONAL = list(zip(LLAVA_TOWERS, LANGUAGE_MODELS, strict=True))


@pytest.mark.parametrize(("encoder", "text"), DIAGONAL)
def test_llava_holds_towers_and_language_models(encoder, text, tmp_path):
    model = llava_like(encoder, text)
    check_held(model, "llava", image_batch(model), tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("text", LANGUAGE_MODELS)
@pytest.mark.parametrize("encoder", LLAVA_TOWERS)
def test_llava_holds_each_tower_with_each_language_model(encoder, text, tmp_path):
    model = llava_like(encoder, text)
    check_held(model, "llava", image_batch(model), tmp_path)


LLAVA_CHOICES = {
    "no bias, relu": {"projector": {"activation": "relu", "projection_kwargs": {"bias": False}}},
    "one linear layer": {"projector": {"projection_type": "linear"}},
    "joined layers": {"layer": [-2, 1]},
    "every token": {"drop_prefix": 0},
    "the layer before the last": {"layer": -2},
    "embeddings alone": {"layer": 0},
    "the last layer, which no norm follows": {"layer": -1},
    "hidden size as it is": {"projector": {"projection_kwargs": {"hidden_size": 32, "num_layers": 2}}},
}


SLOW_CHOICES = ("every token", "the layer before the last", "hidden size as it is")


@pytest.mark.parametrize(
    "choice", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_CHOICES else x for x in LLAVA_CHOICES]
)
def test_llava_holds_what_its_settings_can_say(choice, tmp_path):
    changes = dict(LLAVA_CHOICES[choice])
    projector = {"projection_type": "mlp"} | changes.pop("projector", {})
    model = composed(tower("clip_vision_model"), language_model("llama"), projector, **{"drop_prefix": 1} | changes)
    check_held(model, "llava", image_batch(model), tmp_path)


@pytest.mark.parametrize("encoder", LLAVA_TOWERS)
def test_which_towers_have_no_norm_after_the_last_hidden_state(encoder):
    module = tower(encoder)
    with torch.no_grad():
        output = module(pixel_values=pixels(), output_hidden_states=True)
    assert (
        torch.equal(output.hidden_states[-1], output.last_hidden_state) == CONTAINERS["llava"][encoder].last_is_hidden
    )


@pytest.mark.parametrize(("activation", "layer", "scale"), [("gelu", -1, 2), ("relu", -2, 4)])
def test_internvl_holds_its_tower(activation, layer, scale, tmp_path):
    shuffle = {
        "projection_type": "pixel_shuffle",
        "projection_kwargs": {"scale_factor": scale},
        "activation": activation,
    }
    model = internvl("qwen3", layer=layer, projector=shuffle)
    check_held(model, "internvl", image_batch(model), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "encoder"),
    [("idefics3", "siglip_vision_model"), ("idefics3", "idefics3_vision"), ("smolvlm", "siglip_vision_model")],
)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_idefics3_holds_its_tower_and_siglip(model_type, encoder, attention, tmp_path):
    model = idefics3(encoder)
    model.set_attn_implementation(attention)
    inputs = image_batch(model)
    native = check_held(model, model_type, inputs, tmp_path, rows_of_images(inputs), attn_implementation=attention)
    assert native.config.vision_config._attn_implementation == attention
    assert not any("head" in key for key in native.model.vision_model.state_dict())


def test_deepseek_vl_takes_the_last_hidden_state_that_llava_cannot(tmp_path):
    model = composed(tower("siglip_vision_model"), language_model("qwen3"))
    with pytest.raises(ValueError, match=r"after its last norm.*layer=2 .*choose a container .*'deepseek_vl'"):
        to_native(model, model_type="llava")
    check_held(model, "deepseek_vl", image_batch(model), tmp_path)


@pytest.mark.parametrize("encoder", ["whisper", "voxtral_encoder"])
def test_voxtral_holds_its_encoder_and_whisper(encoder, tmp_path):
    stack = STACK | {"activation": "silu" if encoder == "whisper" else "gelu"}
    model = heard(encoder, stack, **(WIDE if encoder != "whisper" else {"encoder_ffn_dim": 128}))
    check_held(model, "voxtral", sound_batch(model), tmp_path)


def test_qwen2_audio_holds_its_encoder(tmp_path):
    model = heard("qwen2_audio_encoder", LINEAR)
    inputs = sound_batch(model)
    check_held(model, "qwen2_audio", inputs, tmp_path, inputs | {"feature_attention_mask": whole_mask(model)})


@pytest.mark.parametrize("projector", [{"projection_type": "mlp"}, pytest.param(LINEAR, marks=pytest.mark.slow)])
def test_audioflamingo3_holds_its_encoder(projector, tmp_path):
    model = heard("audioflamingo3_encoder", projector)
    mask = whole_mask(model)
    mask[1, 40:] = 0
    check_held(model, "audioflamingo3", sound_batch(model, input_features_mask=mask), tmp_path)


SLOW_TIES = ("internvl", "qwen2_audio")  # one of each way is fast
TIED = {
    "llava": lambda: composed(tower("clip_vision_model"), language_model("qwen3", tie_word_embeddings=True), drop_prefix=1),
    "internvl": lambda: composed(
        tower("internvl_vision"), language_model("qwen3", tie_word_embeddings=True), SHUFFLE, drop_prefix=1
    ),
    "idefics3": lambda: composed(
        tower("siglip_vision_model"), language_model("llama", tie_word_embeddings=True), ONE_LAYER
    ),
    "voxtral": lambda: composed(
        tower("whisper", encoder_ffn_dim=128), language_model("qwen3", tie_word_embeddings=True), STACK, "audio"
    ),
    "qwen2_audio": lambda: composed(
        tower("qwen2_audio_encoder"), language_model("qwen3", tie_word_embeddings=True), LINEAR, "audio"
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_TIES else x for x in TIED])
def test_a_head_that_is_the_table_stays_it_or_is_copied(model_type, tmp_path):
    model = TIED[model_type]()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = sound_batch(model) if "audio" in model.encoders else image_batch(model)
    given = {"idefics3": rows_of_images}.get(model_type, lambda x: x)(inputs)
    if model_type == "qwen2_audio":
        given = inputs | {"feature_attention_mask": whole_mask(model)}
    native = check_held(model, model_type, inputs, tmp_path, given)
    ties = model_type in ("llava", "internvl", "idefics3")
    assert (native.get_output_embeddings().weight is native.get_input_embeddings().weight) is ties


def test_what_is_frozen_learnt_and_generated_goes_along():
    model = llava_like("clip_vision_model", "llama").train()
    model.freeze("vision_encoder.module")
    model.generation_config.max_new_tokens = 7
    native = to_native(model.to(torch.bfloat16), model_type="llava")
    assert native.training and native.dtype == torch.bfloat16 and native.generation_config.max_new_tokens == 7
    assert not any(p.requires_grad for p in native.model.vision_tower.parameters())
    assert all(p.requires_grad for p in native.model.language_model.parameters())
    assert native.lm_head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    given = native_processors.PROCESSORS["llava"](16)
    assert to_native(model, given, model_type="llava")[1] is given
    with pytest.raises(TypeError, match="The processor must be a MultimodalProcessor or a native one"):
        to_native(model, given.tokenizer, model_type="llava")


def test_a_composition_from_its_checkpoint_is_held_too(tmp_path):
    model = idefics3()
    model.save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path)
    assert digests(to_native(loaded, model_type="idefics3")) == digests(to_native(model, model_type="idefics3"))


def test_placeholders_beyond_the_table_are_refused_until_it_grows(tmp_path):
    model = llava_like("clip_vision_model", "llama")
    model.set_modality_token_ids({"vision": 97})
    with pytest.raises(ValueError, match=r"has 96 rows, and vision has the id 97: model.resize_token_embeddings\(98\)"):
        to_native(model, model_type="llava")
    model.resize_token_embeddings(98)
    inputs = image_batch(model)
    ids = inputs["input_ids"]
    native = check_held(model, "llava", inputs | {"input_ids": ids.masked_fill(ids == TOKEN, 97)}, tmp_path)
    assert native.config.image_token_id == 97 and native.lm_head.weight.shape[0] == 98


def two_encoders():
    from cornstarch_hf import ModalEncoderModule

    encoders = {"a": ModalEncoderModule(tower("clip_vision_model")), "b": ModalEncoderModule(tower("dinov2"))}
    return MultimodalModel(encoders=encoders, language_model=language_model("llama"))


def mixed():
    model = llava_like("clip_vision_model", "llama")
    model.vision_encoder.to(torch.float16)
    return model


def without_token():
    from cornstarch_hf import ModalEncoderModule

    vision = ModalEncoderModule(tower("clip_vision_model"))
    return MultimodalModel(encoders={"vision": vision}, language_model=language_model("llama"))


def with_callback():
    from cornstarch_hf.conversion.steps import pooled_frames

    model = llava_like("clip_vision_model", "llama")
    model.vision_encoder.postprocess_projector_callback = pooled_frames
    return model


def with_rule():
    from cornstarch_hf import ModalEncoderModule

    vision = ModalEncoderModule(tower("clip_vision_model"), layer=-2)
    rules = {"mask": {"rule": "item_blocks"}}
    model = MultimodalModel(encoders={"vision": vision}, language_model=language_model("gemma3_text"), **rules)
    model.set_modality_token_ids({"vision": TOKEN})
    return model


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinModel(config)


def unpooled():
    encoder = transformers.ViTModel(tower("vit").config, add_pooling_layer=False)
    return composed(encoder, language_model("llama"), layer=-2, drop_prefix=1)


def small_llava(text="llama", projector=None, **selection):
    return composed(tower("clip_vision_model"), language_model(text), projector, **{"drop_prefix": 1} | selection)


REFUSED = {
    "encoders": ("llava", two_encoders, r"has one encoder, this composition has \['a', 'b'\]"),
    "kind": ("llava", lambda: whisper(), "takes items of the kind 'image', audio has 'audio'"),
    "sounds of images": ("voxtral", lambda: internvl(), "takes items of the kind 'audio', vision has 'image'"),
    "token": ("llava", without_token, "vision has no id of placeholders: model.set_modality_token_ids"),
    "dtypes": ("llava", mixed, r"dtypes \['torch.float16', 'torch.float32'\], .* loaded in one: model.to\(dtype\)"),
    "tower": ("llava", lambda: composed(swin(), language_model("llama")), "its tower is SwinModel .* expected one of"),
    "a tower of clip": ("internvl", small_llava, r"CLIPVisionModel \('clip_vision_model'\), expected one of \['internvl_vision'"),
    "a tower of whisper": ("qwen2_audio", lambda: whisper(), r"\('whisper'\), expected one of \['qwen2_audio_encoder'\]"),
    "granite": ("llava", lambda: small_llava("granite"), "GraniteForCausalLM does more to hidden states or logits than"),
    "cohere2": ("llava", lambda: small_llava("cohere2"), "Cohere2ForCausalLM does more to hidden states or logits than"),
    "gemma2": ("llava", lambda: small_llava("gemma2"), "Gemma2ForCausalLM does more to hidden states or logits than"),
    "gemma3 with a bound": (
        "llava", lambda: composed(
            tower("clip_vision_model"), language_model("gemma3_text", final_logit_softcapping=5.0), drop_prefix=1
        ), "Gemma3ForCausalLM does more to hidden states or logits than",
    ),
    "gpt2": ("llava", lambda: small_llava("gpt2"), "of GPT2Model is not called embed_tokens"),
    "dropped tokens": ("llava", lambda: small_llava(drop_prefix=5), r"drops 5 leading tokens, and .* one of \[1, 0\]"),
    "class token": ("deepseek_vl", lambda: composed(
        tower("siglip_vision_model"), language_model("llama"), drop_prefix=1
    ), "its drop_prefix is 1, and DeepseekVLForConditionalGeneration computes what it does with 0"),
    "output": ("llava", lambda: small_llava(output="last_hidden_state"), "its output is 'last_hidden_state'"),
    "norm": ("llava", lambda: llava_like("dinov2", "llama", layer=-1), "layer=-1 is what its tower gives after its last norm"),
    "projector": ("llava", lambda: small_llava(projector=SHUFFLE), "its projector is 'pixel_shuffle', .* has 'mlp' or 'linear'"),
    "projector of one type": ("internvl", lambda: composed(
        tower("internvl_vision"), language_model("llama"), drop_prefix=1
    ), "its projector is 'mlp', and InternVLForConditionalGeneration has 'pixel_shuffle'"),
    "layers": ("llava", lambda: small_llava(
        projector={"projection_type": "mlp", "projection_kwargs": {"num_layers": 3}}
    ), "its projector num_layers is 3"),
    "hidden size": ("llava", lambda: small_llava(
        projector={"projection_type": "mlp", "projection_kwargs": {"hidden_size": 48}}
    ), "its projector hidden_size is 48"),
    "projector's norm": ("llava", lambda: small_llava(
        projector={"projection_type": "mlp", "projection_kwargs": {"norm": "layer_norm"}}
    ), "its projector norm is 'layer_norm'"),
    "activation": ("deepseek_vl", lambda: composed(
        tower("siglip_vision_model"), language_model("llama"), {"projection_type": "mlp", "activation": "relu"}
    ), "its projector activation is 'relu'"),
    "a linear layer with a fixed activation": ("deepseek_vl", lambda: composed(
        tower("siglip_vision_model"), language_model("llama"), LINEAR
    ), "its projector is 'linear', and DeepseekVLForConditionalGeneration has 'mlp':|has 'mlp'"),
    "channel order": ("idefics3", lambda: composed(tower("siglip_vision_model"), language_model("llama"), {
        "projection_type": "pixel_shuffle",
        "projection_kwargs": {"num_layers": 1, "norm": "none", "bias": False, "channel_order": "channel"},
    }), "its projector channel_order is 'channel'"),
    "two layers": ("idefics3", lambda: composed(tower("siglip_vision_model"), language_model("llama"), SHUFFLE),
                   "its projector num_layers is 2"),
    "shuffled by three": ("internvl", lambda: composed(
        tower("internvl_vision", image_size=[24, 24]), language_model("llama"),
        {"projection_type": "pixel_shuffle", "projection_kwargs": {"scale_factor": 3}}, drop_prefix=1,
    ), "has scale_factor=3, and its downsample_ratio=1/3 is no exact number"),
    "joined layers": ("internvl", lambda: composed(
        tower("internvl_vision"), language_model("llama"), SHUFFLE, drop_prefix=1, layer=[-2, 1]
    ), r"vision joins the layers \[-2, 1\], and it takes one"),
    "positions": ("idefics3", lambda: composed(
        tower("siglip_vision_model", image_size=38, patch_size=2), language_model("llama"),
        ONE_LAYER | {"projection_kwargs": ONE_LAYER["projection_kwargs"] | {"remainder": "pad"}},
    ), "of 19 x 19 patches it numbers some otherwise than SigLIP"),
    "stack": ("voxtral", lambda: whisper(encoder_ffn_dim=64), "joins 4 frames, .* 64 / 32: compose with stack_factor=2"),
    "window": ("voxtral", lambda: whisper(max_source_positions=30), "a window of 30 frames is no multiple of 4"),
    "bias": ("voxtral", lambda: whisper(
        projector=STACK | {"projection_kwargs": {"stack_factor": 4, "bias": True}}
    ), "its projector bias is True"),
    "callback": ("llava", with_callback, "its callbacks is .*native_pooled_frames"),
    "rule": ("llava", with_rule, "The mask of the composition are .*item_blocks"),
    "pooler": ("llava", unpooled, "its tower was built with {'add_pooling_layer': False}, LlavaForConditionalGeneration builds"),
    "no container": ("mistral3", small_llava, r"'mistral3' takes no compositions that never were native, expected one of"),
    "unknown": ("brand_new", small_llava, "The native type 'brand_new' is not known"),
    "outside": ("mllama", small_llava, "'mllama' cannot be composed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_container_computes_otherwise_is_refused_with_its_reason(case):
    model_type, made, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        to_native(made(), model_type=model_type)
    if model_type in CONTAINERS:
        assert str(caught.value).startswith(f"'{model_type}' does not hold this composition: ")


def test_without_a_type_each_container_says_whether_it_holds_the_composition():
    with pytest.raises(ValueError, match="never was a native model: choose what it becomes by model_type=") as caught:
        to_native(idefics3())
    told = str(caught.value).splitlines()[1:]
    holds = [line.split("'")[1] for line in told if " holds it: to_native(model, model_type=" in line]
    assert holds == ["idefics3", "smolvlm"] and len(told) == len(CONTAINERS)
    reasons = {line.split("'")[1]: line for line in told if " does not: " in line}
    assert "its projector is 'pixel_shuffle'" in reasons["llava"] and "kind 'audio'" in reasons["voxtral"]


def test_siglips_patches_have_other_positions_in_idefics3_where_rounding_moves_them():
    """The reason for which some sizes are refused, in the native classes themselves."""
    differing = []
    for side in (14, 19, 27, 32):
        ours = tower("siglip_vision_model", image_size=side, patch_size=1, vision_use_head=False)
        config = transformers.Idefics3VisionConfig(**{
            key: getattr(ours.config, key) for key in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
                "hidden_act", "layer_norm_eps",
            )
        })  # fmt: skip
        theirs = transformers.AutoModel.from_config(config).eval()
        theirs.load_state_dict(ours.state_dict())
        images = pixels(1, side)
        with torch.no_grad():
            equal = torch.equal(ours(images).last_hidden_state, theirs(images).last_hidden_state)
        differing += [] if equal else [side]
    assert differing == [19]


def test_equal_logits_where_the_head_is_checked_by_reading_its_source():
    """`check_equal` is strict: a container with another head would be told."""
    model = small_llava("gemma3_text")
    native = to_native(model, model_type="llava")
    assert type(model.language_model).__name__ == "Gemma3ForCausalLM"
    live, ours = copies(native, model)
    inputs = image_batch(model)
    check_equal(live, ours, inputs)
    ours.language_model.config.final_logit_softcapping = 0.5
    assert not torch.equal(logits_of(ours, inputs), logits_of(live, inputs))
