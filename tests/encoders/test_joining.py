"""Joined encoders: features side by side, one projector, one placeholder; equal to the bit to what is written by hand."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from native_parts import randomized
from own_memory import check_comes_back, own_memory
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    DeepseekVLHybridConfig,
    PixtralVisionConfig,
    PixtralVisionModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deepseek_vl_hybrid.modeling_deepseek_vl_hybrid import DeepseekVLHybridAligner

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalCollator,
    MultimodalConfig,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    register_callback,
)
from cornstarch_hf.encoders import stand_ins
from cornstarch_hf.hub.card import card_text
from cornstarch_hf.hub.card_facts import examples

IMAGE = tiny.ENCODERS["clip"][3]
PARTS = {
    "siglip": lambda **more: {"model": tiny.siglip(**more), "processor": tiny.ENCODERS["siglip"][2]()},
    "dino": lambda **more: {"model": tiny.dinov2(hidden_size=12, **more), "processor": tiny.ENCODERS["clip"][2](), "drop_prefix": 1},
    "clip": lambda **more: {"model": tiny.clip(**more), "processor": tiny.ENCODERS["clip"][2](), "drop_prefix": 1, "layer": -2},
}  # fmt: skip
GROUPS = [["siglip", "dino"], ["dino", "siglip"], ["clip", "dino", "siglip"]]


def joined(names, changes=None, projector="mlp", group=None, **more):
    torch.manual_seed(0)
    encoders = {name: PARTS[name]() | (changes or {}).get(name, {}) for name in names}
    group = {"encoders": list(names), "join": "channels"} | (group or {})
    return compose(tiny.llama(), encoders, projector, tokenizer=tiny.tokenizer(), share_inputs=[group], **more)


def packed(first="qwen", **more):
    """Two towers that pack the patches of images of any size, or one beside DINOv2; 2 x 2 patches of 4 pixels are a feature."""
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    towers = {
        "qwen": {"model": tiny.qwen2_vl(hidden_size=24), "processor": tiny.IMAGES["Qwen2VL"](**sizes)},
        "other": {"model": tiny.qwen2_vl(hidden_size=16, patch_size=8, spatial_merge_size=1, seed=1),
                  "processor": tiny.IMAGES["Qwen2VL"](**sizes | {"patch_size": 8, "merge_size": 1})},
    }  # fmt: skip
    names = [first, next(name for name in towers if name != first)]
    group = {"encoders": names, "join": "channels"}
    parts = {name: towers[name] for name in names}
    return compose(tiny.llama(), parts, "mlp", tokenizer=tiny.tokenizer(), share_inputs=[group], **more)


def batch(processor, **options):
    texts = ["<image> a b", "c <image><image>"]
    images = [[IMAGE(0)], [IMAGE(1), IMAGE(2)]]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **options))


def pixels(model, inputs, name):
    return inputs.get(f"{name}_pixel_values")


def by_hand(model, names, inputs):
    """Features of each image: of every tower, side by side, through the projector."""
    columns = []
    for name in names:
        tower = model.encoders[name].module(pixels(model, inputs, name), output_hidden_states=True)
        features = tower.hidden_states[-2] if name == "clip" else tower.last_hidden_state
        columns.append(features if name == "siglip" else features[:, 1:])
    return model.encoders[names[0]].projector.projection(torch.cat(columns, dim=-1))


# ---- equal to what is written by hand


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
@pytest.mark.parametrize(
    "projector", ["linear", "mlp", "pixel_shuffle", {"projection_type": "resampler", "num_queries": 3, "depth": 1}]
)
def test_features_and_logits_are_those_by_hand(names, projector):
    model, processor = joined(names, projector=projector)
    inputs = batch(processor)
    widths = {"siglip": 16, "dino": 12, "clip": 16}
    assert model.encoders[names[0]].projector.config.in_features == sum(widths[name] for name in names)
    model = own_memory(model)
    with torch.no_grad():
        features = by_hand(model, names, inputs)
        output = model(**inputs)
        assert torch.equal(torch.stack(output.image_outputs.pooler_output), features)
        assert torch.equal(
            torch.stack(model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k}).pooler_output),
            features,
        )
        mask = inputs["input_ids"] == model.config.image_token_id
        assert int(mask.sum()) == features.shape[0] * features.shape[1]
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(mask, 0))
        embeds = embeds.masked_scatter(mask[..., None], features)
        expected = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(output.logits, expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest-exact"])
def test_other_grids_are_resampled_onto_the_first_one(mode):
    larger = {"dino": {"model": tiny.dinov2(hidden_size=12, image_size=12), "processor": tiny.IMAGES["CLIP"](size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})}}  # fmt: skip
    model, processor = joined(["siglip", "dino"], larger, group={"resample": mode})
    inputs = batch(processor)
    assert inputs["dino_pixel_values"].shape[-1] == 12
    assert model.config.share_inputs == [{"encoders": ["siglip", "dino"], "join": "channels", "resample": mode}]
    with torch.no_grad():
        here = model.siglip_encoder.module(inputs["siglip_pixel_values"]).last_hidden_state
        there = model.dino_encoder.module(inputs["dino_pixel_values"]).last_hidden_state[:, 1:]
        maps = [item.T.reshape(1, 12, 3, 3) for item in there]
        options = {} if mode == "nearest-exact" else {"align_corners": False}
        maps = [F.interpolate(x.contiguous(), size=(2, 2), mode=mode, **options) for x in maps]
        found = model(**inputs).image_outputs.pooler_output
        for i, item in enumerate(maps):
            features = torch.cat([here[i], item[0].flatten(1).T], dim=-1)
            torch.testing.assert_close(
                found[i], model.siglip_encoder.projector.projection(features), rtol=1e-5, atol=1e-6
            )


def test_bilinear_keeps_a_plane_and_computes_in_float32():
    from cornstarch_hf.encoders.joining import resampled

    plane = torch.arange(4.0)[:, None] + torch.arange(4.0) * 10
    out = resampled(plane.reshape(16, 1), (4, 4), (2, 2), "bilinear").reshape(2, 2)
    assert out.tolist() == [[5.5, 25.5], [7.5, 27.5]]  # means of each block: what lies between the centres
    half = torch.randn(2 * 9, 5, dtype=torch.bfloat16)
    found = resampled(half, (2, 3, 3), (2, 2, 2), "bilinear")
    assert found.dtype == torch.bfloat16 and found.shape == (8, 5)
    assert torch.equal(found, resampled(half.float(), (2, 3, 3), (2, 2, 2), "bilinear").to(torch.bfloat16))


def test_sounds_are_joined_by_their_frames():
    audio = {key: {"model": tiny.wav2vec2(hidden_size=width), "processor": tiny.ENCODERS["wav2vec2"][2]()} for key, width in (("one", 16), ("two", 8))}  # fmt: skip
    torch.manual_seed(0)
    group = [{"encoders": ["one", "two"], "join": "channels"}]
    model, processor = compose(tiny.llama(), audio, tokenizer=tiny.tokenizer(), share_inputs=group)
    sounds = [np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate((900, 500))]
    inputs = processor(
        text=["<audio> a", "<audio> b"], audio=sounds, sampling_rate=16_000, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs).audio_outputs.pooler_output
        for item, sound in zip(found, sounds, strict=True):
            alone = processor(text="<audio>", audio=sound, sampling_rate=16_000, return_tensors="pt")
            towers = [model.encoders[n].module(alone[f"{n}_input_values"]).last_hidden_state for n in audio]
            expected = model.one_encoder.projector.projection(torch.cat(towers, -1))[0]
            torch.testing.assert_close(item, expected, rtol=1e-4, atol=1e-5)


def test_videos_are_joined_frame_by_frame():
    films = {key: PARTS[key]() | {"kind": "video"} for key in ("siglip", "dino")}
    torch.manual_seed(0)
    group = [{"encoders": ["siglip", "dino"], "join": "channels"}]
    model, processor = compose(tiny.llama(), films, tokenizer=tiny.tokenizer(), share_inputs=group)
    film = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    inputs = processor(text="<video> a", videos=film, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 12
    with torch.no_grad():
        (found,) = model(**inputs).video_outputs.pooler_output
        frames = {n: next(v for k, v in inputs.items() if k.startswith(n) and v.ndim == 5)[0] for n in films}
        towers = [model.siglip_encoder.module(frames["siglip"]).last_hidden_state, model.dino_encoder.module(frames["dino"]).last_hidden_state[:, 1:]]  # fmt: skip
        expected = model.siglip_encoder.projector.projection(torch.cat(towers, -1)).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*rows of this batch were longer")
@pytest.mark.parametrize("beside", [False, True])
def test_rows_of_images_that_are_padded_to_the_largest_one_go_in_one_batch(beside):
    """Pixtral's processor pads images of a call to one size, and tells its encoder theirs; alone, and joined to packed patches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
    pixtral = getattr(transformers, f"PixtralImageProcessor{tiny.BACKEND}")(size={"longest_edge": 16}, patch_size=4)
    parts = {"vision": {"model": PixtralVisionModel(PixtralVisionConfig(**sizes)).eval(), "processor": pixtral}}
    if beside:
        options = {"patch_size": 4, "merge_size": 1, "min_pixels": 16, "max_pixels": 256}
        parts["qwen"] = {"model": tiny.qwen2_vl(spatial_merge_size=1), "processor": tiny.IMAGES["Qwen2VL"](**options)}
    group = [{"encoders": list(parts), "join": "channels"}] if beside else None
    model, processor = compose(tiny.llama(), parts, tokenizer=tiny.tokenizer(), share_inputs=group)
    images = [tiny.image(0, (16, 8)), tiny.image(1, (8, 16)), tiny.image(2, (8, 8)), tiny.image(3, (16, 16))]
    rows = [
        {"text": "a <image><image>", "images": [images[0], images[2]]},
        {"text": "a <image> b <image> c", "images": images[1::2]},
    ]
    found = MultimodalCollator(processor, max_length=16, truncation="right")(rows)
    (pixels,) = [value for key, value in found.items() if key.endswith("pixel_values") and value.ndim == 4]
    assert pixels.shape == (3, 3, 16, 16) and found["image_sizes"].tolist() == [[16, 8], [8, 8], [8, 16]]
    media = {key: value for key, value in found.items() if "pixel" in key or "image" in key}
    with torch.no_grad():
        together = model.get_image_features(**media).pooler_output
        for item, image in zip(together, (images[0], images[2], images[1]), strict=True):
            alone = {k: v for k, v in processor(images=image, return_tensors="pt").items() if k in media}
            torch.testing.assert_close(item, model.get_image_features(**alone).pooler_output[0], rtol=1e-4, atol=1e-5)
    assert model(**found).loss.isfinite()


def doubled(inputs, output):
    return BaseModelOutput(last_hidden_state=output.last_hidden_state * 2)


def shifted(inputs, output):
    return BaseModelOutput(last_hidden_state=output.last_hidden_state + 1)


def test_callbacks_of_each_encoder_run_before_the_join():
    register_callback("joining_doubled", doubled)
    register_callback("joining_shifted", shifted)
    names = ["siglip", "dino"]
    changes = {"dino": {"postprocess_module_callback": doubled}, "siglip": {"postprocess_projector_callback": shifted}}
    model, processor = joined(names, changes)
    inputs = batch(processor)
    with torch.no_grad():
        here = model.siglip_encoder.module(inputs["siglip_pixel_values"]).last_hidden_state
        there = model.dino_encoder.module(inputs["dino_pixel_values"]).last_hidden_state[:, 1:] * 2
        expected = model.siglip_encoder.projector.projection(torch.cat([here, there], -1)) + 1
        assert torch.equal(torch.stack(model(**inputs).image_outputs.pooler_output), expected)


# ---- configuration, processing, counting


def test_what_the_configuration_says(tmp_path):
    model, processor = joined(["siglip", "dino"])
    config = model.config
    assert config.joined == {"dino": "siglip"} and config.modalities_of_kind("image") == ["siglip"]
    assert config.dino_modality["shares"] == {"projector": "siglip"} and config.dino_modality["token_id"] is None
    assert config.dino_modality["input_names"] == {}
    assert config.siglip_modality["input_names"]["dino_pixel_values"] == "dino.pixel_values"
    again = MultimodalConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.share_inputs == config.share_inputs and again.joined == config.joined
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).share_inputs == config.share_inputs
    assert processor.image_token == "<image>" and list(processor.tokens) == ["siglip"]
    assert not [key for key in model.state_dict() if key.startswith("dino_encoder.projector")]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"join": "channel"}, "join must be 'channels', got 'channel'"),
        ({"join": None}, "join must be 'channels', got None"),
        ({"axis": 1}, r"no \['axis'\], expected some of \['encoders', 'join', 'resample'\]"),
        ({"resample": "area"}, "resample must be one of .*bilinear.*got 'area'"),
        ({"resample": "linear"}, "resample='linear' is not for items of the kind 'image'"),
        ({"encoders": ["siglip"]}, r"groups of two or more of the modalities \['siglip', 'dino'\]"),
        ({"encoders": ["siglip", "clip"]}, r"groups of two or more of the modalities \['siglip', 'dino'\]"),
        ({"encoders": ["siglip", "siglip"]}, "joins 'siglip' twice"),
        ({"encoders": "siglip"}, "groups of two or more"),
        ({"encoders": ["dino", "siglip"]}, "siglip: it is joined to 'dino', which must come before it"),
    ],
)
def test_groups_that_make_no_sense(group, message):
    with pytest.raises(ValueError, match=message):
        joined(["siglip", "dino"], group=group)


def live(**options):
    return {
        "siglip": ModalEncoderModule(tiny.siglip()),
        "dino": ModalEncoderModule(tiny.dinov2(), drop_prefix=1, **options),
    }


def test_parts_that_cannot_be_joined():
    group = {"share_inputs": [{"encoders": ["siglip", "dino"], "join": "channels"}], "language_model": tiny.llama()}
    own = MultimodalProjector(MultimodalProjectorConfig())
    with pytest.raises(ValueError, match="dino: it has a projector, but its features are joined to those of 'siglip'"):
        MultimodalModel(encoders=live(projector=own), **group)
    with pytest.raises(ValueError, match="dino: it has a projector, but"):
        joined(["siglip", "dino"], {"dino": {"projector": "mlp"}})
    with pytest.raises(ValueError, match="dino: it has a postprocess_projector_callback"):
        MultimodalModel(encoders=live(postprocess_projector_callback=shifted), **group)
    sound = {"siglip": ModalEncoderModule(tiny.siglip()), "dino": ModalEncoderModule(tiny.whisper())}
    with pytest.raises(ValueError, match="different kinds, {'siglip': 'image', 'dino': 'audio'}"):
        MultimodalModel(encoders=sound, **group)
    with pytest.raises(ValueError, match="dino: merge is of features in the language model"):
        MultimodalModel(encoders=live(merge="add"), **group)


def test_a_configuration_that_was_changed_by_hand(tmp_path):
    model, _ = joined(["siglip", "dino"])
    values = model.config.to_dict()
    values["dino_modality"]["shares"] = {}
    values["dino_projector_config"] = values["siglip_projector_config"]
    with pytest.raises(ValueError, match="dino_modality: shares must name 'siglip' for its projector"):
        MultimodalModel(MultimodalConfig.from_dict(values))
    values = model.config.to_dict()
    values["share_inputs"][0]["join"] = "tokens"
    with pytest.raises(ValueError, match="join must be 'channels', got 'tokens'"):
        MultimodalConfig.from_dict(values)


def test_the_second_encoder_has_no_items_and_no_token_of_its_own():
    model, processor = joined(["siglip", "dino"])
    told = "dino: its features are joined to those of 'siglip'"
    inputs = batch(processor)
    pixels = {key: value for key, value in inputs.items() if "pixel" in key}
    features = model.get_image_features(**pixels, modality="siglip")
    with pytest.raises(
        ValueError, match=f"{told}, which has the projector and items of both: name that one, with the inputs"
    ):
        model.get_image_features(**pixels, modality="dino")
    assert model.get_encoder("dino") is model.encoders["dino"].module
    for fails in (
        lambda: processor(text="<image>", dino=IMAGE(0)),
        lambda: processor(text="<image>", encoder_inputs={"dino": {"images": IMAGE(0)}}),
        lambda: model.set_modality_token_ids({"dino": 9}),
        lambda: model.get_image_features(modality="dino", pixel_values=inputs["dino_pixel_values"]),
        lambda: model.get_image_features(inputs["dino_pixel_values"], modality="dino"),
        lambda: model(input_ids=inputs["input_ids"], mm_encoder_outputs={"dino": features}),
        lambda: model.encoders["dino"](pixel_values=inputs["dino_pixel_values"]),
        lambda: MultimodalCollator(processor)([{"text": "<image>", "dino": IMAGE(0)}]),
    ):
        with pytest.raises(ValueError, match=told):
            fails()
    with pytest.raises(
        ValueError, match=r"tokens names \['dino'\], the model has placeholders of the encoders \['siglip'\]"
    ):
        joined(["siglip", "dino"], tokens={"dino": "<d>"})
    del inputs["dino_pixel_values"]
    with pytest.raises(
        ValueError, match="siglip: its features are joined to those of 'dino', of which there are no inputs"
    ):
        model(**inputs)
    with pytest.raises(ValueError, match=r"siglip: got \['dino_pixel_values'\] without 'pixel_values'"):
        model(input_ids=inputs["input_ids"], dino_pixel_values=pixels["dino_pixel_values"])
    inputs = batch(processor)
    inputs["dino_pixel_values"] = inputs["dino_pixel_values"][:2]
    with pytest.raises(ValueError, match="siglip has 3 items, and 'dino', joined to it, has 2"):
        model(**inputs)


def test_grids_that_differ_and_tokens_that_are_left_over_are_refused_before_the_model_runs():
    larger = {
        "dino": {"processor": tiny.IMAGES["CLIP"](size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})}
    }
    model, processor = joined(["siglip", "dino"], larger)
    told = r"siglip.*features are joined by place, but lie in 2 x 2 of 'siglip' and 3 x 3 of 'dino'.*resample"
    with pytest.raises(ValueError, match=told):
        batch(processor)
    inputs = {"siglip_pixel_values": torch.randn(1, 3, 8, 8), "dino_pixel_values": torch.randn(1, 3, 12, 12)}
    with pytest.raises(ValueError, match=told):
        model.get_image_features(**inputs)
    _, processor = joined(["siglip", "dino"], {"dino": {"drop_prefix": 0}})
    with pytest.raises(ValueError, match="dino: .*drop_prefix=1"):
        batch(processor)
    tall = {"siglip_pixel_values": torch.randn(1, 3, 8, 16), "dino_pixel_values": torch.randn(1, 3, 16, 8)}
    with pytest.raises(ValueError, match="siglip.*2 x 4 of 'siglip' and 4 x 2 of 'dino'"):  # as many, elsewhere
        model.get_image_features(
            siglip_pixel_values=tall["siglip_pixel_values"],
            dino_pixel_values=tall["dino_pixel_values"],
            interpolate_pos_encoding=True,
        )


def test_options_reach_the_processor_of_each_encoder():
    _, processor = joined(["siglip", "dino"])
    call = {"text": "<image>", "images": IMAGE(0), "return_tensors": "pt"}
    plain = processor(**call)
    scaled = processor(**call, dino_kwargs={"do_normalize": False})
    assert torch.equal(scaled["siglip_pixel_values"], plain["siglip_pixel_values"])
    assert not torch.equal(scaled["dino_pixel_values"], plain["dino_pixel_values"])
    both = processor(**call, do_normalize=False)
    assert torch.equal(both["dino_pixel_values"], scaled["dino_pixel_values"])
    assert not torch.equal(both["siglip_pixel_values"], plain["siglip_pixel_values"])
    with pytest.raises(TypeError, match="dino: .*takes no option"):
        processor(**call, dino_kwargs={"nonsense": 1})


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_tensors_that_are_processed_already_are_given_for_all_encoders_of_a_group(names):
    _, processor = joined(names)
    wanted = batch(processor)
    made = processor(images=[IMAGE(i) for i in range(3)], return_tensors="pt")  # without a text, once
    alone = {n: processor.processors[n]([IMAGE(i) for i in range(3)], return_tensors="pt") for n in names}
    call = {"text": ["<image> a b", "c <image><image>"], "padding": True, "return_tensors": "pt"}
    for given in (
        alone,
        dict(reversed(alone.items())),
        {names[0]: made},
        {n: {f"{n}_pixel_values": made[f"{n}_pixel_values"]} for n in names},
        {n: {"pixel_values": made[f"{n}_pixel_values"].tolist()} for n in names},
    ):
        found = processor(**call, encoder_inputs=given)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    for lacking in names:
        given = {n: alone[n] for n in names if n != lacking}
        told = rf"{names[0]}: the features of .* are joined, and encoder_inputs has no tensors of \['{lacking}'\]: give those"
        with pytest.raises(ValueError, match=told):
            processor(**call, encoder_inputs=given)
    fewer = {names[-1]: {"pixel_values": alone[names[-1]]["pixel_values"][:2]}}
    with pytest.raises(ValueError, match=f"{names[0]} has 3 items, and '{names[-1]}', joined to it, has 2"):
        processor(**call, encoder_inputs=alone | fewer)
    with pytest.raises(TypeError, match=rf"{names[-1]}: its encoder takes no tensors \['pixels'\]"):
        processor(**call, encoder_inputs=alone | {names[-1]: {"pixels": made[f"{names[-1]}_pixel_values"]}})
    with pytest.raises(
        ValueError, match=rf"{names[0]}: its tensors are processed already, so that \['{names[-1]}.do_normalize'\]"
    ):
        processor(**call, encoder_inputs=alone, **{f"{names[-1]}_kwargs": {"do_normalize": False}})
    with pytest.raises(TypeError, match=rf"{names[-1]}: \w+ takes no option \['pixel_values'\]"):
        processor(**call, images=[[IMAGE(0)], [IMAGE(1), IMAGE(2)]], encoder_inputs={names[-1]: alone[names[-1]]})
    with pytest.raises(ValueError, match=rf"{names[-1]}: encoder_inputs has nothing for it"):
        processor(**call, encoder_inputs=alone | {names[-1]: {}})


PLACES = [tiny.image(0, (16, 8)), tiny.image(1, (24, 16)), tiny.image(2, (8, 32))]  # of 2, 6 and 4 features


@pytest.mark.parametrize("first", ["qwen", "other"])
def test_packed_patches_of_both_encoders_are_joined_and_given(first):
    model, processor = packed(first)
    call = {"text": "<image> <image><image>", "return_tensors": "pt"}
    wanted = processor(**call, images=PLACES)
    alone = {name: own(PLACES, return_tensors="pt") for name, own in processor.processors.items()}
    found = processor(**call, encoder_inputs=alone)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    with torch.no_grad():
        columns = [model.encoders[n].module(*(wanted[f"{n}_{key}"] for key in ("pixel_values", "image_grid_thw"))).pooler_output for n in model.encoders]  # fmt: skip
        expected = model.encoders[first].projector.projection(torch.cat(columns, -1)).split([2, 6, 4])
        for item, there in zip(model(**wanted).image_outputs.pooler_output, expected, strict=True):
            assert torch.equal(item, there)


@pytest.mark.filterwarnings("ignore:.*rows of this batch were longer")
@pytest.mark.parametrize("first", ["qwen", "other"])
@pytest.mark.parametrize(("side", "kept"), [("right", 0), ("left", 1)])
def test_a_row_that_is_cut_keeps_the_patches_of_whole_items_for_both_encoders(first, side, kept):
    model, processor = packed(first)
    rows = [{"text": "a <image> b <image> c", "images": PLACES[:2]}, {"text": "a <image> b", "images": PLACES[2:]}]
    found = MultimodalCollator(processor, max_length=9, truncation=side)(rows)
    whole = processor(text="<image><image>", images=[PLACES[kept], PLACES[2]], return_tensors="pt")
    media = {key: value for key, value in found.items() if "image" in key or "pixel" in key}
    assert media.keys() == {f"{n}_{key}" for n in ("qwen", "other") for key in ("pixel_values", "image_grid_thw")}
    assert all(torch.equal(value, whole[key]) for key, value in media.items())
    assert model(**found).loss.isfinite()


@pytest.mark.parametrize("names", [["siglip", "dino"], ["dino", "siglip"]], ids="+".join)
def test_what_an_encoder_is_told_besides_is_said_to_any_of_a_group(names):
    """SigLIP takes images of another size where it is told so; DINOv2 takes any."""
    size = {"size": {"height": 12, "width": 12}}
    changes = {
        "siglip": {"processor": tiny.IMAGES["Siglip"](**size)},
        "dino": {"processor": tiny.IMAGES["CLIP"](**size, do_center_crop=False)},
    }
    model, processor = joined(names, changes)
    call, told = {"text": "<image>", "return_tensors": "pt"}, {"interpolate_pos_encoding": True}
    with pytest.raises(
        ValueError, match="SiglipVisionModel takes pixel_values of 3 x 8 x 8, got 3 x 12 x 12.*siglip_kwargs="
    ):
        processor(**call, images=IMAGE(0))
    wanted = processor(**call, images=IMAGE(0), siglip_kwargs=told)
    assert int((wanted["input_ids"] == model.config.image_token_id).sum()) == 9
    assert model(**wanted, **told).logits.isfinite().all()
    alone = {name: own(IMAGE(0), return_tensors="pt") for name, own in processor.processors.items()}
    with pytest.raises(ValueError, match="SiglipVisionModel takes pixel_values of 3 x 8 x 8, got 3 x 12 x 12"):
        processor(**call, encoder_inputs=alone)
    for found in (
        processor(**call, encoder_inputs=alone, siglip_kwargs=told),
        processor(**call, encoder_inputs=alone | {"siglip": {**alone["siglip"], **told}}),
        processor(**call, images=IMAGE(0), encoder_inputs={"siglip": told}),
    ):
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    for options, count in (
        ({"siglip_kwargs": told}, 9),
        ({f"{n}_kwargs": {"size": {"height": 8, "width": 8}} for n in names}, 4),
    ):
        assert processor._get_num_multimodal_tokens(image_sizes=[(30, 20)], **options)["num_image_tokens"] == [count]


def test_sizes_and_names_that_clients_ask_for():
    model, processor = joined(["siglip", "dino"])
    assert processor._get_num_multimodal_tokens(image_sizes=[(8, 8), (30, 20)])["num_image_tokens"] == [4, 4]
    assert {"siglip_pixel_values", "dino_pixel_values"} <= set(processor.model_input_names)
    assert processor.image_processor is processor.processors["siglip"]
    assert "joined to those of siglip" in model.describe()


def test_a_conversation_has_one_placeholder_for_each_item():
    model, processor = joined(["siglip", "dino"])
    content = [{"type": "image", "image": IMAGE(0)}, {"type": "text", "text": "what"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4
    assert model(**inputs).logits.isfinite().all()
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a b"}]}] * 2
    found = MultimodalCollator(processor)(rows)
    assert found["dino_pixel_values"].shape == found["siglip_pixel_values"].shape == (2, 3, 8, 8)
    assert model(**found).loss.isfinite()


# ---- generation, training, saving


def test_generation_runs_each_tower_once():
    model, processor = joined(["siglip", "dino"])
    inputs, calls = batch(processor), []
    for name, encoder in model.encoders.items():
        encoder.module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}):
        calls.clear()
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        assert calls == ["siglip", "dino"] and len(tokens) == 2 * options.get("num_return_sequences", 1)
    with torch.no_grad():
        given = {"siglip": model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k})}
        text = {k: v for k, v in inputs.items() if "pixel" not in k}
        assert torch.equal(model(**text, mm_encoder_outputs=given).logits, model(**inputs).logits)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_both_towers_and_each_is_frozen_by_name():
    model, processor = joined(["siglip", "dino"])
    inputs = batch(processor)
    model.train()
    plain = gradients(model, inputs)
    for part in ("siglip_encoder.module", "dino_encoder.module", "siglip_encoder.projector"):
        assert [key for key, value in plain.items() if key.startswith(part) and value.abs().sum() > 0]
    model.gradient_checkpointing_enable()
    again = gradients(model, inputs)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)
    model.freeze("dino_encoder")
    assert {key.split(".")[0] for key in gradients(model, inputs)} == {"siglip_encoder", "language_model"}
    model.unfreeze()
    model.train(encoders_mode={"siglip": (False, True), "dino": (True, True)}, llm_mode=False)
    assert {".".join(key.split(".")[:2]) for key in gradients(model, inputs)} == {
        "siglip_encoder.projector",
        "dino_encoder.module",
    }
    for modes in ({"siglip": (False, True), "dino": (True, False)}, {"dino": (True, True)}):
        with pytest.raises(ValueError, match="'dino'.*its projector is that of 'siglip', of which say the same"):
            model.train(encoders_mode=modes)


@pytest.mark.parametrize("frozen", [["siglip_encoder"], ["dino_encoder"]])
def test_a_step_without_an_image_runs_both_towers(monkeypatch, frozen):
    model, _ = joined(["siglip", "dino"])
    monkeypatch.setattr(stand_ins, "together", lambda: True)
    model.freeze(*frozen)
    model.train()
    calls = []
    for name, encoder in model.encoders.items():
        encoder.module.register_forward_hook(lambda *_, name=name: calls.append(name))
    ids = torch.tensor([[5, 6, 7]])
    found = gradients(model, {"input_ids": ids})
    assert calls == ["siglip", "dino"]
    trains = {"siglip_encoder", "dino_encoder"} - set(frozen)
    own = {key: value for key, value in found.items() if "encoder" in key}
    assert {key.split(".")[0] for key in own} == trains and all(not value.any() for value in own.values())


def test_a_step_of_trainer_moves_both_towers(tmp_path):
    model, processor = joined(["siglip", "dino"])
    rows = [{"text": "<image> a b", "images": [IMAGE(i)]} for i in range(2)]
    before = copy.deepcopy(model.state_dict())
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "remove_unused_columns": False, "learning_rate": 0.1}
    Trainer(
        model, TrainingArguments(tmp_path, **options), train_dataset=rows, data_collator=MultimodalCollator(processor)
    ).train()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"siglip_encoder", "dino_encoder", "language_model"}


@pytest.mark.parametrize("names", GROUPS[1:], ids="+".join)
def test_it_comes_back_by_auto_classes(tmp_path, names):
    model, processor = joined(names)
    model.freeze("dino_encoder.module")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    inputs = batch(loaded)
    assert all(torch.equal(value, inputs[key]) for key, value in batch(processor).items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.joined == model.config.joined and again.encoders["dino"].join is not None
    assert not any(p.requires_grad for p in again.encoders["dino"].module.parameters())
    check_comes_back(model, again, inputs, max_new_tokens=3, do_sample=False)


def test_a_copy_and_a_resized_model_are_joined_within_themselves():
    model, processor = joined(["siglip", "dino"])
    inputs = batch(processor)
    again = copy.deepcopy(model)
    assert again.siglip_encoder.join.others["dino"] is again.dino_encoder
    with torch.no_grad():
        assert torch.equal(own_memory(again)(**inputs).logits, own_memory(model)(**inputs).logits)
        again.resize_token_embeddings(350)
        assert again(**inputs).logits.shape[-1] == 350


def moved(model):
    """With other values where it trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", r".*(siglip|dino)_encoder\.module.*(query|value|q_proj|v_proj)"])
@pytest.mark.parametrize("saved", ["projector", "siglip_encoder.projector"])
def test_adapters_around_all_of_it_train_and_come_back(tmp_path, targets, saved):
    model, processor = joined(["siglip", "dino"])
    model.save_pretrained(tmp_path / "base")
    inputs = batch(processor)
    options = LoraConfig(r=2, target_modules=targets, modules_to_save=[saved], task_type="CAUSAL_LM")
    adapted = moved(get_peft_model(model, options)).train()
    adapted(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()]
    for part in ("siglip_encoder.module", "dino_encoder.module", "siglip_encoder.projector.modules_to_save"):
        assert [name for name in trained if part in name]
    adapted.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(MultimodalModel.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    check_comes_back(adapted.eval(), again.eval(), inputs)
    merged = adapted.merge_and_unload()
    assert merged.siglip_encoder.join.others == {"dino": merged.dino_encoder}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, again(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [["siglip"], ["dino"], ["siglip", "dino", "language_model"]], ids="+".join)
def test_adapters_around_parts_are_stored_with_them(tmp_path, wrapped):
    def part(name, made):
        targets = ["q_proj", "v_proj", "query", "value"]
        return moved(get_peft_model(made, LoraConfig(r=2, target_modules=targets))) if name in wrapped else made

    torch.manual_seed(0)
    names = ["siglip", "dino"]
    encoders = {name: (made := PARTS[name]()) | {"model": part(name, made["model"])} for name in names}
    group = {"encoders": names, "join": "channels"}
    text = part("language_model", tiny.llama())
    model, processor = compose(text, encoders, "mlp", tokenizer=tiny.tokenizer(), share_inputs=[group])
    inputs = batch(processor)
    plain = gradients(model.train(), inputs)
    assert {key.split(".")[0] for key in plain if "lora" in key} == {
        name if name == "language_model" else f"{name}_encoder" for name in wrapped
    }
    model.gradient_checkpointing_enable()
    again = gradients(model, inputs)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_comes_back(model, loaded, inputs, max_new_tokens=3, do_sample=False)
    trains = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (model, loaded)]
    assert trains[0] == trains[1]


def test_embeddings_of_placeholders_and_beams_without_a_cache_give_the_same():
    model, processor = joined(["siglip", "dino"])
    model = own_memory(model)
    inputs = batch(processor)
    ids = inputs.pop("input_ids")
    embeds, options = model.get_input_embeddings()(ids), {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, model(input_ids=ids, **inputs).logits)
    for more in ({}, {"num_beams": 3}):
        tokens = model.generate(input_ids=ids, **inputs, **options, **more)
        assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **options, **more), tokens[:, ids.shape[1] :])
        assert torch.equal(model.generate(input_ids=ids, **inputs, **options, **more, use_cache=False), tokens)


@pytest.mark.parametrize("part", ["siglip_encoder", "dino_encoder"])
def test_a_part_that_is_put_in_the_place_of_one_is_the_one_that_runs(part):
    """The first encoder of a group runs the others: those that the model has now, and not those that it was composed of."""
    model, processor = joined(["siglip", "dino"])
    inputs = batch(processor)
    other = copy.deepcopy(getattr(model, part))
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(0.1)
    setattr(model, part, other)
    assert model.siglip_encoder.join.others == {"dino": model.dino_encoder}
    assert model.dino_encoder.projector is model.siglip_encoder.projector
    with pytest.raises(
        TypeError, match=f"{part} must be a ModalEncoderModule, got .*: put a tower in model.{part}.module"
    ):
        setattr(model, part, getattr(model, part).module)
    model = own_memory(model)
    with torch.no_grad():
        found = model(**inputs).image_outputs.pooler_output
        assert torch.equal(torch.stack(found), by_hand(model, ["siglip", "dino"], inputs))
    calls = []
    setattr(
        model, part, torch.compile(getattr(model, part), backend=lambda graph, _: calls.append(part) or graph.forward)
    )
    again = model(**inputs).image_outputs.pooler_output
    assert calls and all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_another_group_may_share_its_items():
    torch.manual_seed(0)
    parts = {name: PARTS[name]() for name in ("siglip", "dino", "clip")}
    groups = [{"encoders": ["siglip", "dino"], "join": "channels"}, ["siglip", "clip"]]
    model, processor = compose(tiny.llama(), parts, tokenizer=tiny.tokenizer(), share_inputs=groups)
    inputs = processor(text="<siglip><clip>", images=IMAGE(0), return_tensors="pt")
    assert {"siglip_pixel_values", "dino_pixel_values", "clip_pixel_values"} <= set(inputs)
    assert model(**inputs).logits.isfinite().all()


def test_the_card_tells_of_one_projector():
    model, processor = joined(["siglip", "dino"])
    text = card_text(model, processor)
    chart = text[text.index("flowchart LR") : text.index("```", text.index("flowchart LR"))]
    assert (
        chart.count("projector") == 1
        and chart.count("Model<br/>") == 0
        and chart.count("SiglipVisionModel") == chart.count("Dinov2Model") == 1
        and "joined to those of siglip" in text
    )
    assert len(examples(model, processor).parts) == 1 and '"type": "image"' in examples(model, processor).parts[0]


# ---- DeepSeek-VL's hybrid aligner: what of it a join along the channels expresses


def halves(width, other, hidden):
    """Its aligner, random: each tower's features through a layer of their own, high resolution first, then one projection."""
    config = DeepseekVLHybridConfig(
        vision_config={"hidden_size": width}, high_res_vision_config={"output_channels": other // 4}, text_config={"hidden_size": hidden},
    )  # fmt: skip
    return randomized(DeepseekVLHybridAligner(config))


def test_the_aligner_of_deepseek_vl_hybrid_is_one_mlp_of_joined_features():
    """Two layers and a concatenation are one layer with blocks of zeros: equal but for rounding, since sums have other terms."""
    aligner = halves(16, 12, 32)
    (low, high), proj = (aligner.vision_proj, aligner.high_res_vision_proj), aligner.proj
    model, processor = joined(["siglip", "dino"])
    first, _, last = model.siglip_encoder.projector.projection
    with torch.no_grad():
        # Columns of the first encoder's features (siglip, 16) and of the second one's (dino, 12); rows as the aligner has them.
        first.weight.copy_(
            torch.cat(
                [torch.cat([torch.zeros(16, 16), high.weight], 1), torch.cat([low.weight, torch.zeros(16, 12)], 1)]
            )
        )
        first.bias.copy_(torch.cat([high.bias, low.bias]))
        last.load_state_dict(proj.state_dict())
        inputs = batch(processor)
        here = model.siglip_encoder.module(inputs["siglip_pixel_values"]).last_hidden_state
        there = model.dino_encoder.module(inputs["dino_pixel_values"]).last_hidden_state[:, 1:]
        found = torch.stack(model(**inputs).image_outputs.pooler_output)
        torch.testing.assert_close(found, aligner(here, there), rtol=1e-5, atol=1e-5)


def test_the_native_aligner_as_the_projector_of_joined_features_is_equal_to_the_bit():
    aligner = halves(16, 12, 32)
    settings = {"vision_config": {"hidden_size": 16}, "high_res_vision_config": {"output_channels": 3}, "text_config": {"hidden_size": 32}}  # fmt: skip
    fields = {"projection_type": "native", "native_type": "deepseek_vl_hybrid", "settings": settings, "in_features": 28, "out_features": 32}  # fmt: skip
    model, processor = joined(["siglip", "dino"], projector=fields)
    model.siglip_encoder.projector.projection.module.load_state_dict(aligner.state_dict())
    inputs, model, aligner = batch(processor), own_memory(model), own_memory(aligner)
    with torch.no_grad():
        here = model.siglip_encoder.module(inputs["siglip_pixel_values"]).last_hidden_state
        there = model.dino_encoder.module(inputs["dino_pixel_values"]).last_hidden_state[:, 1:].contiguous()
        assert torch.equal(torch.stack(model(**inputs).image_outputs.pooler_output), aligner(here, there))


@pytest.mark.parametrize("name", ["dino", "siglip"])
def test_an_encoder_of_no_group_is_not_put_in_the_place_of_one_that_is_joined(name):
    model = joined(["siglip", "dino"])[0]
    old = getattr(model, f"{name}_encoder")
    with pytest.raises(
        ValueError, match=f"{name}_encoder: its features are joined in the group of 'siglip'.*copy.deepcopy"
    ):
        setattr(model, f"{name}_encoder", ModalEncoderModule(old.module, old.projector))
    setattr(model, f"{name}_encoder", copy.deepcopy(old))


def test_an_encoder_without_a_projector_is_not_put_in_the_place_of_another():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    with pytest.raises(
        ValueError,
        match=r"vision_encoder has no projector: ModalEncoderModule\(tower, model.vision_encoder.projector\)",
    ):
        model.vision_encoder = ModalEncoderModule(tiny.clip())
    model.vision_encoder = ModalEncoderModule(tiny.clip(), model.vision_encoder.projector)
