"""Every encoder and language model of transformers, frozen, with every rate of dropout set: in training it gives what it
gives in evaluation, with and without checkpointing."""

import catalog
import catalog_llms
import catalog_others
import catalog_vision
import pytest
import tiny
import torch
from dropping import LayerRuns, drop_everywhere
from mixed_samples import PLACEHOLDERS, inputs
from shrunk import built

from cornstarch_hf import ModalEncoderModule, MultimodalModel

ENCODERS = sorted({*catalog_vision.CASES, *catalog_others.CASES} - set(catalog_others.NO_FEATURES))
CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
# Language models whose layers share keys and values beside their outputs: reentrant checkpointing would lose gradients.
SHARING = ("gemma3n_text", "gemma4_text", "gemma4_unified_text")
pytestmark = pytest.mark.catalog


def with_encoder(name):
    """A model with an encoder that drops, and a language model."""
    case = catalog.cases()[name]
    torch.manual_seed(0)
    module = built(catalog.found_class(name, case.folder), drop_everywhere(catalog.config_of(name)), **case.options)
    encoder = ModalEncoderModule(module, kind=case.kind, **case.module_kwargs)
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama())
    return model.freeze("media_encoder.module")


def with_language_model(model_type):
    """A model with a language model that drops, and encoders that do not."""
    encoders = {"vision": ModalEncoderModule(tiny.clip()), "audio": ModalEncoderModule(tiny.whisper())}
    language_model = built(
        catalog_llms.model_class(model_type), drop_everywhere(catalog_llms.configuration(model_type))
    )
    model = MultimodalModel(encoders=encoders, language_model=language_model)
    model.set_modality_token_ids(PLACEHOLDERS)
    return model


def settings(model):
    """The model in training mode, by the name of how it checkpoints; those that it can."""
    for name, options in CHECKPOINTING.items():
        if options is not None:
            model.gradient_checkpointing_enable(options)
        yield name, model.train()


def given(name, tracked=False):
    """Inputs of items together; `tracked` as if what comes before the encoder trained."""
    found = catalog.joined(name, catalog.together(name))
    return {k: v.clone().requires_grad_(v.is_floating_point()) if tracked else v for k, v in found.items()}


def features(model, name, tracked=False):
    return torch.cat(list(model.media_encoder(**given(name, tracked)).pooler_output))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frozen_encoder_drops_nothing(name):
    model = with_encoder(name)
    with torch.no_grad():
        expected = features(model.eval(), name)
    tracked = features(model, name, tracked=True)
    flows = model.media_encoder.select(**given(name, tracked=True)).last_hidden_state.requires_grad
    for setting, training in settings(model):
        assert torch.equal(features(training, name), expected), setting
        with LayerRuns(model.media_encoder.module) as runs:
            found = features(training, name, tracked=True)
            again = runs.again(found.sum().backward)
        # Reentrant checkpointing runs the layers without gradients at first, for which some have another kernel.
        assert torch.equal(found, tracked) or (torch.equal(found, expected) and setting == "reentrant"), setting
        assert bool(again) == (setting != "off" and flows and bool(runs.calls)), setting


@pytest.mark.parametrize("model_type", catalog_llms.SUPPORTED)
def test_a_frozen_language_model_drops_nothing_and_checkpoints(model_type):
    batch = inputs()
    model = with_language_model(model_type)
    recomputed = {}
    for frozen in (False, True):
        if frozen:
            model.gradient_checkpointing_disable()
            model.freeze("language_model")
            expected = model.eval()(**batch, use_cache=False).logits
            with torch.no_grad():
                without = model(**batch, use_cache=False).logits
        for setting, training in settings(model):
            if setting == "reentrant" and model_type in SHARING:
                with pytest.raises(ValueError, match="hands tensors to later layers beside its output"):
                    training(**batch)
                continue
            with LayerRuns(model.language_model) as runs:
                logits = training(**batch).logits
                again = runs.again(logits.sum().backward)
            if frozen:
                equal = torch.equal(logits, expected) or (torch.equal(logits, without) and setting == "reentrant")
                assert equal, setting
            recomputed[frozen, setting] = again
    assert not recomputed[True, "off"]
    for setting in ("reentrant", "not reentrant")[model_type in SHARING :]:
        assert recomputed[True, setting] == {name for name, _ in runs.calls} >= recomputed[False, setting], setting
