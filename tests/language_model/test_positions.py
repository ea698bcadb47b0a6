"""Positions by the grids of items: equal to native models in calls, steps, beams, chunks and continued chats."""

import copy
import json
import types as python_types
from typing import ClassVar

import catalog_llms
import native_models
import pytest
import tiny
import torch
from native_models import IMAGE, RULES, VIDEO
from own_memory import check_comes_back
from transformers import AutoModel, DynamicCache
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLModel

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalConfig,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    register_position_rule,
)
from cornstarch_hf.language_model.position_rules import PositionQuery, counted, mrope, xdrope
from cornstarch_hf.parts.registries import POSITION_RULES
from cornstarch_hf.parts.versions import CACHE

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
IMAGES_ALONE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm46v"]
WITH_VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]  # GLM has one placeholder for both
CASES = [(name, False) for name in IMAGES_ALONE] + [(name, True) for name in WITH_VIDEO]


@pytest.fixture(scope="module")
def sides():
    """A function that gives a native model, the composition of its parts, and a batch for both."""
    made = {}

    def of(model_type, video=False):
        if (model_type, video) not in made:
            native = native_models.native(model_type)
            apart = RULES[model_type]["positions"].get("frames_apart", False)
            inputs = native_models.video_inputs(native, apart) if video else native_models.image_inputs(native)
            if video and model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.3])
            made[model_type, video] = native, native_models.compose(native, video), inputs
        return made[model_type, video]

    return of


def attended(logits, inputs):
    return logits[inputs["attention_mask"].bool()]


def generated(model, inputs, **options):
    return model.generate(**inputs, **GREEDY | options)


@pytest.mark.parametrize("model_type, video", CASES)
def test_logits_and_tokens_are_those_of_the_native_model(sides, model_type, video):
    native, model, inputs = sides(model_type, video)
    with torch.no_grad():
        expected, found = native(**inputs).logits, model(**inputs).logits
    assert torch.equal(attended(found, inputs), attended(expected, inputs))
    without = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}  # told by the placeholders
    assert torch.equal(attended(model(**without).logits, inputs), attended(found, inputs))
    assert torch.equal(generated(model, inputs), generated(native, inputs))
    model.config.positions, rule = None, model.config.positions
    plain = model(**without).logits
    model.config.positions = rule
    assert not torch.equal(attended(plain, inputs), attended(found, inputs))  # or else nothing was shown


@pytest.mark.parametrize(
    "model_type, video", [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("glm4v", False)]
)
def test_gradients_are_those_of_the_native_model(sides, model_type, video):
    native, model, inputs = sides(model_type, video)
    native, model = copy.deepcopy(native).train(), copy.deepcopy(model).train()
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["mm_token_type_ids"] > 0), -100)
    for each in (native, model):
        each(**inputs, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in native.model.language_model.named_parameters()}
    found = {name: p.grad for name, p in model.language_model.model.named_parameters()}
    assert all(torch.equal(found[name], grad) for name, grad in expected.items() if grad is not None)
    if not video:  # else each has a copy of the tower
        tower = dict(model.image_encoder.module.named_parameters())
        grads = {name: p.grad for name, p in native.model.visual.named_parameters() if p.grad is not None}
        assert grads and all(torch.equal(tower[name].grad, grad) for name, grad in grads.items())


@pytest.mark.parametrize(
    "model_type, video", [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("qwen3_vl", True)]
)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 7}, {"use_cache": False}],
    ids=lambda options: "-".join(map(str, options.items())),
)
def test_strategies_give_the_tokens_of_the_native_model(sides, model_type, video, options):
    native, model, inputs = sides(model_type, video)
    assert torch.equal(generated(model, inputs, **options), generated(native, inputs, **options))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_static_caches_and_assistants_give_the_tokens_of_the_native_model(sides, model_type):
    native, model, inputs = sides(model_type)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generated(model, inputs, **static), generated(native, inputs, **static))
    first = {key: value[:1] for key, value in inputs.items() if key not in ("pixel_values", "image_grid_thw")}
    first |= {"pixel_values": inputs["pixel_values"][:96], "image_grid_thw": inputs["image_grid_thw"][:1]}
    expected = generated(native, first)
    assert torch.equal(generated(model, first, assistant_model=copy.deepcopy(model)), expected)
    assert torch.equal(generated(model, first, prompt_lookup_num_tokens=3), expected)


def chat(model, inputs, more, media):
    """Tokens of two turns with one cache: the second goes on behind the first one's answer."""
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache = first[CACHE]
    answer = first.sequences
    ids = torch.cat([answer, more], 1)
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1]).long()], 1
    )
    second = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": native_models.types(ids)} | media
    return model.generate(**second, **GREEDY, **{CACHE: cache})


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_chat_goes_on_with_the_cache_as_in_the_native_model(sides, model_type):
    native, model, inputs = sides(model_type)
    inputs = {key: value for key, value in inputs.items() if key not in ("pixel_values", "image_grid_thw")}
    inputs = {key: value[:1] for key, value in inputs.items()}
    pixels, grids = sides(model_type)[2]["pixel_values"], sides(model_type)[2]["image_grid_thw"]
    first = inputs | {"pixel_values": pixels[:96], "image_grid_thw": grids[:1]}
    words = torch.tensor([[9, 10, 11]])
    expected = chat(native, first, words, {})
    assert torch.equal(chat(model, first, words, {}), expected)
    picture = torch.tensor([[9, *[IMAGE] * 8, 10, 11]])
    both = {"pixel_values": pixels[:128], "image_grid_thw": grids[:2]}
    fresh = native.generate(
        **chat_inputs(native, first, picture), **both, **GREEDY
    )  # of the whole prompt, without a cache
    assert torch.equal(chat(model, first, picture, both), fresh)
    assert torch.equal(
        chat(model, first, picture, {"pixel_values": pixels[96:128], "image_grid_thw": grids[1:2]}), fresh
    )


def chat_inputs(native, first, more):
    ids = torch.cat([native.generate(**first, **GREEDY), more], 1)
    mask = torch.cat(
        [first["attention_mask"], torch.ones(1, ids.shape[1] - first["attention_mask"].shape[1]).long()], 1
    )
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": native_models.types(ids)}


def test_a_prefilled_cache_is_gone_on_with_and_one_that_was_cut_is_not(sides):
    _, model, inputs = sides("qwen2_vl")
    whole = generated(model, inputs)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    cut = inputs | {key: inputs[key][:, :-2] for key in (*text, "mm_token_type_ids")}
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**cut, **{CACHE: cache}, use_cache=True)
    assert torch.equal(model.generate(**text, **GREEDY, **{CACHE: copy.deepcopy(cache)}), whole)
    start = int(inputs["attention_mask"][1].argmax())  # behind the padding
    one = {key: value[1:2, start:] for key, value in inputs.items() if key in (*text, "mm_token_type_ids")}
    one |= {"pixel_values": inputs["pixel_values"][96:], "image_grid_thw": inputs["image_grid_thw"][1:]}
    cache = model.generate(**one, **GREEDY, return_dict_in_generate=True)[CACHE]
    between = one["input_ids"][0].tolist().index(IMAGE) + 9  # of two images
    cache.crop(between - cache.get_seq_length())
    with pytest.raises(ValueError, match=rf"was cut to {between} tokens, before the last feature"):
        model.generate(**one, **GREEDY, **{CACHE: cache})
    foreign = DynamicCache(config=model.config.text_config)
    model.language_model(input_ids=inputs["input_ids"][:, :2], **{CACHE: foreign}, use_cache=True)
    with pytest.raises(ValueError, match="the cache was not filled by this model"):
        model.generate(**inputs, **GREEDY, **{CACHE: foreign})


def test_a_step_by_hand_with_a_cache_says_which_positions_it_needs(sides):
    _, model, inputs = sides("qwen2_vl")
    prefill = model(**inputs, use_cache=True)
    cache = prefill[CACHE]
    step = {"input_ids": torch.tensor([[5], [6], [7]])}
    with pytest.raises(ValueError, match=r"position_ids are needed with a cache \(\d+ tokens\).*axes, batch, 1\)"):
        model(**step, **{CACHE: cache})
    positions = torch.full((3, 3, 1), 40)
    assert model(**step, position_ids=positions, **{CACHE: cache}).logits.shape[:2] == (3, 1)


def test_features_of_encoders_that_ran_before_keep_their_grids(sides):
    _, model, inputs = sides("qwen2_vl")
    media = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    output = model.get_image_features(**media)
    assert output.feature_grids.tolist() == [[1, 4, 6], [1, 2, 4], [1, 4, 2]]
    with torch.no_grad():
        found = model(**text, mm_encoder_outputs={"image": output}).logits
        assert torch.equal(found, model(**inputs).logits)
    bare = type(output)(pooler_output=output.pooler_output)
    with pytest.raises(ValueError, match=r"image: positions need the grid of each item.*get_image_features\(\)"):
        model(**text, mm_encoder_outputs={"image": bare})


def test_runs_that_no_grids_fill_are_refused_with_both_numbers(sides):
    _, model, inputs = sides("qwen2_vl")
    ids = inputs["input_ids"].clone()
    row = ids[1].tolist()
    place = row.index(IMAGE)
    row[place + 7], row[place + 8] = row[place + 8], IMAGE  # a word among the features of an image
    ids[1] = torch.tensor(row)
    wrong = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"} | {"input_ids": ids}
    with pytest.raises(ValueError, match=r"image, sample 1: a run of 7 placeholder tokens.*8 features.*1 x 2 x 4"):
        model(**wrong)
    with pytest.raises(ValueError, match=r"image, sample 1: a run of 7 placeholder tokens"):
        model.generate(**wrong, **GREEDY)


def test_type_ids_are_checked(sides):
    _, model, inputs = sides("qwen2_vl")
    marked = inputs["mm_token_type_ids"].clone()
    marked[1, -1] = 1
    with pytest.raises(
        ValueError, match=r"mm_token_type_ids, sample 1: 17 tokens are marked, but 16 are placeholders \(1 "
    ):
        model(**inputs | {"mm_token_type_ids": marked})
    with pytest.raises(ValueError, match="mm_token_type_ids, sample 0: 24 tokens are marked, but 24 are placeholders"):
        model.generate(**inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"] * 2}, **GREEDY)


@pytest.mark.parametrize("model_type, video", [("qwen2_vl", False), ("qwen2_5_vl", True)])
def test_rules_come_back_with_the_checkpoint(sides, tmp_path, model_type, video):
    _, model, inputs = sides(model_type, video)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.config.positions == model.config.positions
    check_comes_back(copy.deepcopy(model), again, inputs, **GREEDY)


def test_right_padded_rows_and_text_alone_are_numbered_as_in_the_native_model(sides):
    native, model, inputs = sides("qwen2_vl")
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    assert torch.equal(model(**text).logits, native(**text).logits)
    assert torch.equal(generated(model, text), generated(native, text))
    pad = (inputs["attention_mask"] == 0).sum(-1)
    right = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        right[key] = torch.stack([row.roll(-int(n)) for row, n in zip(inputs[key], pad, strict=True)])
    with torch.no_grad():
        assert torch.equal(attended(model(**right).logits, right), attended(native(**right).logits, right))


# ---- the rules themselves


def query(kinds, grids, *, valid=None, seconds=None, start=0, past=0, names=("image", "video")):
    types = torch.tensor(kinds)
    valid = torch.ones_like(types).bool() if valid is None else torch.tensor(valid).bool()
    return PositionQuery(types, valid, torch.full((len(types),), start), names, grids, seconds or {}, past=past)


def test_mrope_numbers_text_on_behind_the_longer_side_of_an_item():
    found = mrope(query([[0, 1, 1, 1, 1, 1, 1, 0]], {"image": [(1, 2, 3)]}))
    assert found[:, 0].tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


def test_mrope_leaves_padding_at_zero_and_begins_behind_a_cache():
    found = mrope(query([[0, 0, 1, 0]], {"image": [(1, 1, 1)]}, valid=[[0, 1, 1, 1]], start=7))
    assert found[:, 0].tolist() == [[0, 7, 8, 9]] * 3


def test_items_side_by_side_fill_one_run():
    found = mrope(query([[1, 1, 1, 0]], {"image": [(1, 1, 1), (1, 1, 2)]}))
    assert found[:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("apart", [True, False])
def test_frames_are_one_run_or_apart(apart):
    grids = {"video": [(2, 1, 1)]}
    kinds = [[2, 0, 2, 0]] if apart else [[2, 2, 0, 0]]
    found = mrope(query(kinds, grids), frames_apart=apart)[:, 0].tolist()
    assert found[0] == ([0, 1, 2, 3] if apart else [0, 1, 1, 2])
    with pytest.raises(ValueError, match="video, sample 0: a run of"):
        mrope(query([[2, 0, 2, 0]], grids), frames_apart=False)


def test_seconds_move_the_time_of_frames():
    found = mrope(query([[2, 2, 2]], {"video": [(3, 1, 1)]}, seconds={"video": [0.5]}), time_step={"video": 5})
    assert found[0, 0].tolist() == [0, 2, 5]  # rounded down
    with pytest.raises(ValueError, match=r"time_step names \['film'\].*\['image', 'video'\]"):
        mrope(query([[0]], {}), time_step={"film": 2})
    with pytest.raises(ValueError, match='"mrope" has 3 axes, got axes=4'):
        mrope(query([[0]], {}), axes=4)


@pytest.mark.parametrize("around", [0, 2])
@pytest.mark.parametrize("axes", [3, 4])
def test_xdrope_numbers_as_hunyuan_does(around, axes):
    span = 2 * 4 + around  # two rows of three and a newline
    ids = torch.tensor([[5, 6, *[9] * span, 7], [*[9] * span, 5, 6, 7]])
    rope = {"mrope_section": [2] * axes}
    vision = python_types.SimpleNamespace(spatial_merge_size=2)
    config = python_types.SimpleNamespace(
        text_config=python_types.SimpleNamespace(rope_parameters=rope), vision_config=vision
    )
    native = python_types.SimpleNamespace(config=config)
    native.get_vision_position_ids = lambda *args, **kwargs: HunYuanVLModel.get_vision_position_ids(
        native, *args, **kwargs
    )
    expected, _ = HunYuanVLModel.get_rope_index(native, ids, (ids == 9).long(), torch.tensor([[1, 4, 6]] * 2))
    assert torch.equal(xdrope(query((ids == 9).long().tolist(), {"image": [(1, 2, 3)] * 2}), axes=axes), expected)


def test_xdrope_refuses_what_it_cannot_number():
    with pytest.raises(ValueError, match="image, sample 0: a run of 3 placeholder tokens, but the grid 2 x 3"):
        xdrope(query([[1, 1, 1]], {"image": [(1, 2, 3)]}))
    with pytest.raises(ValueError, match="numbers images from the start"):
        xdrope(query([[1]], {"image": [(1, 1, 1)]}, past=3))
    with pytest.raises(ValueError, match="3 to 16 axes, got axes=2"):
        xdrope(query([[0]], {}), axes=2)


def test_plain_positions_may_count_from_one():
    assert counted(query([[0, 0, 0]], {}, past=2), first=1).tolist() == [[3, 4, 5]]


# ---- rules of users


def doubled(query, *, by=2):
    """Every token is `by` places behind the one before."""
    return counted(query) * by


def test_a_users_rule_is_followed():
    doubled.numbers_text, doubled.needs_grids = True, False
    register_position_rule("test_doubled", doubled)
    try:
        encoders = {"vision": ModalEncoderModule(tiny.clip())}
        model = MultimodalModel(
            encoders=encoders, language_model=tiny.llama(), positions={"rule": "test_doubled", "by": 3}
        )
        ids = torch.tensor([[5, 6, 7, 8]])
        positions = torch.tensor([[0, 3, 6, 9]])
        expected = model.language_model(input_ids=ids, position_ids=positions).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        assert MultimodalConfig(**model.config.to_dict()).positions == {"rule": "test_doubled", "by": 3}
    finally:
        del POSITION_RULES._entries["test_doubled"]


def test_rules_that_are_none_are_refused():
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    with pytest.raises(ValueError, match="Unknown position rule 'none', expected one of .*mrope"):
        MultimodalModel(encoders=encoders, language_model=tiny.llama(), positions={"rule": "none"})
    with pytest.raises(ValueError, match='positions must be {"rule": name'):
        MultimodalConfig(positions={"axes": 3})
    with pytest.raises(ValueError, match="BloomForCausalLM takes no `position_ids`"):
        MultimodalModel(encoders={}, language_model=catalog_llms.build("bloom"), positions={"rule": "mrope"})
    with pytest.raises(TypeError, match=r"register_position_rule\('x', fn\) expects a function"):
        register_position_rule("x", 3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "mrope", "axis": 3}, r"options \['axis'\], but takes \['axes', 'frames_apart', 'time_step'\]"),
        ({"rule": "mrope", "axes": "3"}, "has 3 axes, got axes='3'"),
        ({"rule": "mrope", "frames_apart": "yes"}, "frames_apart must be True or False, got 'yes'"),
        ({"rule": "mrope", "time_step": 2}, "time_step must be numbers from 0 on by modality"),
        ({"rule": "mrope", "time_step": {"image": "2"}}, "time_step must be numbers from 0 on by modality"),
        ({"rule": "mrope", "time_step": {"film": 2}}, r"time_step names \['film'\], the model has the modalities"),
        ({"rule": "xdrope", "axes": 10**9}, "has 3 to 16 axes, got axes=1000000000"),
        ({"rule": "xdrope", "newline": 1}, "newline must be True or False, got 1"),
        ({"rule": "xdrope"}, r"TextModelWithHead turns tokens by 3 axes \(mrope_section \[4, 2, 2\]\).*'xdrope' has 4"),
        ({"rule": "counted", "first": -1}, "counts from a number from 0 on, got first=-1"),
    ],
)
def test_options_of_rules_are_checked_when_a_model_is_composed_or_read(sides, rule, message, tmp_path):
    native, model, _ = sides("qwen2_vl")
    text = native_models.head(native)
    encoders = {"image": native_models.plain(copy.deepcopy(native.model.visual), kind="image")}
    with pytest.raises(ValueError, match=message):
        MultimodalModel(encoders=encoders, language_model=text, positions=rule)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"positions": rule}))
    with pytest.raises(ValueError, match=message):
        MultimodalModel.from_pretrained(tmp_path)


def test_a_model_that_turns_by_one_axis_follows_no_rule_of_several():
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    with pytest.raises(
        ValueError, match="LlamaForCausalLM turns tokens by one axis, its rope_parameters have no 'mrope_"
    ):
        MultimodalModel(encoders=encoders, language_model=tiny.llama(), positions={"rule": "mrope"})


def test_sections_may_stand_for_each_type_of_layer():
    class Layer(torch.nn.Module):
        mrope_section: ClassVar = {"full_attention": [2, 1, 1]}

    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    text = tiny.llama()
    text.model.add_module("turning", Layer())
    MultimodalModel(encoders=encoders, language_model=text, positions={"rule": "mrope"})
    with pytest.raises(
        ValueError, match=r"turns tokens by 3 axes \(mrope_section \[2, 1, 1\]\), and the rule 'xdrope' has 4"
    ):
        MultimodalModel(
            encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=text, positions={"rule": "xdrope"}
        )


def test_options_of_a_users_rule_are_its_own():
    def rule(query, *, time_step):
        return query.types * time_step

    rule.needs_grids = False
    register_position_rule("test_steps", rule)
    try:
        encoders = {"vision": ModalEncoderModule(tiny.clip())}
        MultimodalModel(
            encoders=encoders, language_model=tiny.llama(), positions={"rule": "test_steps", "time_step": 3}
        )
    finally:
        del POSITION_RULES._entries["test_steps"]


@pytest.mark.parametrize(("given", "got"), [(None, "NoneType"), (torch.zeros(3, dtype=torch.long), r"shape \(3,\)")])
def test_what_a_users_rule_gives_is_checked(given, got):
    def rule(query):
        return given

    rule.needs_grids, rule.numbers_text = False, True
    register_position_rule("test_wrong", rule)
    try:
        encoders = {"vision": ModalEncoderModule(tiny.clip())}
        model = MultimodalModel(encoders=encoders, language_model=tiny.llama(), positions={"rule": "test_wrong"})
        with pytest.raises(ValueError, match=rf"'test_wrong' must give \(batch, length\) = \(1, 2\).*got .*{got}"):
            model(input_ids=torch.tensor([[5, 6]]))
    finally:
        del POSITION_RULES._entries["test_wrong"]


def test_seconds_may_be_numbers_of_python(sides):
    native, model, inputs = sides("qwen2_5_vl", True)
    given = inputs | {"second_per_grid_ts": [0.3, 1.7]}
    with torch.no_grad():
        found, expected = model(**given).logits, native(**given).logits
    assert torch.equal(attended(found, inputs), attended(expected, inputs))
    assert torch.equal(generated(model, given, num_beams=2), generated(native, given, num_beams=2))


def test_a_projector_that_reduces_leaves_a_smaller_grid():
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="pixel_shuffle"))
    encoders = {"image": ModalEncoderModule(tiny.clip(), projector, drop_prefix=1)}
    text = native_models.head(native_models.native("qwen2_vl"))
    model = MultimodalModel(encoders=encoders, language_model=text, positions={"rule": "mrope"}).eval()
    config = model.config.image_config
    output = model.get_image_features(torch.randn(2, 3, config.image_size, config.image_size))
    side = config.image_size // config.patch_size // 2
    assert output.feature_grids.tolist() == [[side, side]] * 2 and len(output.pooler_output[0]) == side * side
    model.image_encoder.projector.forward = lambda features, **kwargs: type(output)(
        last_hidden_state=features.new_zeros(2, 3, 64), feature_lens=None
    )
    with pytest.raises(
        ValueError, match=r"image: positions need the grid of each item's features, but \d x \d became 3"
    ):
        model.get_image_features(torch.randn(2, 3, config.image_size, config.image_size))


def test_grids_of_images_are_told_by_their_pixels_too():
    native = native_models.native("qwen2_vl")
    text = native_models.head(native)
    clip = tiny.clip()
    model = MultimodalModel(
        encoders={"image": ModalEncoderModule(clip, drop_prefix=1)}, language_model=text, positions={"rule": "mrope"}
    ).eval()
    model.set_modality_token_ids({"image": IMAGE})
    pixels = torch.randn(1, 3, clip.config.image_size, clip.config.image_size)
    side = clip.config.image_size // clip.config.patch_size
    inputs = {"input_ids": torch.tensor([[5, *[IMAGE] * side * side, 6, 7]]), "pixel_values": pixels}
    assert model.get_image_features(pixels).feature_grids.tolist() == [[side, side]]
    assert model.generate(**inputs, **GREEDY).shape[1] == side * side + 9
    whole = ModalEncoderModule(tiny.clip())
    model = MultimodalModel(
        encoders={"image": whole}, language_model=native_models.head(native), positions={"rule": "mrope"}
    )
    with pytest.raises(ValueError, match="image: positions need the grid of each item's features.*drop_prefix=1"):
        model.get_image_features(pixels)
