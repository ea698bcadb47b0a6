"""Features by content: what is encoded again, counted, and that nothing but the number of calls changes."""

import copy
import pickle
import threading

import native_models
import pytest
import tiles
import tiny
import torch
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    from_native,
)
from cornstarch_hf.encoders import feature_memo

GREEDY = {"max_new_tokens": 4, "do_sample": False}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
PICTURES = [tiny.image(i, (20 + 9 * i, 30)) for i in range(4)]
SOUNDS = [tiny.sound(i, 1600 + 400 * i) for i in range(3)]


def watched(model):
    """``(modality, items)`` of each call of an encoder, as they come."""
    found = []
    model.generation_config.eos_token_id = None
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(
            lambda module, args, output, name=name: found.append((name, len(output.pooler_output or ())))
        )
    return found


def call(processor, texts, **media):
    processor.tokenizer.padding_side = "left"
    return dict(processor(text=texts, return_tensors="pt", padding=True, **media))


def same_as_without(model, inputs, **options):
    """Tokens with the memo, which are those without it."""
    tokens = model.generate(**inputs, **GREEDY | options)
    memo, model._feature_memo = model._feature_memo, None
    calls = model.generate(**inputs, **GREEDY | options)
    model._feature_memo = memo
    assert torch.equal(tokens, calls)
    return tokens


ENCODERS = ["clip", "siglip", "dinov2", "convnext", "qwen2_vl"]


@pytest.mark.parametrize("key", ENCODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_talk_about_an_image_encodes_it_once(key, options):
    model, processor = compose_tiny({"vision": key})
    memo, found = model.remember_features(), watched(model)
    assert len(memo) == memo.bytes == 0
    for turns in range(1, 5):
        inputs = call(processor, ["what is <image>" + " and why" * turns], vision=PICTURES[:1])
        model.generate(**inputs, **GREEDY | options)
    assert found == [("vision", 1)] and (memo.hits, memo.misses, len(memo)) == (3, 1, 1)
    same_as_without(model, inputs, **options)


@pytest.mark.parametrize("key", ENCODERS)
def test_of_a_batch_the_new_items_are_encoded_together_and_all_stand_in_order(key):
    model, processor = compose_tiny({"vision": key})
    model.remember_features()
    found = watched(model)
    same_as_without(model, call(processor, ["<image> a", "b <image> <image>"], vision=[[PICTURES[0]], PICTURES[1:3]]))
    assert found == [("vision", 3)] * 2
    found.clear()
    mixed = call(
        processor, ["<image> <image> a", "<image> b <image>"], vision=[PICTURES[2:4], [PICTURES[0], PICTURES[3]]]
    )
    same_as_without(model, mixed)
    assert found == [("vision", 1), ("vision", 4)]  # the fourth picture, once for both rows


def test_features_are_equal_to_the_bit_and_nobody_elses():
    model, processor = compose_tiny(["clip"])
    inputs = call(processor, ["<image>"], vision=PICTURES[:1])
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        model.remember_features()
        for _ in range(3):
            output = model(**inputs).image_outputs
            assert torch.equal(output.pooler_output[0], expected)
            output.pooler_output[0].zero_()  # as a caller might
        logits = model(**inputs).logits
        model.forget_features()
        assert torch.equal(logits, model(**inputs).logits) and model._feature_memo is None


@pytest.mark.parametrize("key", ["whisper", "wav2vec2"])
def test_sounds_of_several_lengths(key):
    model, processor = compose_tiny({"audio": key})
    memo, found = model.remember_features(), watched(model)
    options = {"sampling_rate": 16_000}
    for i in (0, 1, 0, 1):
        same_as_without(model, call(processor, ["<audio> a"], audio=SOUNDS[i : i + 1], **options))
    assert found[::2] + found[1::2] and (memo.hits, memo.misses) == (2, 2)
    both = call(processor, ["<audio> a <audio>"], audio=[SOUNDS[:2]], **options)
    same_as_without(model, both)
    # Padding is no content where its encoder does not see it: of raw sound, and in a window of one length.
    assert memo.hits == 4
    hits = memo.hits
    same_as_without(model, both)
    assert memo.hits == hits + 2


def test_several_modalities_and_settings_of_a_call_are_told_apart():
    model, processor = compose_tiny({"one": "clip", "two": "siglip"})
    memo = model.remember_features()
    names = list(processor.tokens)
    text = " ".join(processor.tokens.values())
    inputs = call(processor, [text], **dict.fromkeys(names, PICTURES[:1]))
    same_as_without(model, inputs)
    assert memo.misses == 2
    with torch.no_grad():
        model(**inputs, interpolate_pos_encoding=False) if "interpolate_pos_encoding" in model.signature_changes("forward")[1] else None  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    assert memo.misses >= 4


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_what_is_said_of_items_comes_back_with_them(model_type):
    model = from_native(native_models.native(model_type))[0].eval()
    inputs = native_models.image_inputs(native_models.native(model_type))
    memo = model.remember_features()
    with torch.no_grad():
        first, second = model(**inputs), model(**inputs)
    assert memo.misses and memo.hits == memo.misses
    model.forget_features()
    with torch.no_grad():
        plain = model(**inputs)
    assert torch.equal(first.logits, plain.logits) and torch.equal(second.logits, plain.logits)
    assert torch.equal(second.image_outputs.feature_grids, plain.image_outputs.feature_grids)
    levels = [each.image_outputs.get("deepstack_features") for each in (second, plain)]
    assert (levels[0] is None) == (levels[1] is None) == (model_type == "qwen2_vl")
    for level, own in zip(*(x or [] for x in levels), strict=True):
        assert all(map(torch.equal, level, own))


@pytest.mark.parametrize("packing", ["concat", "unpad", "newline"])
def test_tiles_of_images_are_their_images(packing):
    model, processor = tiles.composed("LlavaNext", packing)
    memo, found = model.remember_features(), watched(model)
    for pictures in (PICTURES[:1], PICTURES[:2], PICTURES[1:2]):
        same_as_without(model, call(processor, ["<image> " * len(pictures)], images=[pictures]))
    assert (memo.misses, memo.hits) == (2, 2)
    assert found[::2] == [("vision", 1), ("vision", 1), ("vision", 1)] or len(found) == 5


@pytest.mark.parametrize("packed", [False, True])
def test_joined_encoders_are_run_together_or_not_at_all(packed):
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    towers = {name: {"model": tiny.qwen2_vl(seed=i), "processor": tiny.IMAGES["Qwen2VL"](**sizes)} for i, name in enumerate("ab")}  # fmt: skip
    if not packed:
        towers = {n: {"model": tiny.siglip(seed=i), "processor": tiny.siglip_processor()} for i, n in enumerate("ab")}
    group = [{"encoders": ["a", "b"], "join": "channels"}]
    model, processor = compose(tiny.llama(), towers, tokenizer=tiny.tokenizer(), share_inputs=group)
    model.eval()
    memo, found = model.remember_features(), watched(model)
    for pictures in (PICTURES[:1], PICTURES[:2]):
        same_as_without(model, call(processor, ["<image> " * len(pictures)], images=[pictures]))
    assert (memo.misses, memo.hits) == (2, 1) and found.count(("a", 1)) == 3
    with torch.no_grad():
        model.b_encoder.module.get_parameter(next(n for n, _ in model.b_encoder.module.named_parameters())).mul_(2)
    same_as_without(model, call(processor, ["<image>"], images=PICTURES[:1]))
    assert memo.misses == 3


def changed_weight(model):
    with torch.no_grad():
        next(model.vision_encoder.module.parameters()).mul_(1.5)


def changed_projector(model):
    with torch.no_grad():
        model.vision_encoder.projector.projection.weight.add_(1)


def loaded_weights(model):
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})


def exchanged_projector(model):
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=16, out_features=32))
    projector.config = model.vision_encoder.projector.config
    model.vision_encoder.projector = projector.eval()


def given_data(model):
    parameter = next(model.vision_encoder.module.parameters())
    parameter.data = parameter.data * 1.5


CHANGES = {
    "weight": changed_weight,
    "projector": changed_projector,
    "state": loaded_weights,
    "exchanged": exchanged_projector,
    "data": given_data,
    "dtype": lambda model: model.to(torch.float64),
    "callback": lambda model: setattr(
        model.vision_encoder, "postprocess_module_callback", lambda inputs, output: output
    ),
    "selection": lambda model: setattr(model.vision_encoder, "selection", feature_memo_selection(model)),
    "hook": lambda model: model.vision_encoder.module.register_forward_hook(lambda module, args, output: None),
    "attention": lambda model: model.set_attn_implementation("eager"),
}


def feature_memo_selection(model):
    return type(model.vision_encoder.selection)(layer=-2)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_features_is_seen(change):
    model, processor = compose_tiny(["clip"])
    memo = model.remember_features()
    inputs = call(processor, ["<image> a"], vision=PICTURES[:1])
    same_as_without(model, inputs)
    CHANGES[change](model)
    same_as_without(model, inputs)
    same_as_without(model, inputs)
    assert (memo.misses, memo.hits) == (2, 1)
    if change in ("weight", "projector", "state", "exchanged"):
        assert len(memo) == 1  # features of weights that are gone are not kept


def test_activations_and_their_settings_are_seen():
    parts = {"vision": ModalEncoderModule(tiny.clip(), MultimodalProjector(MultimodalProjectorConfig(), torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LeakyReLU(0.1))))}  # fmt: skip
    model = MultimodalModel(encoders=parts, language_model=tiny.llama()).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    memo, inputs = model.remember_features(), call(processor, ["<image> a"], vision=PICTURES[:1])
    same_as_without(model, inputs)
    model.vision_encoder.projector.projection[1].negative_slope = 0.7
    same_as_without(model, inputs)
    model.vision_encoder.projector.projection[1] = torch.nn.Tanh().eval()
    same_as_without(model, inputs)
    assert memo.misses == 3


def test_features_of_each_adapter_are_kept_beside_each_other():
    clip = get_peft_model(tiny.clip(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    clip.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(clip)}, language_model=tiny.llama()).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    memo, inputs = model.remember_features(), call(processor, ["<image> a"], vision=PICTURES[:1])
    tokens = []
    for turn in range(2):
        for adapter in ("default", "other"):
            clip.set_adapter(adapter)
            model.eval()
            tokens.append(same_as_without(model, inputs))
            assert memo.misses == (2 if turn else 1 + (adapter == "other"))
    with clip.disable_adapter():
        same_as_without(model, inputs)
    assert (memo.misses, memo.hits) == (3, 2)


def test_where_gradients_flow_or_chance_decides_nothing_is_remembered():
    model, processor = compose_tiny(["clip"])
    memo = model.remember_features()
    inputs = call(processor, ["<image> a"], vision=PICTURES[:1])
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    assert output.image_outputs.last_hidden_state is not None  # the encoder's own output, as ever
    model.train()
    with torch.no_grad():
        model(**inputs)
    model.eval().vision_encoder.module.train()
    with torch.no_grad():
        model(**inputs)
    assert memo.hits == memo.misses == len(memo) == 0
    model.eval()
    same_as_without(model, inputs)
    assert memo.misses == 1


def test_what_does_not_tell_its_items_is_encoded_as_ever():
    model, processor = compose_tiny(["clip"])
    inputs = call(processor, ["<image> a"], vision=PICTURES[:1])
    model.vision_encoder.preprocess_callback = lambda inputs: inputs
    memo = model.remember_features()
    same_as_without(model, inputs)
    model.vision_encoder.preprocess_callback = None
    model.vision_encoder.additional_args = ["speaker"]
    with torch.no_grad():
        encoder, own = model.vision_encoder, {"pixel_values": torch.rand(2, 3, 8, 8)}
        for speaker in (torch.tensor(3), torch.arange(3), object(), torch.ones(2, device="meta")):
            assert len(memo.encode(encoder, own | {"speaker": speaker}, {}).pooler_output) == 2
        assert memo.misses == 0
        memo.encode(encoder, own | {"speaker": torch.arange(2)}, {})
        memo.encode(encoder, own | {"speaker": torch.tensor([0, 5])}, {})
        assert (memo.misses, memo.hits) == (3, 1)
        memo.encode(encoder, own | {"speaker": "one"}, {})
        memo.encode(encoder, own | {"speaker": "another"}, {})
        assert memo.misses == 7


def test_the_oldest_leave_where_there_are_too_many_bytes():
    model, processor = compose_tiny(["clip"])
    inputs = [call(processor, ["<image> a"], vision=[picture]) for picture in PICTURES]
    size = feature_memo._ENTRY_BYTES + 5 * 32 * 4  # of five features in float32
    memo = model.remember_features(max_bytes=2 * size)
    for i in (0, 1, 0, 2, 0, 1):  # 1 leaves for 2, and 2 for 1
        same_as_without(model, inputs[i])
        assert memo.bytes <= memo.max_bytes and len(memo) <= 2
    assert (memo.hits, memo.misses, memo.bytes) == (2, 4, 2 * size)
    memo.clear()
    assert (len(memo), memo.bytes) == (0, 0)
    small = model.remember_features(max_bytes=size - 1)  # less than one item takes
    same_as_without(model, inputs[0])
    assert (len(small), small.bytes, small.misses) == (0, 0, 1) and len(memo) == 0
    for wrong in (0, -1, 1.5, True, "1GB", None):
        with pytest.raises(ValueError, match="max_bytes must be a positive integer, got"):
            model.remember_features(max_bytes=wrong)


def test_it_is_neither_copied_nor_saved(tmp_path):
    model, processor = compose_tiny(["clip"])
    model.remember_features()
    same_as_without(model, call(processor, ["<image> a"], vision=PICTURES[:1]))
    assert copy.deepcopy(model)._feature_memo is None
    assert pickle.loads(pickle.dumps(model._feature_memo)) is None
    model.save_pretrained(tmp_path)
    assert MultimodalModel.from_pretrained(tmp_path)._feature_memo is None
    assert not [name for name in model.state_dict() if "memo" in name]


def test_a_number_of_states_and_weights_that_are_gone(monkeypatch):
    monkeypatch.setattr(feature_memo, "_STATES", 3)
    model, processor = compose_tiny(["clip"])
    memo, inputs = model.remember_features(), call(processor, ["<image> a"], vision=PICTURES[:1])
    for layer in (-1, -2, 0, 1, -1):
        model.vision_encoder.selection = type(model.vision_encoder.selection)(layer=layer)
        same_as_without(model, inputs)
    assert memo.misses == 5 and len(memo) == len(memo._states) == 3
    changed_weight(model)
    same_as_without(model, inputs)
    assert len(memo) == len(memo._states) == 1 and memo.bytes < 2_000


def test_threads_share_it():
    model, processor = compose_tiny(["clip"])
    inputs = [call(processor, ["<image> a <image>"], vision=[PICTURES[i : i + 2]]) for i in range(3)]
    expected = [model.generate(**each, **GREEDY) for each in inputs]
    memo, found, failed = model.remember_features(max_bytes=3_000), watched(model), []
    model.generation_config.eos_token_id = None
    expected = [model.generate(**each, **GREEDY) for each in inputs]

    def serve(start):
        for i in range(12):
            if not torch.equal(model.generate(**inputs[(start + i) % 3], **GREEDY), expected[(start + i) % 3]):
                failed.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and memo.hits + memo.misses == 6 + 4 * 12 * 2 and memo.bytes <= 3_000
    assert sum(items for _, items in found) == memo.misses
    assert memo.bytes == sum(size for _, size in memo._entries.values())


def test_inference_mode_and_tensors_that_were_made_in_it():
    model, processor = compose_tiny(["clip"])
    memo, inputs = model.remember_features(), call(processor, ["<image> a"], vision=PICTURES[:1])
    with torch.inference_mode():
        model.generate(**inputs, **GREEDY)
    tokens = same_as_without(model, inputs)
    assert (memo.misses, memo.hits) == (1, 1)
    with torch.inference_mode():  # such weights do not tell when they are written into
        model.vision_encoder.projector.projection.weight = torch.nn.Parameter(torch.rand(32, 16), requires_grad=False)
        model.generate(**inputs, **GREEDY)
    assert memo.misses == 1 and tokens.shape[0] == 1
