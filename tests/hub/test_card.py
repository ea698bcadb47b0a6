"""The whole card: metadata, sections, the mark of an unedited card, short cards, and nothing private in it."""

import getpass
import json
import re
import socket

import pytest
import tiny
from helpers import compose_tiny, needs_attaching
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from trainers import trainer
from transformers import Trainer

from cornstarch_hf.hub.card import MARK, card_text, is_edited, merged_card

COMMIT = "0a" * 20
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def origins(**repos):
    return {component: {"repo_id": repo, "revision": COMMIT, "class": "X"} for component, repo in repos.items()}


@pytest.fixture
def pair():
    return compose_tiny(["clip", "whisper"])


def data(*arguments, **options):
    return ModelCard(card_text(*arguments, **options)).data.to_dict()


def headings(card):
    return re.findall(r"^#+ .*$", re.sub(r"```.*?```", "", card, flags=re.S), re.M)


def test_sections_in_order(pair):
    assert headings(card_text(*pair, "me/sum_of")) == [r"# sum\_of", "## Usage", "## Parts", "## Placeholders"]
    model, processor = pair
    model.config.origins = origins(language_model="user/llama")
    card = card_text(model, processor)
    assert headings(card)[0] == "# Composed multimodal model" and headings(card)[-1] == "## Licences of the bases"
    assert card.count("```mermaid") == 1 and "No record of a training run was given" in card
    assert "so the metadata states none for the whole" in card
    assert card == card_text(model, processor)


@pytest.mark.parametrize(
    ("encoders", "task"),
    [
        (["clip"], "image-text-to-text"),
        ({"a": "clip", "b": "siglip"}, "image-text-to-text"),
        (["whisper"], "audio-text-to-text"),
        (["clip", "whisper"], "any-to-any"),
        (["esm"], "text-generation"),
        (["clip", "esm"], "image-text-to-text"),
    ],
)
def test_task_and_tags_are_those_of_the_kinds(encoders, task):
    found = data(*compose_tiny(encoders), "me/x")
    assert found["pipeline_tag"] == task and found["library_name"] == "cornstarch_hf"
    assert found["tags"][:2] == ["cornstarch_hf", "multimodal"] and "base_model" not in found and "license" not in found


def test_video_tasks():
    model, processor = compose_tiny({"clip": "clip", "film": "siglip"}, film={"kind": "video"})
    assert data(model, processor)["pipeline_tag"] == "image-text-to-text"
    assert data(*compose_tiny({"film": "siglip"}, film={"kind": "video"}))["pipeline_tag"] == "video-text-to-text"


def test_the_library_is_the_one_that_loads_it(pair):
    assert data(*pair, "me/x", include_code=True)["library_name"] == "transformers"
    assert "trust_remote_code=True" in card_text(*pair, "me/x", include_code=True)


def test_bases_and_their_relation(pair):
    model, processor = pair
    model.config.origins = origins(vision_encoder="user/clip", language_model="user/llama")
    found = data(model, processor, "me/x")
    assert found["base_model"] == ["user/clip", "user/llama"] and found["base_model_relation"] == "merge"
    for embed, missing in ((False, "`language_model`, `vision_encoder`"), (["vision_encoder"], "`language_model`")):
        card = card_text(model, processor, "me/x", embed=embed)
        assert ModelCard(card).data.to_dict()["base_model_relation"] == "adapter"
        assert f"The weights of {missing} are not in this repository" in card
    model.config.origins = origins(vision_encoder="user/clip", language_model="user/clip")
    found = data(model, processor, "me/x")
    assert found["base_model"] == ["user/clip"] and found["base_model_relation"] == "finetune"


def test_licences(pair):
    model, processor = pair
    model.config.origins = origins(vision_encoder="user/clip", language_model="user/llama")
    known = {"user/clip": "mit", "user/llama": "mit"}
    assert "license" not in data(model, processor, licenses=known)  # nobody knows the sound encoder's
    model.config.origins |= origins(audio_encoder="user/clip")
    assert data(model, processor, licenses=known)["license"] == "mit"
    other = data(model, processor, licenses=known | {"user/llama": "apache-2.0"})
    assert (other["license"], other["license_name"]) == ("other", "those-of-its-parts")
    assert data(model, processor, licenses=known, license="cc-by-4.0")["license"] == "cc-by-4.0"


def test_adapters_and_own_tags_are_tagged():
    model, processor = compose_tiny(["clip"], get_peft_model(tiny.llama(), LoraConfig(**LORA)))
    model.add_model_tags(["trl", "sft", "a: b\nc"])
    tags = data(model, processor)["tags"]
    assert tags == ["cornstarch_hf", "multimodal", "image", "peft", "trl", "sft"]
    assert data(model, processor, tags=["sft", "digits"])["tags"] == [*tags, "digits"]
    assert data(model.vision_encoder.projector, tags=["digits"])["tags"] == ["cornstarch_hf", "multimodal", "digits"]
    with pytest.raises(ValueError, match="tags must be words such as 'chemistry', got"):
        card_text(model, processor, tags=["a b\n"])


def test_what_goes_into_links_is_checked(pair):
    model, processor = pair
    with pytest.raises(ValueError, match="repo_id must name a repository of the Hub"):
        card_text(model, processor, 'me/x")')
    model.config.origins = {"vision_encoder": {"repo_id": "../up", "revision": COMMIT}}
    with pytest.raises(ValueError, match="vision_encoder: the origin must name a repository"):
        card_text(model, processor, "me/x")


def test_facts_of_a_trainer_and_nothing_private(tmp_path, pair):
    model, processor = pair
    model.config._name_or_path = str(tmp_path / "base")
    options = {"run_name": "secret-run", "hub_token": "hf_secretsecret", "hub_model_id": "secret/model"}
    made = trainer(model, processor, tmp_path / "secret-output", **options)
    assert "## Training" not in card_text(model, processor, "me/x", trainer=made)
    made.train()
    made.state.log_history.append({"eval_row": "a row of data: secret"})
    card = card_text(model, processor, "me/x", trainer=made)
    assert "## Training" in headings(card) and "| optimizer steps | 2 |" in card and "| trained |" in card
    assert "generated_from_trainer" in ModelCard(card).data.tags and "No record" not in card
    for secret in ("secret", str(tmp_path), "/home/", "/tmp/", getpass.getuser() + "/", socket.gethostname()):
        assert secret not in card, secret


def test_a_card_is_kept_up_to_date_until_somebody_edits_it(pair):
    model, processor = pair
    card, later = card_text(model, processor, "me/x"), card_text(model, processor, "me/y")
    assert not is_edited(card) and merged_card(card, later) == later
    assert merged_card(None, card) == card and merged_card("", card) == card and merged_card("\n", card) == card
    for untouched in (card.replace("\n", "\r\n"), card.rstrip("\n"), card + "\n\n", "\ufeff" + card):
        assert not is_edited(untouched) and merged_card(untouched, later) == later
    edits = [
        card + "My own words.\n",
        card.replace("pipeline_tag: any-to-any", "pipeline_tag: image-text-to-text\nlicense: mit"),
        card.replace("## Parts", "## Pieces"),
        card.replace(" | all |", " | all  |", 1),
        re.sub(r"^<!-- Written by.*\n", "", card, flags=re.M),
        re.sub(r"sha256: [0-9a-f]{64}", "sha256: " + "0" * 64, card),
        card + card,
        "# By hand\r\n\r\nwith its own line ends\r\n",
    ]
    for edited in edits:
        assert is_edited(edited) and merged_card(edited, later) is edited and merged_card(edited, later, True) == later


def test_the_mark_does_not_show_and_the_metadata_reads(pair):
    card = card_text(*pair, "me/x")
    assert card.startswith("---\n") and len(re.findall(re.escape(MARK.split("{}")[0]), card)) == 1
    body = ModelCard(card).text
    assert (
        body.lstrip().startswith("<!-- Written by cornstarch_hf.")
        and ModelCard(card).data.library_name == "cornstarch_hf"
    )


def test_a_card_that_trainer_wrote_is_somebodys(tmp_path, pair):
    made = trainer(*pair, tmp_path)
    (tmp_path / "README.md").write_text(card_text(*pair, "me/x"))
    Trainer.create_model_card(made)  # as `trainer.push_to_hub` does: whatever was there is gone
    written = (tmp_path / "README.md").read_text()
    assert "cornstarch" not in written and is_edited(written)


# ---- short cards


def test_adapters_around_a_composed_model():
    model, processor = compose_tiny(["clip"])
    model.config._name_or_path = "user/composed"
    wrapped = get_peft_model(model, LoraConfig(modules_to_save=["projector"], **LORA))
    local = card_text(wrapped, processor, "me/adapters")
    assert "user/composed" not in local and "not on the Hub" in local
    model.config._commit_hash = COMMIT
    model.config._name_or_path = f"/home/alice/.cache/models--user--composed/snapshots/{COMMIT}"
    assert card_text(wrapped, processor, "me/adapters") == local
    model.config._name_or_path = "user/composed"
    card = card_text(wrapped, processor, "me/adapters")
    found = ModelCard(card).data.to_dict()
    assert (found["library_name"], found["base_model"], found["base_model_relation"]) == (
        "peft",
        "user/composed",
        "adapter",
    )
    assert "(LORA, r = 2, in `q_proj` `v_proj`, whole `projector`)" in card
    assert 'model = PeftModel.from_pretrained(model, "me/adapters")' in card and not is_edited(card)


@needs_attaching
def test_adapters_added_to_a_composed_model_that_was_loaded(tmp_path):
    model, processor = compose_tiny(["clip"])
    model.save_pretrained(tmp_path)
    model.add_adapter(LoraConfig(**LORA))
    card = card_text(model, processor, "me/adapters")
    assert headings(card) == ["# adapters"] and "Adapter `default` (LORA, r = 2, in `q_proj` `v_proj`)." in card
    assert ModelCard(card).data.library_name == "cornstarch_hf"
    (tmp_path / "README.md").write_text(card)
    Trainer.create_model_card(trainer(model, processor, tmp_path))


def test_a_projector_and_a_processor_alone(pair):
    model, processor = pair
    card = card_text(model.vision_encoder.projector, repo_id="me/projector", license="mit")
    assert "(linear, 16 -\\> 32)" in card and "544 parameters (float32)" in card
    assert 'MultimodalProjector.from_pretrained("me/projector")' in card and ModelCard(card).data.license == "mit"
    card = card_text(None, processor, "me/processor")
    assert "Placeholders: `<image>` for `vision`, `<audio>` for `audio`." in card and headings(card)[0] == "# processor"


def test_anything_else_has_no_card():
    for thing in (tiny.llama(), json, None):
        with pytest.raises(TypeError, match="A card describes a composed model, a projector or a processor, got"):
            card_text(thing)
