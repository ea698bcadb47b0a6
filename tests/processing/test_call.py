"""Arguments of a processor's call, sorted by whom they are for; placeholders, items and features counted against each other."""

import itertools
import re
import tracemalloc

import numpy as np
import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import AutoTokenizer

from cornstarch_hf import MultimodalProcessor, PrecomputedFeatures, PrecomputedFeaturesConfig, compose
from cornstarch_hf.processing.call import (
    PLURALS,
    TEXT_OPTIONS,
    call_arguments,
    check_items,
    encode_texts,
    media_arguments,
    text_arguments,
)

TOKENS = {"vision": "<image>", "audio": "<audio>"}


@pytest.fixture(scope="module")
def processor():
    return compose_tiny(["clip", "whisper"])[1]


def sorted_media(processor, encoder_inputs=None, images=None, audio=None, **kwargs):
    by_kind = {"images": images, "videos": None, "audio": audio}
    found = media_arguments(processor.config, processor.processors, by_kind, encoder_inputs, kwargs)
    return found, kwargs


def test_the_arguments_are_those_of_the_call(processor):
    names = call_arguments(processor.config, processor.processors)
    assert names == sorted(names) and {*PLURALS.values(), *TEXT_OPTIONS, "vision", "vision_kwargs"} <= set(names)
    assert {"do_rescale", "size", "images_kwargs", "common_kwargs"} <= set(names) and "num_frames" not in names


def test_text_and_options_are_told_apart():
    kwargs = {"padding": True, "vision": 1, "text_kwargs": {"split_special_tokens": True}}
    given = {"text": "a", "max_length": 5, "item_lengths": True, "truncation": True}
    text, options, internal = text_arguments(None, given, kwargs, tiny.tokenizer())
    assert text == "a" and kwargs == {"vision": 1}
    assert options == {"padding": True, "split_special_tokens": True, "max_length": 5, "truncation": True}
    assert internal == {
        "assistant_spans": None,
        "item_lengths": True,
        "by_size": None,
        "defaults": {},
        "stated": {"padding": True, "text_kwargs": {"truncation": True, "max_length": 5, "split_special_tokens": True}},
    }
    with pytest.raises(ValueError, match="text was given twice"):
        text_arguments("a", {"text": "b"}, {}, tiny.tokenizer())
    with pytest.raises(TypeError, match="Unknown arguments for the tokenizer: \\['evil'\\]"):
        text_arguments("a", {"evil": 1}, {}, tiny.tokenizer())


def test_items_and_options_of_each_modality(processor):
    encoder_inputs = {"audio": {"raw_speech": [2], "truncation": True}}
    found, rest = sorted_media(processor, images=[1], encoder_inputs=encoder_inputs, sampling_rate=8)
    expected = {"vision": {"items": [1]}, "audio": {"items": [2], "truncation": True, "sampling_rate": 8}}
    assert found == expected and rest == {}
    with pytest.raises(TypeError, match=r"Unknown arguments \['other'\], this processor takes \[.*'vision_kwargs'\]"):
        sorted_media(processor, images=[1], other=4)
    both = {"images_kwargs": {"do_resize": False}, "do_rescale": False, "audio_kwargs": {"padding": "longest"}}
    only = {"vision": {"items": [1], "do_resize": False, "do_rescale": False}}
    assert sorted_media(processor, vision=[1], **both)[0] == only


def test_items_that_were_given_twice_or_for_nobody(processor):
    for given in ({"vision": [1]}, {"encoder_inputs": {"vision": {"images": [1]}}}):
        with pytest.raises(ValueError, match="vision: its items were given twice"):
            sorted_media(processor, images=[1], **given)
    with pytest.raises(ValueError, match="'smell' is no modality of this model"):
        sorted_media(processor, encoder_inputs={"smell": {}})
    with pytest.raises(
        ValueError, match=r"'video' is no modality .*\['vision', 'audio'\] or its kind: pass frames as images\.$"
    ):
        processor.config.modalities_for("video")
    with pytest.raises(
        ValueError, match=r"'video' is no modality .*\['audio'\] or its kind\.$"
    ):  # which sees no images
        compose_tiny(["whisper"])[0].config.modalities_for("video")


@pytest.mark.parametrize(
    ("texts", "counts", "samples", "match"),
    [
        (["<image>"], {"vision": 2}, {}, r"vision: the texts have 1 placeholders <image> \[1\], but 2 items"),
        (
            ["<image>", ""],
            {"vision": 1},
            {"vision": [0, 1]},
            "vision, sample 0: the text has 1 placeholders <image>, but 0",
        ),
        (["", ""], {}, {"audio": [0]}, "audio: items were given for 1 samples, but there are 2 texts"),
    ],
)
def test_placeholders_and_items_that_do_not_fit(texts, counts, samples, match):
    with pytest.raises(ValueError, match=match):
        check_items(texts, TOKENS, {"vision": 0, "audio": 0} | counts, samples)


def test_texts_get_a_placeholder_for_each_feature(processor):
    tokens, ids = processor.tokens, processor.placeholder_ids
    lengths = {"vision": [3], "audio": []}
    data = encode_texts(processor.tokenizer, ["a" + tokens["vision"]], tokens, ids, lengths, {"return_tensors": "pt"})
    assert (data["input_ids"] == ids["vision"]).sum() == 3 and data["attention_mask"].shape == data["input_ids"].shape
    with pytest.raises(
        ValueError, match="vision, sample 0: 3 features need as many placeholder tokens .* but 1 are left"
    ):
        short = {"truncation": True, "max_length": len(tiny.tokenizer()("a")["input_ids"]) + 1}
        encode_texts(processor.tokenizer, ["a" + tokens["vision"]], tokens, ids, lengths, short)


# ---- options


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"padding": True, "text_kwargs": {"padding": "max_length"}},
            r"text: 'padding' was given twice, by its name and in text_kw",
        ),
        (
            {"padding": True, "llm_inputs": {"padding": True}},
            "text: 'padding' was given twice, by its name and in llm_inputs",
        ),
        (
            {"do_rescale": False, "images_kwargs": {"do_rescale": False}},
            "vision: 'do_rescale' was given twice, by its name and in im",
        ),
        (
            {"images_kwargs": {"size": 8}, "vision_kwargs": {"size": 8}},
            "vision: 'size' was given twice, in images_kwargs and in vis",
        ),
        (
            {"sampling_rate": 16_000, "audio_kwargs": {"sampling_rate": 16_000}},
            "audio: 'sampling_rate' was given twice",
        ),
        (
            {"images_kwargs": {"pad_size": {"height": 9, "width": 9}}},
            "vision: pad_size= does nothing while do_pad is off",
        ),
        (
            {"do_normalize": False, "image_mean": [0.0] * 3},
            "vision: image_mean= does nothing while do_normalize is off",
        ),
        ({"pad_to_multiple_of": 8}, "text: pad_to_multiple_of= does nothing without padding"),
        ({"max_length": 8, "truncation": False}, "text: max_length= does nothing here: pass truncation=True"),
        ({"return_tensors": "tf"}, "return_tensors must be 'pt', 'np' or None, got 'tf'"),
    ],
)
def test_options_that_were_given_twice_or_would_do_nothing(processor, given, match):
    with pytest.raises(ValueError, match=match):
        processor(**{"text": "a fox"} | given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"images_kwargs": {"colour": 1}}, r"vision: CLIP.* takes no option \['colour'\] in a call, but \['crop_size'"),
        ({"images_kwargs": {"return_tensors": "np"}}, r"vision: .* takes no option \['return_tensors'\]"),
        ({"audio_kwargs": {"colour": 1}}, r"audio: WhisperFeatureExtractor takes no option \['colour'\] in a call"),
        ({"videos_kwargs": {"fps": 2}}, "videos_kwargs was given, but the model has no encoder of the kind 'video'"),
        ({"fps": 2}, r"Unknown arguments \['fps'\]"),
        ({"stride": 2}, r"Unknown arguments \['stride'\]"),
        ({"common_kwargs": {"colour": 2}}, r"common_kwargs: no part takes \['colour'\]"),
    ],
)
def test_options_that_nothing_takes(processor, given, match):
    with pytest.raises(TypeError, match=match):
        processor(text="a fox", **given)


VALUES = [
    *(("max_length", value, f"a positive integer, got {value!r}") for value in (0, -1, 5.5, "long", True)),
    *(("pad_to_multiple_of", value, f"a positive integer, got {value!r}") for value in (0, -8, 5.5, "eight", True)),
    *(("padding_side", value, f"'left', 'right' or None, got {value!r}") for value in ("middle", "", 5)),
    *(("padding", value, "'max_length' or 'do_not_pad', got") for value in ("sideways", 5, [])),
    *(("truncation", value, "'only_second' or 'do_not_truncate', got") for value in ("sometimes", 5, [])),
    *((key, "x", "True or False, got 'x'") for key in ("add_special_tokens",)),
    *((key, "x", "True, False or None, got 'x'") for key in sorted(TEXT_OPTIONS) if key.startswith(("return_o", "return_a"))),
    *((key, 5, "True, False or None, got 5") for key in sorted(TEXT_OPTIONS) if key.startswith(("split", "return_mm", "return_to"))),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "told"), VALUES)
@pytest.mark.parametrize("road", ["flat", "text_kwargs", "llm_inputs", "common_kwargs", "chat"])
def test_values_that_no_option_of_a_tokenizer_has(processor, road, key, value, told):
    options = (
        {key: value}
        | ({"padding": True} if key != "padding" else {})
        | ({"truncation": True} if key == "max_length" else {})
    )
    keywords = options if road in ("flat", "chat") else {road: options}
    with pytest.raises(ValueError, match=rf"text: {key} must be .*{re.escape(told)}"):
        if road == "chat":  # typed text goes another way through the tokenizer
            chat = [{"role": "user", "content": "a typed <image>"}]
            processor.apply_chat_template(chat, tokenize=True, return_dict=True, **keywords)
        else:
            processor(text="a fox", **keywords)


def test_lengths_may_be_integers_of_numpy(processor):
    given = {
        "padding": "max_length",
        "max_length": np.int64(9),
        "pad_to_multiple_of": np.int32(4),
        "return_tensors": "pt",
    }
    assert processor(text="a", **given)["input_ids"].shape == (1, 12)


@pytest.mark.parametrize("value", [5, "x", [1], (), 0])
@pytest.mark.parametrize(
    "key",
    ["llm_inputs", "encoder_inputs", "text_kwargs", "common_kwargs", "images_kwargs", "audio_kwargs", "vision_kwargs"],
)
def test_what_must_be_a_dict(processor, key, value):
    with pytest.raises(TypeError, match=f"{key} must be a dict, by name, got {type(value).__name__}"):
        processor(text="a", **{key: value})


def test_what_must_be_a_dict_in_a_chat_and_of_one_modality(processor):
    with pytest.raises(TypeError, match="processor_kwargs must be a dict, by name, got int"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, processor_kwargs=5)
    with pytest.raises(TypeError, match="encoder_inputs of vision must be a dict, by name, got list"):
        processor(text="a", encoder_inputs={"vision": [1]})


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        *((value, TypeError, f"text must be a string or a list of strings, got {type(value).__name__}") for value in (
            5, b"text", {"a": "b"}, {"text"}, np.array(["text"]), torch.tensor([1]), object(), iter(["text"])
        )),
        *((["a", value], TypeError, f"sample 1: the text must be a string, got {type(value).__name__}") for value in (5, None, ["b"])),
        (["a", "\ud800"], ValueError, r"sample 1: U\+D800 at character 0 is half of a surrogate pair"),
        ([], ValueError, "text is an empty list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["text", "llm_inputs"])
def test_what_is_no_text(processor, where, text, error, told):
    with pytest.raises(error, match=told):
        processor(**({"text": text} if where == "text" else {"llm_inputs": {"text": text}}))


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_texts_of_several_lengths_make_no_tensor(processor, kind):
    texts = ["a", "a quick brown fox"]
    sizes = [len(row) for row in processor(text=texts)["input_ids"]]
    told = f"sample 1: the text has {sizes[1]} tokens and that of sample 0 {sizes[0]}, tensors want one length"
    with pytest.raises(ValueError, match=told):
        processor(text=texts, return_tensors=kind)
    with pytest.raises(ValueError, match="padding='max_length' fills up to 2 and cuts nothing"):
        processor(text=texts, return_tensors=kind, padding="max_length", max_length=2)


@pytest.mark.parametrize("text", ["", [""], ["", ""]], ids=repr)
@pytest.mark.parametrize("padding", [{}, {"padding": True}, {"padding": "max_length", "max_length": 4}], ids=repr)
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_empty_texts_give_integers(processor, text, padding, kind):
    batch = processor(text=text, return_tensors=kind, return_mm_token_type_ids=True, **padding)
    rows, length = len(text) if isinstance(text, list) else 1, padding.get("max_length", 0)
    expected = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if kind is None:
            assert batch[key] == [[value] * length] * rows
        else:
            assert batch[key].dtype == (torch.int64 if kind == "pt" else np.int64)
            assert batch[key].shape == (rows, length) and (batch[key] == value).all()
    native = processor.tokenizer(text, return_tensors=kind, **padding)
    assert type(native["input_ids"]) is type(batch["input_ids"]) or kind is None


def test_an_empty_text_beside_another(processor):
    both = processor(text=["", "a dog"], padding=True, return_tensors="pt")
    alone = processor(text="a dog", return_tensors="pt")
    assert torch.equal(both["input_ids"][1:], alone["input_ids"]) and both["attention_mask"][0].sum() == 0


def test_special_tokens_that_are_split_leave_no_placeholder(processor):
    told = "vision, sample 0: .* with split_special_tokens=True: leave it out"
    with pytest.raises(ValueError, match=told):
        processor(text="<image>", images=tiny.image(0), split_special_tokens=True)
    parts = [{"type": "image", "image": tiny.image(0)}, {"type": "text", "text": "a typed <image>"}]
    with pytest.raises(ValueError, match=told):
        processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, split_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"images": [1], "items": [1]}, ValueError, "vision: its items were given twice"),
        ({"images": [1], "return_tensors": "np"}, TypeError, r"vision: .* takes no option \['return_tensors'\]"),
        ({}, ValueError, "vision: encoder_inputs has nothing for it"),
        (None, ValueError, "vision: encoder_inputs has nothing for it"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8), "do_rescale": False}, ValueError, r"\['do_rescale'\] would do nothing"),
        ({"pixel_values": 5}, ValueError, "vision: pixel_values in encoder_inputs: expected a row for each item, got 5 alone"),
        ({"pixel_values": "x"}, TypeError, "vision: pixel_values in encoder_inputs: expected a tensor, .* got str"),
        ({"pixel_values": None}, TypeError, "vision: pixel_values in encoder_inputs: expected a tensor, .* got NoneType"),
        ({"pixel_values": [[1.0], [1.0, 2.0]]}, TypeError, "vision: pixel_values in encoder_inputs: .* got list"),
        ({"pixel_values": torch.full((1, 3, 8, 8), torch.nan)}, ValueError, "vision: .* pixel_values with values that are not finite"),
    ],
)  # fmt: skip
def test_encoder_inputs_that_cannot_be_used(processor, given, error, told):
    with pytest.raises(error, match=told):
        processor(text="<image>", encoder_inputs={"vision": given})


def test_options_beside_items_that_were_given_elsewhere(processor):
    call = {"text": "<image>", "images": tiny.image(0), "return_tensors": "pt"}
    options = {"do_rescale": False}
    found, wanted = processor(**call, encoder_inputs={"vision": options}), processor(**call, images_kwargs=options)
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    with pytest.raises(TypeError, match=r"vision: .* takes no option \['pixel_values'\]"):  # which items then?
        processor(**call, encoder_inputs={"vision": {"pixel_values": torch.zeros(1, 3, 8, 8)}})


SOUND = np.random.default_rng(0).uniform(-0.1, 0.1, 3000).astype(np.float32)
ITEMS = {"clip": ("vision", tiny.image(0)), "film": ("film", np.zeros((2, 8, 9, 3), np.uint8))}
ITEMS |= dict.fromkeys(("whisper", "wav2vec2"), ("audio", SOUND)) | {"esm": ("protein", "LAGV")}
WRONG = [
    *((key, "input_data_format", value, "{name}: input_data_format must be") for key in ("clip", "film") for value in ("none", 5)),
    *((key, option, value, "{name}, item 0: CLIPImageProcessor.* cannot process") for key in ("clip", "film") for option, value in (
        ("size", -1), ("size", {}), ("image_mean", "x"), ("crop_size", "x")
    )),
    *((key, option, value, f"{{name}}: {option} must be True or False") for key in ("clip", "film")
      for option, value in (("do_rescale", 5), ("do_normalize", "x"))),
    ("film", "num_frames", 0, "film, item 0: num_frames must be a positive integer, got 0"),
    ("film", "fps", "x", "film, item 0: frames per second must be positive"),
    *((key, option, value, f"audio: {option} must be .*, got {value!r}") for key in ("whisper", "wav2vec2") for option, value in (
        ("max_length", 0), ("max_length", -1), ("max_length", "long"), ("pad_to_multiple_of", 0), ("pad_to_multiple_of", -8),
        ("return_attention_mask", "x"), ("truncation", "do_not_truncate"),
    )),
    *(("esm", option, value, f"protein: {option} must be .*, got {value!r}") for option, value in (
        ("max_length", -1), ("padding", "sideways"), ("truncation", 5), ("padding_side", "middle"), ("split_special_tokens", "x")
    )),
]  # fmt: skip


@pytest.mark.parametrize(("key", "option", "value", "told"), WRONG)
def test_values_that_no_option_of_a_part_has(key, option, value, told):
    name, item = ITEMS[key]
    if key == "film":
        encoder = {"model": tiny.clip(), "processor": tiny.clip_processor(), "kind": "video"}
        processor = compose(tiny.llama(), {"film": encoder}, tokenizer=tiny.tokenizer())[1]
    else:
        processor = compose_tiny([key])[1]
    rate = {"sampling_rate": 16_000} if name == "audio" else {"source_fps": 2} if option == "fps" else {}
    with pytest.raises((ValueError, TypeError), match=told.format(name=name)):
        processor(text=processor.tokens[name], **{name: [item], f"{name}_kwargs": {option: value} | rate})


def test_a_sampling_rate_is_for_what_has_one():
    scene = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=6))
    entries = {"scene": {"model": scene, "kind": "audio"}}
    processor = compose(tiny.llama(), entries, tokenizer=tiny.tokenizer())[1]
    call = {"text": "<audio>", "audio": [np.ones((2, 6), np.float32)]}
    assert len(processor(**call)["features"]) == 1
    with pytest.raises(TypeError, match=r"Unknown arguments \['sampling_rate'\]"):
        processor(**call, sampling_rate=16_000)
    for key in ("audio_kwargs", "scene_kwargs"):
        with pytest.raises(TypeError, match=r"scene: PrecomputedFeaturesProcessor takes no option \['sampling_rate'\]"):
            processor(**call, **{key: {"sampling_rate": 16_000}})


def test_options_of_the_tokenizer_without_a_text_and_of_tensors_that_are_processed_already(processor):
    with pytest.raises(ValueError, match=r"\['padding'\] are the tokenizer's, and there is no text"):
        processor(images=tiny.image(0), padding=True)
    pixels = {"vision": {"pixel_values": processor(images=tiny.image(0))["pixel_values"]}}
    with pytest.raises(
        ValueError, match=r"vision: its tensors are processed already, so that \['do_rescale'\] would do nothing"
    ):
        processor(text="<image>", encoder_inputs=pixels, do_rescale=False)


def test_flat_common_and_nested_options_are_one(processor):
    call = {"text": "<image> a fox", "images": tiny.image(0)}
    options = {"do_rescale": False, "size": {"shortest_edge": 16}}
    nested = processor(
        **call, images_kwargs=options, text_kwargs={"padding": "max_length", "max_length": 30}, return_tensors="pt"
    )
    flat = processor(**call, **options, padding="max_length", max_length=30, return_tensors="pt")
    shared = {**options, "padding": "max_length", "max_length": 30, "return_tensors": "pt"}
    common = processor(**call, common_kwargs=shared)
    plain = processor(**call, return_tensors="pt")
    for other in (flat, common):
        assert all(torch.equal(nested[key], other[key]) for key in nested) and list(nested) == list(other)
    assert not torch.equal(nested["pixel_values"], plain["pixel_values"]) and nested["input_ids"].shape == (1, 30)
    assert processor(**call, common_kwargs=shared, text_kwargs={"max_length": 40})["input_ids"].shape == (1, 40)


LENGTHS = [{}, {"max_length": 6}, {"max_length": 40}]
PADDINGS = [
    {},
    {"padding": False},
    {"padding": True},
    {"padding": "longest"},
    {"padding": "max_length"},
    {"padding": "do_not_pad"},
]
CUTS = [
    {},
    {"truncation": True},
    {"truncation": False},
    {"truncation": "longest_first"},
    {"truncation": "do_not_truncate"},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "own", [{}, {"max_length": 9}, {"max_length": 30, "padding": "max_length"}, {"truncation": True, "max_length": 7}]
)
def test_lengths_are_those_of_transformers_by_the_call_and_by_the_tokenizers_own_defaults(tmp_path, processor, own):
    made = tiny.tokenizer()
    made.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **own)
    again = MultimodalProcessor(tokenizer, config=compose_tiny(["clip"])[0].config)
    texts = ["the quick brown fox jumps", "a fox"]
    for given in ({**a, **b, **c} for a, b, c in itertools.product(LENGTHS, PADDINGS, CUTS)):
        # As `ProcessorMixin._merge_kwargs` does: what the call says, then what the tokenizer was built with.
        expected = tokenizer(texts, **own | given)["input_ids"]
        try:
            found = again(text=texts, **given)["input_ids"]
        except ValueError as error:
            assert "max_length= does nothing here" in str(error)
        else:
            assert found == expected, given


def test_types_of_tokens_are_those_of_transformers_processors(processor):
    call = {
        "text": ["<image> a <audio>", "a"],
        "images": tiny.image(0),
        "audio": tiny.sound(0),
        "sampling_rate": 16_000,
    }
    for sort, cls in (("pt", torch.Tensor), ("np", np.ndarray), (None, list)):
        found = processor(**call, padding=True, return_mm_token_type_ids=True, return_tensors=sort)
        types, ids = found["mm_token_type_ids"], np.asarray(found["input_ids"])
        assert isinstance(types, cls)
        expected = np.select([ids == processor.image_token_id, ids == processor.audio_token_id], [1, 3], 0)
        assert np.array_equal(np.asarray(types), expected) and 1 in expected and 3 in expected
    protein = compose_tiny(["esm"])[1]
    with pytest.raises(ValueError, match="protein: mm_token_type_ids have no number for the kind 'text'"):
        protein(text="<protein>", protein=["MKV"], return_mm_token_type_ids=True)


@pytest.mark.parametrize("keys", [[key] for key in tiny.ENCODERS] + [["clip", "whisper", "esm"]])
def test_the_names_of_inputs_are_what_a_call_returns(keys):
    processor = compose_tiny(keys)[1]
    items = {name: [make(0)] for name, make in processor.items.items()}
    rate = {"sampling_rate": 16_000} if "audio" in items else {}
    assert set(processor(text="".join(processor.tokens.values()), **items, **rate)) == set(processor.model_input_names)


# ---- sizes


@pytest.mark.parametrize("key", ["clip", "siglip", "dinov2", "convnext", "qwen2_vl"])
def test_tokens_of_images_are_counted_by_their_sizes_alone(key):
    processor = compose_tiny([key])[1]
    sizes = [(12, 10), (60, 60), (33, 71), (200, 40), (5, 9)]
    options = [{}, {"resample": 0}, {"max_pixels": 256} if key == "qwen2_vl" else {"do_normalize": False}]
    for given in options:
        found = processor._get_num_multimodal_tokens(image_sizes=sizes, **given)
        calls = [processor(text="<image>", images=tiny.image(0, size), **given) for size in sizes]
        assert found.num_image_tokens == [len(call["input_ids"][0]) for call in calls]
        packed = "image_grid_thw" in calls[0]
        assert found.num_image_patches == [len(call["pixel_values"]) if packed else 1 for call in calls]
        assert found.num_video_tokens is None and found.num_audio_tokens is None
    tracemalloc.start()
    processor._get_num_multimodal_tokens(image_sizes=[(8_000, 7_000)])
    assert tracemalloc.get_traced_memory()[1] < 8_000_000  # bytes; its pixels would be 168 million
    tracemalloc.stop()
    with pytest.raises(ValueError, match="vision: the image of 100000 x 100000 pixels has .*MAX_IMAGE_PIXELS"):
        processor._get_num_multimodal_tokens(image_sizes=[(100_000, 100_000)])


def test_tokens_of_sounds_and_videos_are_counted_by_their_sizes_alone(processor):
    lengths = [1_600, 3_200]
    for key in ("whisper", "wav2vec2"):
        made = compose_tiny([key])[1]
        calls = [made(text="<audio>", audio=tiny.sound(0, n), sampling_rate=16_000)["input_ids"][0] for n in lengths]
        assert made._get_num_multimodal_tokens(audio_lengths=lengths).num_audio_tokens == [len(ids) for ids in calls]
    film = compose_tiny({"film": "clip"}, film={"kind": "video"})[1]
    for given in ({}, {"num_frames": 2}):
        count = len(film(text="<video>", videos=[tiny.image(i) for i in range(6)], **given)["input_ids"][0])
        assert film._get_num_multimodal_tokens(video_sizes=[(6, 12, 10)], **given).num_video_tokens == [count]
    with pytest.raises(
        ValueError, match=r"Sizes of the kind 'video' need one encoder of that kind, the model has \[\]"
    ):
        processor._get_num_multimodal_tokens(video_sizes=[(2, 3, 4)])
    with pytest.raises(TypeError, match=r"Unknown arguments \['colour'\]"):
        processor._get_num_multimodal_tokens(image_sizes=[(3, 4)], colour=1)


def test_common_options_of_a_step_that_is_off_are_refused_as_others_are(processor):
    given = {"images": tiny.image(), "text": "<image>", "do_center_crop": False}
    with pytest.raises(ValueError, match="crop_size"):
        processor(**given, common_kwargs={"crop_size": {"height": 4, "width": 4}})
    with pytest.raises(TypeError, match="common_kwargs must be a dict"):
        processor(text="a", common_kwargs=["padding"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_sizes": [(12, 10), 12]}, r"vision, item 1: expected its size as \(height, width\), got 12"),
        ({"image_sizes": [(12, 10, 3)]}, r"vision, item 0: expected its size as \(height, width\)"),
        ({"image_sizes": [(12.5, 10)]}, "vision, item 0: its height must be a positive integer, got 12.5"),
        ({"image_sizes": [(12, 10), (12, 0)]}, "vision, item 1: its width must be a positive integer, got 0"),
        ({"audio_lengths": [800, -1]}, "audio, item 1: its number of samples must be a positive integer, got -1"),
    ],
)
def test_sizes_of_items_that_cannot_be(sizes, message):
    _, processor = compose_tiny(["clip", "whisper"])
    with pytest.raises(ValueError, match=message):
        processor._get_num_multimodal_tokens(**sizes)


@pytest.mark.parametrize("wrong", ["features_msk", "foo"])
def test_tensors_that_no_encoder_takes_are_refused(wrong):
    _, processor = compose_tiny(["clip", "whisper"])
    pixels = processor(images=tiny.image(), return_tensors="pt")["pixel_values"]
    with pytest.raises(TypeError, match=rf"vision: its encoder takes no tensors \['{wrong}'\], but \[.*'pixel_values'"):
        processor(text="<image>", encoder_inputs={"vision": {"pixel_values": pixels, wrong: pixels}})
    whole = dict(tiny.clip_processor()(tiny.image(), return_tensors="pt"))
    assert len(processor(text="<image>", encoder_inputs={"vision": whole})["input_ids"][0]) == 5


def test_a_rate_that_is_no_number():
    _, processor = compose_tiny(["whisper"])
    with pytest.raises(TypeError, match="audio, item 0: sampling_rate must be a number in Hz, got '16000'"):
        processor(text="<audio>", audio=tiny.sound(), sampling_rate="16000")
