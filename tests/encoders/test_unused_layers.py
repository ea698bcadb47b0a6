"""Layers behind the selected hidden states do not run: the same bits, counted calls; what needs the whole encoder gets it."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter

import catalog
import pytest
import tiny
import torch
import transformers
from helpers import compose_tiny, uneven_inputs
from packaging.version import Version
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.encoders import module as encoder_module
from cornstarch_hf.encoders import unused_layers
from cornstarch_hf.parts.registries import ALONE

TOKEN = tiny.VOCABULARY - 1


def features(encoder, inputs, *say):
    return encoder.features(dict(inputs), say)[2].last_hidden_state


# Encoders of all families: everything behind the selected hidden state is left out.
CUT = (
    *("Aimv2VisionModel", "BeitModel", "CLIPVisionModel", "ConvNextModel", "Data2VecAudioModel", "DeiTModel"),
    *("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "DPTModel", "EsmModel", "HubertModel"),
    *("Idefics3VisionTransformer", "IJepaModel", "InternVLVisionModel", "JanusVisionModel", "MLCDVisionModel"),
    *("PixtralVisionModel", "Qwen2AudioEncoder", "Siglip2VisionModel", "SiglipVisionModel", "SwinModel"),
    *("T5EncoderModel", "VideoMAEModel", "ViTModel", "ViTMSNModel", "Wav2Vec2Model", "WavLMModel", "WhisperEncoder"),
)
# Before transformers 5.23 these draw a number for each layer in evaluation too, which later draws would notice.
DRAWING = ("Data2VecAudioModel", "HubertModel", "Wav2Vec2Model", "WavLMModel")
DRAWS = Version(transformers.__version__) < Version("5.23")
# Encoders that run whole, and why.
WHOLE = {
    "BlipVisionModel": "fresh weights are so small that all hidden states are the same",
    "CanineModel": "hidden states of several lists of layers in a row",
    "ClapAudioModel": "hidden states are brought into another form behind the layers",
    "MobileViTModel": "hidden states without the first one",
    "ParakeetEncoder": "the output tells which rows are features",
    "SegformerModel": "hidden states without the first one",
}


@contextlib.contextmanager
def whole():
    """Every encoder runs whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "states_alone", lambda *_: None)
        yield


@contextlib.contextmanager
def counted(*layers):
    """Calls of some layers by their place, without hooks."""
    calls = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for place, layer in enumerate(layers):
            layer.__dict__["place"] = place  # copies of a layer have it too
        for cls in set(map(type, layers)):

            def run(self, *args, forward=cls.forward, **kwargs):
                if "place" in self.__dict__:
                    calls[self.place] += 1
                return forward(self, *args, **kwargs)

            patch.setattr(cls, "forward", run)
        yield calls
    for layer in layers:
        del layer.__dict__["place"]


def composed(module, layer=-2, kind=None, language_model=None, **options):
    encoder = ModalEncoderModule(module, kind=kind, layer=layer, **options)
    torch.manual_seed(3)
    model = MultimodalModel(encoders={"media": encoder}, language_model=language_model or tiny.llama()).eval()
    model.set_modality_token_ids({"media": TOKEN})
    return model


def inputs_of(model, items):
    """A batch of items, (items, ...) each, in rows that hold as many placeholders as they have features."""
    names = model.config.modality("media")["input_names"]
    encoder = copy.deepcopy(model.media_encoder)  # the model itself has not been called
    with torch.no_grad():
        counts = [len(features) for features in encoder(**dict(items)).pooler_output]
    ids = torch.full((len(counts), max(counts) + 2), 7)
    for row, count in enumerate(counts):
        ids[row, 1 : 1 + count] = TOKEN
    return {"input_ids": ids} | {name: items[key] for name, key in names.items() if key in items}


def pixels(items=2, seed=0):
    return {"pixel_values": torch.randn(items, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def clip_model(layer=-2, module=None, **options):
    """A composition with a tower of three layers, its inputs and its layers."""
    model = composed(module or tiny.clip(), layer, **options)
    tower = model.media_encoder.module
    layers = next(m for name, m in tower.named_modules() if name.endswith("encoder.layers"))
    return model, inputs_of(model, pixels()), layers


def results(model, inputs):
    """Logits and gradients by name; None of parameters that have none."""
    model.zero_grad(set_to_none=True)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == TOKEN, -100)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    logits = torch.zeros(0) if output.logits is None else output.logits.detach().clone()
    return logits, {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(found[1][name], gradient), name


def check(model, inputs, layers, runs):
    """The bits of the whole model, twice (at the first call it is found out), with as many layers from the first one."""
    with whole():
        expected = results(model, inputs)
    assert_equal(results(model, inputs), expected)
    with counted(*layers) as calls:
        assert_equal(results(model, inputs), expected)
    assert calls == dict.fromkeys(range(runs), 1)


def plans(model):
    return list(unused_layers._PLANS.get(model.media_encoder.module, {}).values())


# ---- types


@pytest.mark.parametrize("layer", [-2, -3])
@pytest.mark.parametrize("name", catalog.here(CUT))
def test_logits_and_gradients_are_the_same_and_layers_behind_do_not_run(name, layer):
    case = catalog.cases()[name]
    model = composed(catalog.build(name), layer, case.kind, **case.module_kwargs)
    inputs = inputs_of(model, catalog.joined(name, catalog.together(name)))
    with whole():
        expected = results(model, inputs)
    assert_equal(results(model, inputs), expected)
    (plan,) = plans(model)
    layers = model.media_encoder.module.get_submodule(".".join(plan.path))
    with counted(*layers) as calls:
        assert_equal(results(model, inputs), expected)
    cut = not (DRAWS and name in DRAWING and layer == -3)
    assert sorted(calls) == list(range(len(layers) + (1 + layer) * cut)) and plan.equal == {False: cut}
    gradients = results(model, inputs)[1]
    assert any(g is not None for key, g in gradients.items() if key.startswith("media_encoder.module"))


@pytest.mark.parametrize("name", catalog.here(WHOLE))
def test_encoders_whose_hidden_states_are_no_inputs_of_layers_run_whole(name):
    case = catalog.cases()[name]
    model = composed(catalog.build(name), -2, case.kind, **case.module_kwargs)
    inputs = inputs_of(model, catalog.joined(name, catalog.together(name)))
    with whole():
        expected = results(model, inputs)
    for _ in range(4):
        assert_equal(results(model, inputs), expected)
    assert all(plan.path is None and plan.tries == 0 for plan in plans(model))
    with torch.no_grad():
        outputs = vars(model(**inputs))
        kind = model.media_encoder.kind
        assert outputs.get(f"{kind}_outputs", outputs.get("media_outputs")).last_hidden_state is not None
    pickle.loads(pickle.dumps(model))


def test_blip_is_told_by_weights_of_ordinary_size():
    case = catalog.Case(catalog.cases()["BlipVisionModel"].items, redraw=True)
    model = composed(catalog.build("BlipVisionModel", case))
    inputs = inputs_of(model, catalog.joined("BlipVisionModel", catalog.together("BlipVisionModel")))
    check(model, inputs, model.media_encoder.module.encoder.layers, 1)


# ---- selections


@pytest.mark.parametrize(
    ("layer", "runs"), [(0, 0), (1, 1), (2, 2), (-2, 2), (-3, 1), ([-2, -3], 2), ([1, 0], 1), (-4, 0)]
)
def test_the_deepest_selected_state_decides(layer, runs):
    model, inputs, layers = clip_model(layer, drop_prefix=1)
    check(model, inputs, layers, runs)


@pytest.mark.parametrize("layer", [-1, 3, [-1, -3], [3, 0]])
def test_the_last_state_needs_all_layers(layer):
    model, inputs, layers = clip_model(layer)
    check(model, inputs, layers, 3)


def test_a_layer_that_does_not_exist_is_refused_as_before():
    model, inputs, _ = clip_model()
    model.media_encoder.selection = encoder_module.Selection(layer=-9)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer -9 does not exist, the encoder gives 4 hidden states"):
            model(**inputs)


def test_another_layer_may_be_selected_later():
    model, inputs, layers = clip_model()
    check(model, inputs, layers, 2)
    for layer, runs in ((-3, 1), (-1, 3), (-2, 2)):
        model.media_encoder.selection = encoder_module.Selection(layer=layer)
        check(model, inputs, layers, runs)


# ---- who else reads the encoder's output


def test_what_was_not_computed_is_left_out_of_the_output():
    model, inputs, _ = clip_model()
    for _ in range(2):
        found = model(**inputs).image_outputs
        assert list(found) == ["pooler_output"] and found.last_hidden_state is None and found.hidden_states is None
    with whole():
        expected = model(**inputs).image_outputs
    assert torch.equal(torch.stack(found.pooler_output), torch.stack(expected.pooler_output))


def test_who_asks_for_features_alone_gets_the_whole_output():
    model, inputs, layers = clip_model()
    model(**inputs)
    given = {"pixel_values": inputs["pixel_values"]}
    expected = model.media_encoder.module(**given, output_hidden_states=True)
    with counted(*layers) as calls:
        outputs = [model.get_image_features(**given), model.media_encoder(**given)]
    assert calls == dict.fromkeys(range(3), 2)
    for output in outputs:
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


def reading(inputs, output):
    assert len(output.hidden_states) == 4 and output.pooler_output is not None
    return output


@pytest.mark.parametrize("where", ["callback", "output", "wish of the configuration", "wish"])
def test_who_reads_more_of_the_output_gets_the_whole_encoder(where):
    options = {"postprocess_module_callback": reading} if where == "callback" else {}
    model, inputs, layers = clip_model(**options)
    if where == "output":
        model.media_encoder.selection = encoder_module.Selection("last_hidden_state", -2)
    if where == "wish of the configuration":
        model.set_attn_implementation({"media_config": "eager"})
        model.media_encoder.module.config.output_attentions = True
    asked = {"output_attentions": True} if where == "wish" else {}
    with counted(*layers) as calls:
        found = model.media_encoder(say=(ALONE,), pixel_values=inputs["pixel_values"], **asked)
    assert calls == dict.fromkeys(range(3), 1) and found.last_hidden_state is not None


def test_generation_encodes_with_the_needed_layers_once():
    model, inputs, layers = clip_model()
    with whole():
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for calls_expected in ({}, {0: 1, 1: 1}):  # at first it is found out
        with counted(*layers) as calls:
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(found, expected) and (not calls_expected or calls == calls_expected)


# ---- the user's modules stay as they are


def test_the_encoder_itself_is_not_changed():
    tower = tiny.clip().eval()
    given = pixels()
    expected = tower(**given, output_hidden_states=True)
    before = {name: {**m.__dict__, "_forward_hooks": dict(m._forward_hooks)} for name, m in tower.named_modules()}
    keys, parameters = list(tower.state_dict()), dict(tower.named_parameters())
    encoder = ModalEncoderModule(tower, layer=-2)
    for _ in range(3):
        assert torch.equal(features(encoder, given, ALONE), expected.hidden_states[-2])
    after = {name: {**m.__dict__, "_forward_hooks": dict(m._forward_hooks)} for name, m in tower.named_modules()}
    assert after == before and list(tower.state_dict()) == keys
    assert all(parameters[name] is p for name, p in tower.named_parameters())
    assert len(encoder._modules) == 2 and list(encoder.state_dict()) == [f"module.{key}" for key in keys]
    again = tower(**given, output_hidden_states=True)
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state) and len(again.hidden_states) == 4


def test_saving_and_loading_and_copies_have_all_layers(tmp_path):
    model, inputs, layers = clip_model()
    keys = list(model.state_dict())
    check(model, inputs, layers, 2)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    others = [MultimodalModel.from_pretrained(tmp_path).eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        assert list(other.state_dict()) == keys == list(model.state_dict())
        assert torch.equal(other(**inputs).logits, logits)
        check(other, inputs, other.media_encoder.module.encoder.layers, 2)
    other = others[1]
    other.media_encoder.module.encoder.layers[0].mlp.fc1.weight.data.zero_()
    assert torch.equal(model(**inputs).logits, logits) and not torch.equal(other(**inputs).logits, logits)


def test_nothing_is_kept_of_an_encoder_that_is_gone():
    model, inputs, _ = clip_model()
    model(**inputs)
    tower = weakref.ref(model.media_encoder.module)
    del model
    gc.collect()
    assert tower() is None


# ---- pickles


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [by_pickle, by_torch, copy.deepcopy])
@pytest.mark.parametrize("layer", [-2, [-1, -2], -1])
def test_a_model_pickles_after_every_kind_of_call(way, layer):
    model, inputs, _ = clip_model(layer)
    given = {"pixel_values": inputs["pixel_values"]}
    model(**inputs)
    model.get_image_features(**given, output_hidden_states=True)  # to which transformers adds its hooks
    assert any(m._forward_hooks for m in model.media_encoder.modules())
    expected = model(**inputs).logits
    for other in (way(model), way(model)):
        assert not any(m._forward_hooks for m in other.media_encoder.modules())
        assert torch.equal(other(**inputs).logits, expected)
        states = other.get_image_features(**given, output_hidden_states=True).hidden_states
        assert all(map(torch.equal, states, model.get_image_features(**given, output_hidden_states=True).hidden_states))
    encoder = way(model.media_encoder)
    assert torch.equal(encoder.module(**given).last_hidden_state, model.media_encoder.module(**given).last_hidden_state)


def test_pickles_keep_ties_modes_and_other_hooks_and_copies_share_the_encoder():
    model, inputs, layers = clip_model(-1)
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    model.freeze("media_encoder.module")
    layers[2].register_forward_hook(noting)
    model.get_image_features(pixel_values=inputs["pixel_values"], output_hidden_states=True)
    other = by_pickle(model)
    there = other.media_encoder.module.encoder.layers
    assert there[1].mlp.fc1.weight is there[0].mlp.fc1.weight and not there[0].mlp.fc1.weight.requires_grad
    assert list(there[2]._forward_hooks.values()) == [noting] and not there[0]._forward_hooks
    assert copy.copy(model.media_encoder).module is model.media_encoder.module
    assert any(m._forward_hooks for m in layers[0].modules())  # the original keeps its own


NOTED = []


def noting(module, *_):
    NOTED.append(type(module).__name__)


# ---- hooks of users


HOOKS = {
    "forward": lambda m: m.register_forward_hook(noting),
    "before": lambda m: m.register_forward_pre_hook(noting),
    "backward": lambda m: m.register_full_backward_hook(noting),
}
PLACES = ("encoder.layers.2", "encoder.layers.2.mlp.fc1", "post_layernorm", "encoder", "")


@pytest.mark.parametrize("early", [False, True], ids=["later", "from the beginning"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_what_would_not_run_are_called(kind, place, early):
    model, inputs, layers = clip_model()
    results(model, inputs) if not early else None
    handle = HOOKS[kind](model.media_encoder.module.get_submodule(place))
    with whole():
        NOTED.clear()
        results(model, inputs)
        expected = list(NOTED)
    for _ in range(3):
        NOTED.clear()
        results(model, inputs)
        assert expected == NOTED
    assert expected or kind == "backward"  # whose layer has no part in the loss
    handle.remove()
    check(model, inputs, layers, 2)


@pytest.mark.parametrize("place", ["embeddings", "encoder.layers.0", "encoder.layers.1.mlp"])
def test_hooks_on_what_runs_are_called_once_for_each_call(place):
    model, inputs, layers = clip_model()
    model.media_encoder.module.get_submodule(place).register_forward_hook(noting)
    NOTED.clear()
    for _ in range(3):
        model(**inputs)
    assert len(NOTED) == 3
    check(model, inputs, layers, 2)


def test_hooks_on_all_modules_see_all_modules():
    model, inputs, _ = clip_model()
    model(**inputs)
    handle = nn.modules.module.register_module_forward_hook(noting)
    try:
        NOTED.clear()
        model(**inputs)
    finally:
        handle.remove()
    assert NOTED.count("CLIPEncoderLayer") == 3


@pytest.mark.parametrize("early", [False, True], ids=["later", "from the beginning"])
def test_a_hook_that_changes_what_a_layer_gives_is_followed(early):
    model, inputs, layers = clip_model()
    before = model(**inputs).logits if not early else None
    layers[0].register_forward_hook(lambda module, args, output: output * 2)
    check(model, inputs, layers, 3 if early else 2)  # at the check it gives other states than the encoder alone
    assert before is None or not torch.equal(model(**inputs).logits, before)


# ---- changes afterwards


def test_a_layer_that_was_exchanged_is_the_one_that_runs():
    model, inputs, layers = clip_model()
    model(**inputs)
    layers[0] = copy.deepcopy(layers[1])
    check(model, inputs, layers, 2)
    layers[0].mlp.fc1 = nn.Linear(16, 32)
    check(model, inputs, layers, 2)


def test_an_encoder_with_fewer_layers_counts_from_its_own_last_one():
    model, inputs, layers = clip_model()
    model(**inputs)
    del layers[2]
    check(model, inputs, layers, 1)


def test_an_exchanged_list_of_layers_is_checked_again():
    model, inputs, _ = clip_model()
    before = model(**inputs).logits
    other, fresh = tiny.clip(seed=5), clip_model()[0]
    fresh.load_state_dict(model.state_dict())
    fresh.media_encoder.module.encoder = copy.deepcopy(other.encoder)
    model.media_encoder.module.encoder = other.encoder
    found = [model(**inputs).logits for _ in range(2)]
    with whole():  # of modules to which transformers has hooked nothing so far
        expected = fresh(**inputs).logits
    assert all(torch.equal(x, expected) for x in found) and not torch.equal(expected, before)
    check(model, inputs, other.encoder.layers, 2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, frozen):
    model, inputs, _ = clip_model()
    model(**inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if frozen:
        model.freeze("media_encoder.module")
    model.train()
    with whole():
        expected = results(model, inputs)
    for _ in range(2):
        assert_equal(results(model, inputs), expected)
    gradients = results(model, inputs)[1]
    assert any(g is not None for n, g in gradients.items() if n.startswith("media_encoder.module")) != frozen


@pytest.mark.parametrize("change", ["adapters inside", "attention", "dtype", "frozen", "training"])
def test_what_is_done_to_a_model_after_a_call_holds(change):
    model, inputs, layers = clip_model()
    model(**inputs)
    if change == "adapters inside":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.media_encoder.module)
    elif change == "attention":
        model.set_attn_implementation({"media_config": "eager"})
    elif change == "dtype":
        model.double()
    elif change == "frozen":
        model.freeze("media_encoder.module")
    else:
        model.train()
    check(model, inputs, layers, 2)


@pytest.mark.parametrize("trained", [False, True])
def test_wrapped_encoders(trained):
    tower = get_peft_model(tiny.clip(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model, inputs, layers = clip_model(module=tower)
    check(model.train(trained), inputs, layers, 2)
    with model.media_encoder.module.disable_adapter():
        check(model, inputs, layers, 2)
    pickle.loads(pickle.dumps(model))


# ---- random numbers and statistics


def after_seed(model, inputs):
    torch.manual_seed(11)
    return results(model, inputs)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_draws_random_numbers_leaves_the_same_to_draw(frozen):
    """Dropout in the layers behind, and then in the language model, which has the same numbers."""
    tower, llama = tiny.clip(attention_dropout=0.5), tiny.llama(attention_dropout=0.5)
    model, inputs, layers = clip_model(module=tower, language_model=llama)
    if frozen:
        model.freeze("media_encoder.module")
    for training in (True, False, True):
        model.train(training)
        with whole():
            expected = after_seed(model, inputs)
        for _ in range(3):
            assert_equal(after_seed(model, inputs), expected)
        with counted(*layers) as calls:
            after_seed(model, inputs)
        assert len(calls) == (3 if training and not frozen else 2)


def test_layers_that_are_left_out_at_random_draw_as_before():
    model = composed(tiny.whisper(encoder_layerdrop=0.5, encoder_layers=3), -2)
    inputs = inputs_of(model, {"input_features": torch.randn(2, 8, 12)})
    model.train()
    with whole():
        expected = after_seed(model, inputs)
    for _ in range(4):
        assert_equal(after_seed(model, inputs), expected)
    check(model.eval(), inputs, model.media_encoder.module.layers, 2)


def normed():
    tower = tiny.clip()
    tower.pre_layrnorm = nn.Sequential(tower.pre_layrnorm, nn.BatchNorm1d(5))
    tower.encoder.layers[2].mlp.activation_fn = nn.Sequential(nn.GELU(), nn.BatchNorm1d(5))
    return tower


def test_statistics_of_batches_move_once_for_each_call():
    models = [clip_model(module=normed())[0].train() for _ in range(2)]
    inputs = clip_model()[1]
    for _ in range(3):
        results(models[0], inputs)
        with whole():
            results(models[1], inputs)
    for one, other in zip(*(m.media_encoder.module.buffers() for m in models), strict=True):
        assert torch.equal(one, other)
    check(models[0].eval(), inputs, models[0].media_encoder.module.encoder.layers, 2)


class Remembering(type(tiny.clip())):
    """Keeps something of each call with itself."""

    def forward(self, pixel_values=None, **kwargs):
        self.seen = pixel_values
        return super().forward(pixel_values, **kwargs)


class Swallowing(type(tiny.clip())):
    """Makes nothing of whatever fails."""

    def forward(self, pixel_values=None, **kwargs):
        try:
            return super().forward(pixel_values, **kwargs)
        except Exception:
            return BaseModelOutput(torch.zeros(2, 5, 16))


def test_an_encoder_that_keeps_something_of_its_calls_runs_whole():
    model, inputs, layers = clip_model(module=Remembering(tiny.clip().config))
    check(model, inputs, layers, 3)
    assert model.media_encoder.module.seen is inputs["pixel_values"]


def test_an_encoder_that_goes_on_after_errors_gives_the_same():
    model, inputs, layers = clip_model(module=Swallowing(tiny.clip().config))
    check(model, inputs, layers, 2)


# ---- calls of other kinds


def test_a_forward_of_somebody_elses_on_an_instance_is_called():
    model, inputs, layers = clip_model()
    model(**inputs)
    last, calls = layers[2], []
    last.forward = lambda *args, **kwargs: (calls.append(1), type(last).forward(last, *args, **kwargs))[1]
    model(**inputs)
    assert calls == [1]


def test_compiled_models_give_the_same():
    model, inputs, _ = clip_model()
    expected = model(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(**inputs).logits, expected)


def test_an_encoder_that_was_compiled_runs_whole():
    model, inputs, layers = clip_model()
    expected = model(**inputs).logits
    layers[2].compile(backend="eager")
    with counted(*layers) as calls:
        assert torch.equal(model(**inputs).logits, expected)
    assert calls[2] >= 1


def test_an_error_of_the_encoder_is_its_own_and_the_next_call_is_as_any():
    model, inputs, layers = clip_model()
    wrong = inputs | {"pixel_values": torch.randn(2, 3, 12, 12)}
    with pytest.raises(ValueError, match=r"takes pixel_values of 3 x 8 x 8, got 3 x 12 x 12"):
        model(**wrong)
    check(model, inputs, layers, 2)
    with pytest.raises(ValueError, match=r"takes pixel_values of 3 x 8 x 8, got 3 x 12 x 12"):
        model(**wrong)


def test_threads_that_call_one_model_get_the_same():
    model, inputs, layers = clip_model()
    with whole(), torch.no_grad():
        expected = model(**inputs).logits
    found, gate = [], threading.Barrier(4)

    def run():
        gate.wait()
        for _ in range(5):
            with torch.no_grad():
                found.append(torch.equal(model(**inputs).logits, expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    check(model, inputs, layers, 2)


def test_frames_of_videos():
    model = composed(tiny.clip(), kind="video")
    given = {"pixel_values": torch.randn(2, 3, 3, 8, 8)}
    check(model, inputs_of(model, given), model.media_encoder.module.encoder.layers, 2)


def test_joined_encoders_each_run_as_far_as_needed():
    encoders = {
        "vision": ModalEncoderModule(tiny.clip(), layer=-2, drop_prefix=1),
        "other": ModalEncoderModule(tiny.clip(seed=4), layer=-3, drop_prefix=1),
    }
    model = MultimodalModel(
        encoders=encoders,
        language_model=tiny.llama(),
        share_inputs=[{"encoders": ["vision", "other"], "join": "channels"}],
    ).eval()
    model.set_modality_token_ids({"vision": TOKEN})
    names = {n: m["input_names"] for n, m in ((n, model.config.modality(n)) for n in encoders)}
    given = {key: pixels()["pixel_values"] for key in (*names["vision"], *names["other"]) if "pixel_values" in key}
    inputs = {"input_ids": torch.tensor([[1, *[TOKEN] * 4, 2]] * 2), **given}
    for name, runs in (("vision", 2), ("other", 1)):
        check(model, inputs, encoders[name].module.encoder.layers, runs)
    found = model.get_image_features(**given)
    assert found.last_hidden_state is not None


def test_several_encoders_in_one_model():
    model, processor = compose_tiny(["clip", "whisper"], vision={"layer": -2}, audio={"layer": -2})
    inputs = uneven_inputs(processor)
    with whole(), torch.no_grad():
        expected = model(**inputs).logits
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
    towers = (model.vision_encoder.module.encoder.layers, model.audio_encoder.module.layers)
    for layers in towers:
        with counted(*layers) as calls, torch.no_grad():
            model(**inputs)
        assert set(calls) == set(range(len(layers) - 1))
    pickle.loads(pickle.dumps(model))


def test_compiled_whole_after_a_call():
    """transformers hooks its recorders to a tower at its first call, which a compiler cannot trace."""
    model, processor = compose_tiny(["clip"], vision={"layer": -2})
    inputs = uneven_inputs(processor)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)
