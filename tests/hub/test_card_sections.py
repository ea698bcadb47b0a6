"""The sections of a card: picture, parts, tokens, requirements; names that break nothing."""

import re

import pytest
import tiny
from flowcharts import read_flowchart
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from cornstarch_hf.composition import summaries
from cornstarch_hf.hub.card import card_text

ORIGINS = {
    "vision_encoder": {"repo_id": "user/tiny-clip", "revision": "0a" * 20},
    "language_model": {"repo_id": "user/tiny_llama", "revision": "0b" * 20},
}


def section(title, *arguments, origins=None, **options):
    """A section of a model's card, without its heading."""
    if origins is not None:
        arguments[0].config.origins = dict(origins)
    return card_text(*arguments, **options).split(f"\n## {title}\n\n")[1].split("\n\n## ")[0].strip("\n")


def table_of(title, *arguments, **options):
    return cells(section(title, *arguments, **options).split("\n\n")[0])


def description(model):
    return card_text(model).split("\n\n")[2]


def parts_table(model, origins, trainer=None):
    return table_of("Parts", model, origins=origins, trainer=trainer)


def tokens_table(model):
    return table_of("Placeholders", model)


def usage(model, processor, repo_id, include_code, references):
    components = {"language_model", *(f"{name}_encoder" for name in model.config.encoders)}
    origins = dict.fromkeys(references, ORIGINS["language_model"])
    embed = sorted(components - set(references))
    return section("Usage", model, processor, repo_id, include_code, embed, origins=origins)


def cells(text):
    header, rule, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.split("\n")]
    assert set(rule) == {"---"} and all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def drawn(model, origins=()):
    model.config.origins = dict(origins)
    return read_flowchart(re.search(r"^```mermaid\n(.*?)\n```$", card_text(model), re.S | re.M)[1])


def test_description_names_the_encoders_and_the_language_model():
    one, two = (description(compose_tiny(keys)[0]) for keys in (["clip"], ["clip", "esm"]))
    assert one.startswith(
        "1 encoder (`vision` for image) joined to the language model `LlamaForCausalLM` by a projector:"
    )
    assert two.startswith("2 encoders (`vision` for image, `protein` for text) joined")


def test_the_picture_leads_from_each_input_through_encoder_and_projector_to_the_language_model():
    inner, edges = drawn(compose_tiny(["clip", "whisper"])[0], ORIGINS)
    by_label = {label[0] if label[0] != "projector" else tuple(label): node for node, label in inner.items()}
    assert inner[by_label["vision_encoder"]] == ["vision_encoder", "CLIPVisionModel", "user/tiny-clip"]
    assert inner[by_label["audio_encoder"]] == ["audio_encoder", "WhisperEncoder"]
    follow = dict(edges)
    for kind in ("image", "audio"):
        path = [by_label[kind]]
        while path[-1] in follow:
            path.append(follow[path[-1]])
        labels = [inner[node] for node in path]
        assert labels[0] == [kind] and labels[1][0] == {"image": "vision", "audio": "audio"}[kind] + "_encoder"
        assert labels[2] == ["projector", "linear, 16 -> 32"] and labels[3] == ["embeddings in order"]
        assert labels[4] == ["language_model", "LlamaForCausalLM", "user/tiny_llama"] and labels[5:] == [["text"]]


def test_encoders_that_share_their_items_have_one_input_in_the_picture():
    model, _ = compose_tiny({"clip": "clip", "dino": "dinov2"})
    assert sum(label == ["image"] for label in drawn(model)[0].values()) == 2
    model.config.share_inputs = [["clip", "dino"]]
    nodes, edges = drawn(model)
    (node,) = [node for node, label in nodes.items() if label == ["image"]]
    assert sum(start == node for start, _ in edges) == 2


def test_names_that_are_words_of_mermaid_and_classes_with_odd_names():
    llama = tiny.llama()
    llama.__class__ = type('A"B<script>#`', (type(llama),), {})
    encoders = {name: ModalEncoderModule(tiny.clip(seed=i)) for i, name in enumerate(("end", "graph", "style"))}
    model = MultimodalModel(encoders=encoders, language_model=llama)
    nodes, _ = drawn(model)
    assert ["language_model", 'A"B<script>#`'] in nodes.values() and [
        "end_encoder",
        "CLIPVisionModel",
    ] in nodes.values()
    assert parts_table(model, {})[0]["class"] == '`` A"B<script>#` ``'


def test_parts_are_listed_with_base_size_and_training(tmp_path):
    model, _ = compose_tiny(["clip", "whisper"])
    model.freeze("vision_encoder.module", "language_model.lm_head")
    rows = {row["part"].strip("`"): row for row in parts_table(model, ORIGINS)}
    for part in summaries(model):
        assert rows[part.where]["parameters"] == f"{part.total:,}" and rows[part.where]["dtype"] == part.dtypes
    assert rows["vision_encoder.module"]["set to train"] == "frozen"
    assert rows["vision_encoder.projector"]["set to train"] == "all"
    head = model.language_model.lm_head.weight.numel()
    assert (
        rows["language_model"]["set to train"]
        == f"{sum(p.numel() for p in model.language_model.parameters()) - head:,}"
    )
    assert rows["vision_encoder.module"]["base"] == "[user/tiny-clip](https://huggingface.co/user/tiny-clip)"
    assert rows["language_model"]["revision"] == f"[0b0b0b0](https://huggingface.co/user/tiny_llama/tree/{'0b' * 20})"
    assert rows["vision_encoder.projector"]["base"] == rows["audio_encoder.module"]["base"] == ""
    assert rows["vision_encoder.projector"]["class"] == r"`MultimodalProjector` (linear, 16 -\> 32)"
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    assert "trained" in parts_table(model, {}, trainer=tmp_path)[0]


def test_adapters_are_told_with_their_rank_and_targets():
    config = LoraConfig(r=2, target_modules=["v_proj", "q_proj"], modules_to_save=["lm_head"])
    model, _ = compose_tiny(["clip"], get_peft_model(tiny.llama(), config))
    row = parts_table(model, {})[0]
    assert row["set to train"].endswith("adapter `default` (LORA, r = 2, in `q_proj` `v_proj`, whole `lm_head`)")
    pattern = LoraConfig(r=4, target_modules=r".*\.(q|k)_proj")
    model, _ = compose_tiny(["clip"], get_peft_model(tiny.llama(), pattern))
    assert parts_table(model, {})[0]["set to train"].endswith(r"r = 4, in `.*\.(q\|k)_proj`)")


def test_placeholders_are_listed_with_their_features():
    model, processor = compose_tiny(
        ["clip", "esm"], vision={"layer": -2, "drop_prefix": 1}, protein={"output": "last_hidden_state"}
    )
    vision, protein = tokens_table(model)
    assert vision == {
        "modality": "`vision`", "kind": "image", "token": "`<image>`", "token id": str(processor.image_token_id),
        "features per item": "4", "taken from the encoder": "layer -2, without 1 leading tokens",
    }  # fmt: skip
    assert protein["features per item"] == "depends on the item"
    assert protein["taken from the encoder"] == r"last\_hidden\_state"


def test_odd_tokens_and_reasons_of_failure_stay_out_of_the_markup(monkeypatch):
    model, processor = compose_tiny(["clip"])
    made = MultimodalProcessor(
        processor.tokenizer, processor.processors, model=model, tokens={"vision": "<|image|`x`|>"}
    )
    assert made.tokens == {"vision": "<|image|`x`|>"}
    monkeypatch.setattr("cornstarch_hf.hub.card.features_per_item", lambda *_: "not known before a run (/home/alice)")
    (row,) = tokens_table(model)
    assert row["token"] == r"``<\|image\|`x`\|>``" and row["features per item"] == "not known before a run"


def test_a_model_without_a_processor_has_no_tokens_yet():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    assert tokens_table(model)[0]["token"] == "none yet"
    assert "holds no processor" in usage(model, None, "me/x", False, [])


@pytest.mark.parametrize(
    ("include_code", "references", "found", "missing"),
    [
        (False, [], "The first line makes transformers know", "trust_remote_code"),
        (True, [], "`trust_remote_code=True` runs: read it before", "The first line"),
        (False, ["language_model"], "The weights of `language_model` are not in this repository", "peft"),
    ],
)
def test_usage_says_what_is_needed(include_code, references, found, missing):
    text = usage(*compose_tiny(["clip"]), "me/x", include_code, references)
    assert found in text and missing not in text


def test_usage_of_adapters_and_of_items_that_are_left_out():
    model, processor = compose_tiny(["clip", "whisper"], get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])),
                                    vision={"additional_args": ["note"]})  # fmt: skip
    text = usage(model, processor, "me/x", False, [])
    assert "pip install peft" in text and "The example gives no `vision`:" in text


def test_training_and_licences(monkeypatch):
    model, _ = compose_tiny(["clip", "whisper"])
    monkeypatch.setattr("cornstarch_hf.hub.card.training_facts", lambda _: [("seed", "1"), ("a|b", "x")])
    assert table_of("Training", model, trainer="a run") == [
        {"what": "seed", "value": "1"},
        {"what": r"a\|b", "value": "x"},
    ]
    origins = ORIGINS | {"audio_encoder": ORIGINS["vision_encoder"]}
    found = table_of("Licences of the bases", model, origins=origins, licenses={"user/tiny-clip": "mit"}, token=False)
    assert [(row["parts"], row["licence"]) for row in found] == [
        ("`vision_encoder`, `audio_encoder`", "mit"),
        ("`language_model`", "unknown"),
    ]
