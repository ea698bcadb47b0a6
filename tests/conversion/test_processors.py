"""Native processors inside of composed ones: equal ids and tensors on odd inputs, and back."""

import json
import warnings

import native_processors
import native_types
import numpy as np
import pytest
import tiny
import torch
import transformers
from containable import WITHOUT_CLASS_TOKEN, composed, language_model, tower
from helpers import compose_tiny
from native_processors import written_by
from own_memory import own_memory
from transformers import AutoModel, AutoProcessor

from cornstarch_hf import MultimodalProcessor, from_native, to_native

IMAGES, SOUNDS = sorted(native_processors.IMAGES), sorted(native_processors.SOUNDS)
# One of every kind of expansion: plain repetition, tiles with rows and columns, crops in words, sounds.
FAST = ["llava_next", "idefics3", "gemma3", "qwen2_audio"]


def types(names):
    """Parameters of which most are for the wide matrix."""
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.wide) for name in names]


def picture(seed=0, size=(40, 30), mode="RGB"):
    return tiny.image(seed, size).convert(mode)


def array(seed=0, size=(20, 33), layout="last"):
    values = np.asarray(tiny.image(seed, size))
    return torch.from_numpy(values.transpose(2, 0, 1).copy()) if layout == "first" else values


# name -> texts with {} for a placeholder, items for each, options
PICTURES = {
    "text alone": (["what is seven plus five"], [[]], {}),
    "texts alone": (["the quick", "brown fox jumps over"], [[], []], {"padding": True}),
    "one in the middle": (["see {} there"], [[picture()]], {}),
    "at the beginning": (["{}the fox"], [[picture(1)]], {}),
    "at the end": (["the fox {}"], [[picture(2)]], {}),
    "alone": (["{}"], [[picture(3)]], {}),
    "side by side": (["{}{}"], [[picture(0), picture(1, (33, 50))]], {}),
    "several and words": (["a {} b {} c {}"], [[picture(i, (30 + 9 * i, 44 - 7 * i)) for i in range(3)]], {}),
    "a batch": (["{} one", "two {}"], [[picture(0)], [picture(1, (64, 64))]], {"padding": True}),
    "uneven": (["{}a{}", "b", "c {}"], [[picture(0), picture(1)], [], [picture(2, (10, 90))]], {"padding": True}),
    "text first": (["the lazy dog", "{} sum"], [[], [picture(4)]], {"padding": True}),
    "padded on the left": (
        ["{} a b c d", "{}"],
        [[picture(0)], [picture(1)]],
        {"padding": True, "padding_side": "left"},
    ),
    "padded to a length": (["{}"], [[picture(5)]], {"padding": "max_length", "max_length": 600}),
    "padded to a multiple": (["{} x", "y"], [[picture(6)], []], {"padding": True, "pad_to_multiple_of": 16}),
    "very wide": (["{} wide"], [[picture(0, (5, 200))]], {}),
    "very tall": (["{} tall"], [[picture(0, (180, 6))]], {}),
    "as large as the tower": (["{}"], [[picture(0, (32, 32))]], {}),
    "large": (["{}"], [[picture(0, (300, 280))]], {}),
    "with an alpha channel": (["{}"], [[picture(7, mode="RGBA")]], {}),
    "grey": (["{}"], [[picture(7, mode="L")]], {}),
    "of a palette": (["{}"], [[picture(7, mode="P")]], {}),
    "an array": (["{}"], [[array()]], {}),
    "a tensor": (["{}"], [[array(layout="first")]], {}),
    "unicode": (["ünï {} 漢字 🙂\n\n{}"], [[picture(8), picture(9, (50, 31))]], {}),
    "no special tokens": (["{} x"], [[picture()]], {"add_special_tokens": False}),
    "types of tokens": (["{} x", "y"], [[picture()], []], {"padding": True, "return_mm_token_type_ids": True}),
    "without a mask": (["{} x"], [[picture()]], {"return_attention_mask": False}),
    "lists": (["{} x"], [[picture()]], {"return_tensors": None}),
    "numpy": (["{} x"], [[picture()]], {"return_tensors": "np"}),
}
NOISES = {
    "text alone": (["what is seven plus five"], [[]], {}),
    "texts alone": (["the quick", "brown fox jumps over"], [[], []], {"text_kwargs": {"padding": True}}),
    "one in the middle": (["hear {} there"], [[tiny.sound(0, 9000)]], {}),
    "at the beginning": (["{}the fox"], [[tiny.sound(1, 7777)]], {}),
    "at the end": (["the fox {}"], [[tiny.sound(2, 16000)]], {}),
    "alone": (["{}"], [[tiny.sound(3, 12345)]], {}),
    "a batch": (["{} one", "two {}"], [[tiny.sound(0, 5000)], [tiny.sound(1, 15000)]], {"text_kwargs": {"padding": True}}),
    "equal lengths": (["{} one", "two {}"], [[tiny.sound(0, 8000)], [tiny.sound(1, 8000)]], {"text_kwargs": {"padding": True}}),
    "three": (["{}", "a {}", "b {} c"], [[tiny.sound(i, 4000 + 3000 * i)] for i in range(3)], {"text_kwargs": {"padding": True}}),
    "several": (["{}a{}", "b"], [[tiny.sound(0, 6000), tiny.sound(1, 9000)], []], {"text_kwargs": {"padding": True}}),
    "text first": (["dog", "{} sum"], [[], [tiny.sound(4, 6400)]], {"text_kwargs": {"padding": True}}),
    "padded on the left": (
        ["{} a b c d", "{}"], [[tiny.sound(0, 6000)], [tiny.sound(1, 9000)]],
        {"text_kwargs": {"padding": True, "padding_side": "left"}},
    ),
    "padded to a length": (["{}"], [[tiny.sound(5, 7000)]], {"text_kwargs": {"padding": "max_length", "max_length": 300}}),
    "padded to a multiple": (
        ["{} x", "y {}"], [[tiny.sound(6, 8000)], [tiny.sound(7, 4000)]],
        {"text_kwargs": {"padding": True, "pad_to_multiple_of": 16}},
    ),
    "short": (["{}"], [[tiny.sound(0, 2000)]], {}),
    "a window": (["{}"], [[tiny.sound(0, 16000)]], {}),
    "longer than a window": (["{}"], [[tiny.sound(0, 40000)]], {}),
    "longer and shorter": (
        ["{} a", "{}"], [[tiny.sound(0, 40000)], [tiny.sound(1, 3000)]], {"text_kwargs": {"padding": True}}
    ),
    "silence": (["{}"], [[np.zeros(8000, np.float32)]], {}),
    "loud": (["{}"], [[np.sin(np.arange(9000, dtype=np.float32) / 9)]], {}),
    "doubles": (["{}"], [[tiny.sound(0, 8000).astype(np.float64)]], {}),
    "unicode": (["ünï {} 漢字 🙂\n\n"], [[tiny.sound(0, 9000)]], {}),
    "no special tokens": (["{} x"], [[tiny.sound(0, 9000)]], {"text_kwargs": {"add_special_tokens": False}}),
    "types of tokens": (["{} x"], [[tiny.sound(0, 9000)]], {"return_mm_token_type_ids": True}),
}  # fmt: skip


# Of which the native processor leaves out the end without a word.
LOSSES = {"qwen2_audio": ["longer than a window", "longer and shorter"]}


@pytest.fixture(scope="module")
def pairs():
    return native_processors.compositions()


def called(call, **arguments):
    """What a processor gives, or what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return dict(call(**arguments))
        except Exception as error:
            return error


def native_call(processor, kind, texts, items, options):
    per_sample = kind == "images" and type(processor).__name__ == "Gemma3Processor"
    given = items if per_sample else [item for own in items for item in own]
    media = {kind: given} if any(items) else {}
    rate = {"sampling_rate": 16_000} if kind == "audio" and media else {}
    return called(processor, text=texts, **media, **rate, **options)


def our_call(processor, kind, texts, items, options):
    media = {kind: items} if any(items) else {}
    rate = {"sampling_rate": 16_000} if kind == "audio" and media else {}
    return called(processor, text=texts, **media, **rate, **options)


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare(pairs, model_type, kind, cases):
    """Compare all cases that the native processor takes; those that it refuses are refused, or handled by ours alone."""
    _, processor, _, ours = pairs(model_type)
    compared, wrong = 0, {}
    assert set(LOSSES.get(model_type, ())) <= set(cases)
    for name, (texts, items, options) in cases.items():
        texts, options = (
            [text.replace("{}", written_by(model_type, processor)) for text in texts],
            {"return_tensors": "pt"} | options,
        )
        expected = native_call(processor, kind, texts, items, options)
        found = our_call(ours, kind, texts, items, options)
        if name in LOSSES.get(model_type, ()):
            assert isinstance(found, ValueError) and "of which" in str(found) and "split it" in str(found)
            continue
        if isinstance(expected, Exception):
            if isinstance(found, Exception) and not isinstance(found, (ValueError, TypeError)):
                wrong[name] = repr(found)[:300]
            continue
        compared += 1
        if isinstance(found, Exception):
            wrong[name] = f"refused: {found!r:.300}"
        elif keys := [
            k for k in {*expected, *found} if not (k in expected and k in found and same(expected[k], found[k]))
        ]:
            wrong[name] = keys
    assert not wrong, f"{wrong} of {compared}"
    return compared


@pytest.mark.parametrize("model_type", types(IMAGES))
def test_pictures_give_the_native_ids_and_tensors(pairs, model_type):
    assert compare(pairs, model_type, "images", PICTURES) >= 20


@pytest.mark.parametrize("model_type", types(SOUNDS))
def test_sounds_give_the_native_ids_and_tensors(pairs, model_type):
    assert compare(pairs, model_type, "audio", NOISES) >= 16


SOME = ["a batch", "one in the middle", "several", "several and words", "text alone", "uneven", "very wide"]


def some(kind):
    cases = PICTURES if kind == "images" else NOISES
    return {name: cases[name] for name in SOME if name in cases}


def media_kind(model_type):
    return "images" if model_type in IMAGES else "audio"


@pytest.mark.parametrize("model_type", types(native_processors.PROCESSORS))
def test_there_and_back_through_files(pairs, model_type, tmp_path):
    native, processor, model, ours = pairs(model_type)
    kind = media_kind(model_type)
    model.save_pretrained(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "ours")
    again = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(again) is MultimodalProcessor
    assert json.loads(json.dumps(again.to_dict())) == json.loads(
        json.dumps(ours.to_dict())
    )  # whose keys may be numbers
    _, back = to_native(AutoModel.from_pretrained(tmp_path / "ours"), again)
    assert type(back) is type(processor)
    back.save_pretrained(tmp_path / "back")
    fresh = native_processors.PROCESSORS[model_type](native_processors.features(native))  # calls leave their traces
    fresh.save_pretrained(tmp_path / "native")
    type(processor).from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "again")  # loading does too
    assert read(tmp_path / "back") == read(tmp_path / "again")
    loaded = type(processor).from_pretrained(tmp_path / "back")
    for texts, items, options in some(kind).values():
        texts, options = (
            [text.replace("{}", written_by(model_type, processor)) for text in texts],
            {"return_tensors": "pt"} | options,
        )
        expected = native_call(processor, kind, texts, items, options)
        if not isinstance(expected, Exception):
            assert same_calls(expected, our_call(again, kind, texts, items, options))
            assert same_calls(expected, native_call(loaded, kind, texts, items, options))


def read(folder):
    """What a processor's files hold, but for the version that wrote them."""
    values = json.loads((folder / "processor_config.json").read_text())
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    names = sorted(path.name for path in folder.iterdir())
    return names, values, tokens


def same_calls(expected, found):
    return {*expected} == {*found} and all(same(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("model_type", types(native_processors.PROCESSORS))
def test_the_composition_computes_the_native_logits_of_them(pairs, model_type):
    native, processor, model, ours = pairs(model_type)
    kind = media_kind(model_type)
    cases = ["uneven", "several", "a batch"]
    given = PICTURES if kind == "images" else NOISES
    taken = [case for case in cases if case in given]
    name = next(
        case
        for case in taken
        if isinstance(called_case(native_call, processor, kind, processor, model_type, case), dict)
    )
    expected = called_case(native_call, processor, kind, processor, model_type, name)
    found = called_case(our_call, ours, kind, processor, model_type, name)
    labels = expected.pop("labels", None), found.pop("labels", None)
    assert (labels[0] is None) == (labels[1] is None)
    mask = expected["attention_mask"].bool()
    with torch.no_grad():
        wanted = own_memory(native)(**own_memory(expected)).logits[mask]
        got = own_memory(model)(**own_memory(found)).logits[mask]
    assert torch.equal(wanted, got)


def called_case(call, called, kind, processor, model_type, name):
    texts, items, options = (PICTURES if kind == "images" else NOISES)[name]
    texts, options = (
        [text.replace("{}", written_by(model_type, processor)) for text in texts],
        {"return_tensors": "pt"} | options,
    )
    return call(called, kind, texts, items, options)


FILMS = [
    name for name in ("llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl") if name in native_processors.PROCESSORS
]


@pytest.mark.skipif(not FILMS, reason="processors of videos need torchvision")
@pytest.mark.parametrize("model_type", FILMS or [None])
def test_videos_give_the_native_ids_and_tensors(pairs, model_type):
    _, processor, _, ours = pairs(model_type)
    films = [np.stack([array(10 * j + i, (24 + 8 * j, 30)) for i in range(4)]) for j in range(2)]
    image, video = ours.tokens["vision"], ours.tokens["video"]
    for texts, media in (
        ([f"see {video} x"], {"videos": films[:1]}),
        ([f"{image} and {video}", f"{video}"], {"videos": films, "images": [picture(0, (30, 40))]}),
    ):
        expected = dict(processor(text=texts, return_tensors="pt", padding=True, **media))
        found = dict(ours(text=texts, return_tensors="pt", padding=True, **media))
        assert same_calls(expected, found) and "pixel_values_videos" in found


# ---- where it comes from


def test_a_checkpoint_brings_its_processor(pairs, tmp_path):
    native, processor, _, _ = pairs("llava")
    native.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, ours = from_native(tmp_path)
    assert isinstance(ours, MultimodalProcessor) and ours.placeholder_ids == {"vision": native.config.image_token_id}
    given = {"text": ["see <image>"], "images": [picture()], "return_tensors": "pt"}
    assert same_calls(dict(processor(**given)), dict(ours(**given)))
    assert model.config.modality("vision")["token"] == "<image>"
    ids = model.generate(**ours(**given), max_new_tokens=2, do_sample=False)
    assert torch.equal(ids, native.generate(**processor(**given), max_new_tokens=2, do_sample=False))


def test_a_checkpoint_without_a_processor_gives_none(pairs, tmp_path):
    pairs("llava")[0].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_native(tmp_path)[1] is None


def test_a_processor_that_cannot_be_held_is_left_out_with_a_warning(pairs, tmp_path):
    native, processor, _, _ = pairs("llava")
    native.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_processor_type"] = "NoSuchImageProcessor"
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="its LlavaProcessor was left out, and the processor is None"):
        assert from_native(tmp_path)[1] is None


def test_the_native_processor_stays_as_it_is(pairs):
    native, processor = native_processors.pair("llava")
    before = processor.to_dict(), len(processor.tokenizer), processor.tokenizer.init_kwargs.copy()
    _, ours = from_native((native, processor))
    ours.processors["vision"].image_mean = [0.1, 0.2, 0.3]
    ours.tokenizer.add_tokens(["<more>"])
    assert (processor.to_dict(), len(processor.tokenizer), processor.tokenizer.init_kwargs) == before


@pytest.mark.parametrize(
    "given, error, told",
    [
        (3, TypeError, "The processor must be a native one of transformers, got int"),
        ("composed", TypeError, "must be a native one of transformers, got MultimodalProcessor"),
    ],
)
def test_what_is_no_native_processor_is_refused(pairs, given, error, told):
    native, _, _, ours = pairs("llava")
    with pytest.raises(error, match=told):
        from_native((native, ours if given == "composed" else given))


def test_a_processor_that_never_was_native_becomes_one_that_gives_the_same(pairs):
    _, processor, model, _ = pairs("llava")
    plain = MultimodalProcessor(processor.tokenizer, {"vision": processor.image_processor}, config=model.config)
    _, made = to_native(model, plain)
    assert made is not processor and made.to_dict() == processor.to_dict()
    native, same = to_native(model, processor)
    assert same is processor and type(native).__name__ == "LlavaForConditionalGeneration"


# ---- of compositions that never were native

CUT = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
RGB = {"do_convert_rgb": True}
TOWERS = {  # of LLaVA: an image processor of each
    "clip_vision_model": ("CLIP", CUT), "siglip_vision_model": ("Siglip", {}), "dinov2": ("Bit", CUT), "dinov3_vit": ("ViT", RGB),
    "vit": ("ViT", RGB), "aimv2_vision_model": ("CLIP", CUT), "mlcd_vision_model": ("CLIP", CUT), "internvl_vision": ("ViT", RGB),
}  # fmt: skip
LINEAR = {"projection_type": "linear"}
SHUFFLE = {"projection_type": "pixel_shuffle", "projection_kwargs": {"scale_factor": 2}}
ONE_LAYER = {"projection_type": "pixel_shuffle", "projection_kwargs": {"num_layers": 1, "norm": "none", "bias": False}}
STACK = {"projection_type": "frame_stack", "projection_kwargs": {"stack_factor": 4}}


def own(encoder, processor, projector=None, template=None, name="vision", **selection):
    """A composition of Qwen3, and its processor."""
    model = composed(encoder, language_model("qwen3", vocab_size=384), projector, name, token=None, **selection)
    parts = {} if processor is None else {name: processor}
    return model, MultimodalProcessor(tiny.tokenizer(template), parts, model=model)


def own_llava(encoder_type, template=None):
    encoder = tower(encoder_type)
    drop = 0 if encoder_type in WITHOUT_CLASS_TOKEN else 1
    name, settings = TOWERS[encoder_type]
    options = {"layer": encoder.config.num_hidden_layers, "drop_prefix": drop}
    return own(encoder, native_processors.images(name, **settings), template=template, **options)


def check_contained(model, processor, model_type, tmp_path):
    """Files of both, loaded by native classes alone: equal ids, tensors, chats and answers."""
    native, made = to_native(model, processor, model_type=model_type)
    native.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(made) and type(loaded).__module__.startswith("transformers.")
    token = processor.tokens["vision"]
    cases = [  # as images of one text, and of a batch
        ([f"a {token} b"], [(40, 30)]), ([f"{token}"], [(7, 200)]), ([f"{token}{token} c", "d", f"e {token}"], [(1, 1), (64, 64), (90, 31)]),
    ]  # fmt: skip
    for texts, sizes in cases:
        for mode in ("RGB", "L", "RGBA"):
            call = {"text": texts, "images": [picture(i, size, mode) for i, size in enumerate(sizes)], "padding": True}
            found, expected = loaded(**call, return_tensors="pt"), processor(**call, return_tensors="pt")
            assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    texts = {"text": ["a", "b c d"], "padding": True, "return_tensors": "pt"}
    assert torch.equal(loaded(**texts)["input_ids"], processor(**texts)["input_ids"])
    talk = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "a b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "image", "image": picture(1)}]},
    ]
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    found, expected = (one.apply_chat_template(talk, **asked) for one in (loaded, processor))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    answers = [
        own_memory(one).eval().generate(**expected, max_new_tokens=5, do_sample=False)
        for one in (model, getattr(transformers, type(native).__name__).from_pretrained(tmp_path))
    ]
    assert torch.equal(*answers)
    assert to_native(model, loaded, model_type=model_type)[1] is loaded


@pytest.mark.parametrize("encoder_type", sorted(TOWERS))
def test_llava_takes_the_processor_along(encoder_type, tmp_path):
    model, processor = own_llava(encoder_type)
    check_contained(model, processor, "llava", tmp_path)


OF_STRINGS = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
OF_PARTS = """{% for m in messages %}{{ m['role'] }}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize("template", [OF_STRINGS, OF_PARTS])
def test_chats_of_the_native_processor_are_those_of_ours(template, tmp_path):
    model, processor = own_llava("clip_vision_model", template)
    check_contained(model, processor, "llava", tmp_path)


def test_deepseek_vl_takes_the_processor_along(tmp_path):
    model, processor = own(tower("siglip_vision_model"), native_processors.images("Siglip"))
    processor.tokenizer.padding_side = "left"
    check_contained(model, processor, "deepseek_vl", tmp_path)


def test_settings_of_the_tokenizer_made_after_loading_go_along(tmp_path):
    model, processor = own_llava("vit")
    processor.tokenizer.padding_side = processor.tokenizer.truncation_side = "left"
    check_contained(model, processor, "llava", tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert loaded.padding_side == loaded.truncation_side == "left"


def test_images_that_keep_their_aspect_are_compared_one_by_one(tmp_path):
    encoder = tower("dinov2")
    keeps = native_processors.images("Bit", size={"shortest_edge": 32}, do_center_crop=False)
    model, processor = own(encoder, keeps, layer=encoder.config.num_hidden_layers, drop_prefix=1)
    native, made = to_native(model, processor, model_type="llava")
    call = {"text": ["<image> a"], "images": [picture(0, (64, 32))], "return_tensors": "pt"}
    found, expected = made(**call), processor(**call)
    assert same_calls(expected, found) and found["pixel_values"].shape[-2:] == (64, 32)
    with torch.no_grad():
        assert torch.equal(*(own_memory(one).eval()(**expected).logits for one in (model, native)))


def test_native_models_without_a_processor_of_their_own_say_so():
    model, _ = from_native(native_types.build("glm_ocr"))
    name = next(iter(model.encoders))
    plain = MultimodalProcessor(tiny.tokenizer(), {name: tiny.qwen2_vl_processor()}, config=model.config)
    with pytest.raises(
        ValueError, match="a processor of 'glm_ocr' does not give the same: it makes text of items in a way"
    ):
        to_native(model, plain)


def test_a_processor_of_several_modalities_is_refused():
    model, _ = own_llava("vit")
    _, both = compose_tiny(["clip", "whisper"])
    with pytest.raises(
        ValueError, match="it has one placeholder, this one has .*'audio'.*: give the model's own processor"
    ):
        to_native(model, both, model_type="llava")


def whisper_sounds():
    return transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=250)


UNLIKE = {
    "idefics3": (lambda: own(tower("siglip_vision_model"), native_processors.images("Siglip"), ONE_LAYER),
                 "Idefics3Processor does not give the same: it writes tokens of its own around"),
    "smolvlm": (lambda: own(tower("siglip_vision_model"), native_processors.images("Siglip"), ONE_LAYER),
                "SmolVLMProcessor does not give the same: it writes tokens of its own around"),
    "internvl": (lambda: own(tower("internvl_vision"), native_processors.images("ViT"), SHUFFLE, drop_prefix=1),
                 "InternVLProcessor does not give the same: it writes tokens of its own around"),
    "voxtral": (lambda: own(tower("whisper", encoder_ffn_dim=128), whisper_sounds(), STACK, name="audio"),
                "VoxtralProcessor does not give the same: it reads text by the tokenizer of mistral-common"),
    "qwen2_audio": (lambda: own(tower("qwen2_audio_encoder"), whisper_sounds(), LINEAR, name="audio"),
                    r"of an item it makes \d+ placeholders, and this one \d+; convert the model alone"),
    "audioflamingo3": (lambda: own(tower("audioflamingo3_encoder"), whisper_sounds(), name="audio"),
                       "AudioFlamingo3Processor does not give the same: "),
    "llava": (lambda: own(tower("internvl_vision"), native_processors.images("GotOcr2", crop_to_patches=False),
                          drop_prefix=1, layer=2), "num_patches is given by it alone"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(UNLIKE))
def test_a_native_processor_that_gives_something_else_is_refused(model_type):
    build, told = UNLIKE[model_type]
    model, processor = build()
    assert type(to_native(model, model_type=model_type)).__module__.startswith("transformers.")
    with pytest.raises(ValueError, match=told):
        to_native(model, processor, model_type=model_type)


def test_a_processor_of_another_model_is_refused():
    model, processor = own_llava("vit")
    other = MultimodalProcessor(tiny.tokenizer(), processor.processors, config=model.config, tokens={"vision": "<pic>"})
    with pytest.raises(
        ValueError, match=r"vision: '<pic>' has the id \d+ in this processor, and the model's placeholder is \d+"
    ):
        model.set_modality_token_ids({"vision": 7})
        to_native(model, other, model_type="llava")


def test_a_processor_without_one_of_the_modality_is_refused():
    model, processor = own(tower("vit"), None, layer=2, drop_prefix=1)
    with pytest.raises(ValueError, match="this one has none for vision; convert the model alone"):
        to_native(model, processor, model_type="llava")


def test_a_checkpoints_own_processor_is_not_replaced(pairs, tmp_path):
    _, processor, _, _ = pairs("llava")
    with pytest.raises(TypeError, match="A checkpoint has its own processor"):
        from_native((str(tmp_path), processor))
