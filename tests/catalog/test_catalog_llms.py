"""Every causal language model type of transformers under a vision and an audio encoder, or the reason why not."""

import os
import re

import catalog_llms
import pytest
import tiny
import torch
from mixed_samples import IMAGE, PLACEHOLDERS, inputs
from own_memory import check_comes_back
from transformers import AutoModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.language_model import label_loss

pytestmark = pytest.mark.catalog
# Float noise of a batched against a single matrix product and of a shifted rotary angle, relative to the largest logit.
# The processor of `make test-any-processor` rounds more than real ones, and comes to 2.4e-5.
NOISE = 4e-5 if os.environ.get("ANY_PROCESSOR") else 2e-5
STEPS = 3


def composed(model_type):
    """A language model of that type with CLIP (5 features per image) and Whisper (6 per sound)."""
    encoders = {"vision": ModalEncoderModule(tiny.clip()), "audio": ModalEncoderModule(tiny.whisper())}
    torch.manual_seed(1)
    model = MultimodalModel(encoders=encoders, language_model=catalog_llms.build(model_type)).eval()
    model.set_modality_token_ids(PLACEHOLDERS)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def one(batch, sample):
    """A sample alone, without padding."""
    keep = batch["attention_mask"][sample].bool()
    alone = {"input_ids": batch["input_ids"][sample][keep][None]}
    if sample < 2:
        alone["pixel_values"] = batch["pixel_values"][sample : sample + 1]
    if sample == 0:
        alone["input_features"] = batch["input_features"]
    return alone


def merged_by_hand(model, alone):
    """``(1, length, hidden)``: the language model's own embedding of the ids, the projected features put in."""
    ids = alone["input_ids"]
    embeds = model.language_model.get_input_embeddings()(ids)
    for name, key in (("vision", "pixel_values"), ("audio", "input_features")):
        if key in alone:
            encoder = getattr(model, f"{name}_encoder")
            features = encoder.projector.projection(encoder.module(alone[key]).last_hidden_state)
            where = (ids == PLACEHOLDERS[name])[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, features.to(embeds))
    return embeds


def own_inputs(model, ids):
    """What some language models take beside embeddings, as their native multimodal models give it."""
    text, extra = model.language_model.model if hasattr(model.language_model, "model") else None, {}
    placeholders = torch.isin(ids, torch.tensor(list(PLACEHOLDERS.values())))
    if getattr(model.language_model.config, "hidden_size_per_layer_input", 0):
        beyond = ids >= text.config.vocab_size_per_layer_input  # Gemma 3n reads these as token 0
        table = text.embed_tokens_per_layer(ids.masked_fill(placeholders | beyond, 0))
        extra["per_layer_inputs"] = table.unflatten(-1, (-1, text.config.hidden_size_per_layer_input))
    if getattr(model.language_model.config, "ple_layer_ids", None):
        extra["ple_input_ids"] = ids
    return extra


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=NOISE * max(1.0, expected.abs().max().item()))


def check_padding(model, batch):
    logits = model(**batch).logits
    assert logits.isfinite().all()
    for sample in range(3):
        keep = batch["attention_mask"][sample].bool()
        close(logits[sample][keep], model(**one(batch, sample)).logits[0])


def check_cache(model, batch):
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**batch, **options)
    added = torch.ones(3, STEPS, dtype=torch.long)
    whole = batch | {"input_ids": found.sequences, "attention_mask": torch.cat([batch["attention_mask"], added], 1)}
    close(torch.stack(found.logits, 1), model(**whole, use_cache=False).logits[:, -STEPS - 1 : -1])


def check_greedy(model, batch):
    found = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    for sample in range(3):
        alone = one(batch, sample)
        for _ in range(STEPS):
            ids = alone["input_ids"]
            logits = model.language_model(
                inputs_embeds=merged_by_hand(model, alone), **own_inputs(model, ids), use_cache=False
            ).logits[0, -1]
            logits[list(PLACEHOLDERS.values())] = -torch.inf
            alone["input_ids"] = torch.cat([ids, logits.argmax()[None, None]], 1)
        assert torch.equal(found[sample], alone["input_ids"][0, -STEPS:]), sample


def check_training(model, batch):
    """The loss is the language model's own, the router's share of it included where its configuration asks for it."""
    alone = one(batch, 0)
    labels = alone["input_ids"].masked_fill(alone["input_ids"] >= IMAGE, -100)
    routed = getattr(model.language_model.config, "output_router_logits", None) is not None
    losses = []
    for wanted in (False, True) if routed else (None,):
        if routed:
            model.language_model.config.output_router_logits = wanted
        given = {"inputs_embeds": merged_by_hand(model, alone), "labels": labels, "use_cache": False}
        expected = model.language_model(**given, **own_inputs(model, alone["input_ids"]))
        found = model(**alone, labels=labels, use_cache=False)
        assert torch.equal(found.loss, expected.loss) and found.loss.isfinite()
        losses.append(found.loss)
    if getattr(found, "aux_loss", None) is not None:
        assert wanted and found.aux_loss > 0 and losses[1] > losses[0]
    found.loss.backward()
    gradients = [p.grad for p in model.vision_encoder.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


def check_round_trip(model, batch, folder):
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    assert type(again) is MultimodalModel and type(again.language_model) is type(model.language_model)
    check_comes_back(model, again, batch)


@pytest.mark.parametrize("model_type", catalog_llms.SUPPORTED)
def test_composes(model_type, tmp_path):
    model, batch = composed(model_type), inputs()
    with torch.no_grad():
        check_padding(model, batch)
        check_cache(model, batch)
        check_greedy(model, batch)
        check_round_trip(model, batch, tmp_path)
    check_training(model, batch)


def without_dropout(model):
    for module in model.modules():
        for name in [key for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)]:
            setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("routed", [False, True], ids=["", "routed"])
@pytest.mark.parametrize("model_type", catalog_llms.SUPPORTED)
def test_loss_at_labels(model_type, routed, monkeypatch):
    """Loss and gradients of a head that runs at labels alone, of all of these and of eight at once."""
    model = without_dropout(composed(model_type))
    text = model.language_model.config
    if routed:
        if getattr(text, "output_router_logits", None) is None:
            pytest.skip("has no router whose loss could be asked for")
        text.output_router_logits = True
        text.router_aux_loss_coef = model.language_model.router_aux_loss_coef = 0.5
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))

    def ran(labels, at_labels, at_once=2**24):
        monkeypatch.setattr(label_loss, "LOGITS_AT_ONCE", at_once)
        model.config.loss_at_labels = at_labels
        model.zero_grad()
        torch.manual_seed(2)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False)
        output.loss.backward()
        assert ("logits" in output) is not at_labels
        return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    some = ids.masked_fill(torch.arange(24) < torch.tensor([[20], [17]]), -100)
    for labels in (some, ids):
        loss, expected = ran(labels, False)
        scale = max(grad.norm() for grad in expected.values())
        for at_once in (2**24, 8 * text.get_text_config().vocab_size):
            found, got = ran(labels, True, at_once)
            torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
            assert got.keys() == expected.keys()
            # of all weights together; Gemma 4's layers make 4e-6 of the rounding of its head, all others less than 5e-7
            limit = 1e-5 if model_type.startswith("gemma4") else 1e-6
            assert max((got[name] - expected[name]).norm() for name in got) <= limit * scale


@pytest.mark.parametrize("model_type", catalog_llms.REFUSED)
def test_is_refused(model_type):
    with pytest.raises(ValueError, match=re.escape(catalog_llms.REFUSED[model_type])):
        composed(model_type)


@pytest.mark.parametrize("model_type", catalog_llms.UNBUILT)
def test_cannot_be_built_by_transformers(model_type):
    with pytest.raises(Exception, match=re.escape(catalog_llms.UNBUILT[model_type])):
        catalog_llms.build(model_type)


@pytest.mark.parametrize("model_type", catalog_llms.SUPPORTED)
def test_is_tiny(model_type):
    with torch.device("meta"):
        model = catalog_llms.model_class(model_type)(catalog_llms.configuration(model_type))
    assert sum(p.numel() for p in model.parameters()) <= 500_000
    rows, width = model.get_input_embeddings().weight.shape
    assert width == catalog_llms.HIDDEN and rows in range(catalog_llms.VOCABULARY, catalog_llms.VOCABULARY + 9)


def test_every_type_has_a_row():
    rows = catalog_llms.rows()
    assert len({model_type for model_type, _, _ in rows}) == len(rows) == len(catalog_llms.TYPES)
    assert sum(word == "yes" for _, _, word in rows) == len(catalog_llms.SUPPORTED)
