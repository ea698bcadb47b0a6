"""Conversations that go on behind a cache: what the encoders see again, counted, and that answers stay the same."""

import copy

import native_processors
import pytest
import tiles
import tiny
import torch
from helpers import compose_tiny

from cornstarch_hf import compose, from_native
from cornstarch_hf.encoders import continuing
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.parts.versions import CACHE

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
KEYWORD = CACHE or "cache"


@pytest.fixture
def seen(monkeypatch):
    """``(modality, items)`` of each call of an encoder in a composed model, as they come."""
    found = []

    def watch(model):
        model.generation_config.eos_token_id = None
        for name, encoder in model.encoders.items():
            encoder.register_forward_hook(
                lambda module, args, output, name=name: found.append((name, len(output.pooler_output or ())))
            )
        return found

    return watch


def media_of(processor, items, **options):
    """The encoders' inputs of items by modality, without text."""
    text = "".join(processor.tokens[name] * len(own) for name, own in items.items())
    made = processor(text=[text], return_tensors="pt", **{name: own for name, own in items.items() if own}, **options)
    return {key: value for key, value in made.items() if key not in TEXT}


def talk(model, processor, found, turns, **options):
    """What was encoded in each turn, ``(text, items by modality)``; each answer is that of the whole talk without a cache."""
    ids, cache, given, encoded = torch.zeros(1, 0, dtype=torch.long), None, {name: [] for name in processor.tokens}, []
    for text, new in turns:
        turn = processor(text=[text], return_tensors="pt", **new, **options)["input_ids"]
        given = {name: own + new.get(name, []) for name, own in given.items()}
        ids = torch.cat([ids, turn], 1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | media_of(processor, given, **options)
        found.clear()
        answer = model.generate(**whole, **GREEDY, **({} if cache is None else {KEYWORD: cache}))
        encoded.append(sorted(found))
        expected = model.generate(**whole, **GREEDY)
        assert torch.equal(answer.sequences, expected.sequences)
        ids, cache = answer.sequences, answer[KEYWORD]
    return encoded


PICTURES = [tiny.image(i, (20 + 9 * i, 30)) for i in range(3)]
ABOUT_ONE = [("what is <image>", {"vision": PICTURES[:1]}), ("and why", {}), ("the sum", {}), ("a b c", {})]


@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2", "qwen2_vl"])
@pytest.mark.parametrize("language_model", ["llama", "qwen3"])
def test_an_image_is_encoded_once_in_a_talk_about_it(seen, encoder, language_model):
    model, processor = compose_tiny({"vision": encoder}, tiny.LANGUAGE_MODELS[language_model]())
    assert talk(model, processor, seen(model), ABOUT_ONE) == [[("vision", 1)], [], [], []]


@pytest.mark.parametrize("encoder", ["clip", "qwen2_vl"])
def test_of_new_turns_the_new_items_alone_are_encoded(seen, encoder):
    model, processor = compose_tiny({"vision": encoder})
    turns = [
        ("what is <image> <image>", {"vision": PICTURES[:2]}), ("no", {}), ("and <image> then", {"vision": PICTURES[2:]}),
        ("a", {}), ("<image><image>", {"vision": PICTURES[:2]}),
    ]  # fmt: skip
    assert talk(model, processor, seen(model), turns) == [[("vision", 2)], [], [("vision", 1)], [], [("vision", 2)]]


def test_modalities_are_told_apart(seen):
    model, processor = compose_tiny(["clip", "whisper"])
    sound = {"array": tiny.sound(), "sampling_rate": 16_000}
    turns = [
        ("<image>", {"vision": PICTURES[:1]}),
        ("<audio> a", {"audio": [sound]}),
        ("b <image>", {"vision": PICTURES[1:2]}),
    ]
    assert talk(model, processor, seen(model), turns) == [[("vision", 1)], [("audio", 1)], [("vision", 1)]]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen3_vl", "llava_next", "gemma3", "idefics3"])
def test_native_models_too(seen, model_type):
    if model_type not in native_processors.PROCESSORS:
        pytest.skip(f"the processor of {model_type} needs torchvision")
    model, processor = from_native(native_processors.pair(model_type))
    token = processor.tokens["vision"]
    turns = [(f"what is {token}", {"vision": PICTURES[:1]}), ("and why", {}), ("the sum", {}), ("a b c", {})]
    first, *rest = talk(model, processor, seen(model), turns)
    assert [name for name, _ in first] == ["vision"] and rest == [[], [], []]


@pytest.mark.parametrize("packing", ["concat", "unpad"])
def test_tiles_of_an_image_too(seen, packing):
    model, processor = tiles.composed("LlavaNext", packing)
    first, *rest = talk(model, processor, seen(model), ABOUT_ONE)
    assert [name for name, _ in first] == ["vision"] and rest == [[], [], []]


@pytest.mark.parametrize("packed", [False, True])
def test_joined_encoders_too(seen, packed):
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    first = {"model": tiny.qwen2_vl(), "processor": tiny.IMAGES["Qwen2VL"](**sizes)}
    towers = {"a": first, "b": {"model": tiny.qwen2_vl(seed=1), "processor": tiny.IMAGES["Qwen2VL"](**sizes)}}
    if not packed:
        towers = {"a": {"model": tiny.siglip(), "processor": tiny.siglip_processor()}}
        towers["b"] = {"model": tiny.siglip(seed=1), "processor": tiny.siglip_processor()}
    group = [{"encoders": ["a", "b"], "join": "channels"}]
    model, processor = compose(tiny.llama(), towers, tokenizer=tiny.tokenizer(), share_inputs=group)
    turns = [("what is <image>", {"a": PICTURES[:1]}), ("and why", {}), ("the sum", {})]
    first, *rest = talk(model, processor, seen(model), turns)
    assert "a" in {name for name, _ in first} and rest == [[], []]


def test_what_cannot_be_counted_is_encoded_as_before(seen, monkeypatch):
    model, processor = compose_tiny({"vision": "clip"})

    def refuse(*args):
        raise ValueError("no count")

    first = processor(text=["a <image>"], vision=PICTURES[:1], return_tensors="pt")
    found, cache, ids, media = seen(model), None, first.pop("input_ids"), {"pixel_values": first["pixel_values"]}
    monkeypatch.setattr(FeatureCounter, "count", refuse)
    counts = []
    for _ in range(2):
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | media
        answer = model.generate(**whole, **GREEDY, **({} if cache is None else {KEYWORD: cache}))
        counts.append(len(found))
        ids, cache = torch.cat([answer.sequences, torch.tensor([[7]])], 1), answer[KEYWORD]
    assert counts == [1, 2]


def test_another_number_of_items_than_the_talk_has_is_refused(seen):
    model, processor = compose_tiny({"vision": "clip"})
    found = seen(model)
    first = processor(text=["a <image>"], vision=PICTURES[:1], return_tensors="pt")
    answer = model.generate(**first, **GREEDY)
    ids = torch.cat([answer.sequences, torch.tensor([[7, 8]])], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    two = media_of(processor, {"vision": PICTURES[:2]})
    with pytest.raises(ValueError, match="vision: the text has 0 placeholder tokens .* gave 10 features"):
        model.generate(**whole, **two, **GREEDY, **{KEYWORD: copy.deepcopy(answer[KEYWORD])})
    assert found[-1] == ("vision", 2)


def test_another_configuration_is_counted_anew(seen):
    model, processor = compose_tiny({"vision": "clip"})
    assert talk(model, processor, seen(model), ABOUT_ONE[:2]) == [[("vision", 1)], []]
    _, counter = continuing._COUNTERS[model]
    assert continuing._counter_of(model) is counter
    model.vision_encoder.layer = -2
    model.config.modality("vision")["layer"] = -2
    assert continuing._counter_of(model) is not counter


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 3}])
def test_beams_go_on_from_a_repeated_cache_with_a_new_image(options):
    model, processor = compose_tiny({"vision": "clip"})
    model.generation_config.eos_token_id = None
    first = processor(text=["a <image> b"], vision=PICTURES[:1], return_tensors="pt")
    answer = model.generate(**first, **GREEDY)
    turn = processor(text=[" and <image> c"], vision=PICTURES[1:2], return_tensors="pt")
    ids = torch.cat([answer.sequences, turn["input_ids"]], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | media_of(processor, {"vision": PICTURES[:2]})
    answer[KEYWORD].batch_repeat_interleave(3)
    found = model.generate(**whole, **GREEDY | options, **{KEYWORD: answer[KEYWORD]})
    assert torch.equal(found.sequences, model.generate(**whole, **GREEDY | options).sequences)


def test_beams_of_several_rows_behind_a_cache_are_refused():
    model, processor = compose_tiny({"vision": "clip"})
    model.generation_config.eos_token_id = None
    first = processor(text=["a <image> b"] * 2, vision=[PICTURES[:1]] * 2, return_tensors="pt")
    answer = model.generate(**first, **GREEDY)
    turn = processor(text=[" and <image> c"] * 2, vision=[PICTURES[1:2]] * 2, return_tensors="pt")
    ids = torch.cat([answer.sequences, turn["input_ids"]], 1)
    pixels = torch.cat([first["pixel_values"][:1], turn["pixel_values"][:1]] * 2)
    answer[KEYWORD].batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="ask for one answer each, without beams"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, num_beams=2, **GREEDY,
                       **{KEYWORD: answer[KEYWORD]})  # fmt: skip
