"""The usage snippet of a card: it runs as it is copied, in a fresh process, on a checkpoint of that name."""

import ast
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import typed_parts
import user_parts
from helpers import HERE, compose_tiny, run_python
from peft import LoraConfig, get_peft_model
from shrunk import built, shrunk
from templates import PARTS
from torch import nn
from transformers import PatchTSTConfig, PatchTSTModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    PrecomputedFeatures,
    PrecomputedFeaturesConfig,
    compose,
)
from cornstarch_hf.hub.card import card_text
from cornstarch_hf.hub.card_facts import examples, own_parts
from cornstarch_hf.parts.registries import FEATURE_COUNTS


def users_own():
    encoder = user_parts.PatchEncoder(user_parts.PatchConfig())
    gated = MultimodalProjector(MultimodalProjectorConfig(), projection=user_parts.GatedProjection(12, 32))
    drop = functools.partial(user_parts.drop_tokens, count=1)
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(encoder, gated, postprocess_projector_callback=drop)},
        language_model=tiny.llama(),
    ).eval()
    return model, MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)


def shared():
    model, processor = compose_tiny({"clip": "clip", "dino": "dinov2"})
    model.config.share_inputs = [["clip", "dino"]]
    return model, MultimodalProcessor(tiny.tokenizer(), processor.processors, model=model, chat_template=PARTS)


def adapted():
    return compose_tiny(["clip"], get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])))


MADE = {
    "image": lambda: compose_tiny(["clip"]),
    "audio": lambda: compose_tiny(["whisper"]),
    "image-and-audio": lambda: compose_tiny(["clip", "wav2vec2"], projector="mlp"),
    "protein": lambda: compose_tiny(["esm"]),
    "two-encoders": lambda: compose_tiny({"clip": "clip", "dino": "dinov2"}),
    "two-that-share": shared,
    "users-own": users_own,
    "adapters": adapted,
    "reducing": lambda: compose_tiny(["siglip"], projector="pixel_shuffle"),
    "packed": lambda: compose_tiny(["qwen2_vl"]),
}
FAST = ["image", "image-and-audio", "protein", "two-encoders", "two-that-share", "users-own"]


def snippet_of(card):
    (found,) = re.findall(r"^```python\n(.*?)\n```$", card, re.M | re.S)
    return found


def usage_snippet(model, processor, repo_id, include_code):
    return snippet_of(card_text(model, processor, repo_id, include_code))


def unaskable(model, processor):
    return examples(model, processor).left_out


def saved_snippets(folder, names):
    """Save model, processor and card of each under ``me/name``; the cards' own code by name, and what each encoder takes."""
    found, inputs = {}, {}
    for name in names:
        model, processor = MADE[name]()
        target = folder / "me" / name
        model.save_pretrained(target)
        processor.save_pretrained(target)
        (target / "README.md").write_text(card_text(model, processor, f"me/{name}"))
        inputs[name] = [list(model.config.modality(encoder)["input_names"]) for encoder in model.config.encoders]
        found[name] = snippet_of((target / "README.md").read_text())
    return found, inputs


def short_snippets(folder):
    """Of a processor, of a projector, and of adapters around a composed model, each in a repository of its own."""
    model, processor = compose_tiny(["clip"])
    for thing, name in (
        (model, "base"),
        (processor, "base"),
        (processor, "processor"),
        (model.vision_encoder.projector, "projector"),
    ):
        thing.save_pretrained(folder / "me" / name)
    model.config._name_or_path, model.config._commit_hash = "me/base", "0a" * 20
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["projector"]))
    wrapped.save_pretrained(folder / "me" / "whole-adapters")
    cards = {
        "processor": card_text(None, processor, "me/processor"),
        "projector": card_text(model.vision_encoder.projector, None, "me/projector"),
        "whole-adapters": card_text(wrapped, processor, "me/whole-adapters"),
    }
    return {name: snippet_of(card) for name, card in cards.items()}


def test_snippets_run_as_they_are_copied(tmp_path):
    snippets, inputs = saved_snippets(tmp_path, FAST)
    snippets |= short_snippets(tmp_path)
    for name, code in snippets.items():
        assert re.match(r"(import cornstarch_hf|from cornstarch_hf import \w+)  # pip install ", code), name
        ast.parse(code)
    (tmp_path / "snippets.json").write_text(json.dumps(snippets))
    run_python(HERE / "run_snippets.py", "snippets.json", cwd=tmp_path)
    printed = json.loads((tmp_path / "snippets.json").read_text())
    assert list(printed) == list(snippets)
    for name in FAST:
        given = json.loads(printed[name].splitlines()[-1])
        assert all(set(taken) & set(given) for taken in inputs[name]), name  # every encoder got an item


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MADE if name not in FAST])
def test_further_snippets_run_in_processes_of_their_own(tmp_path, name):
    (code,) = saved_snippets(tmp_path, [name])[0].values()
    run_python(code + "\n", cwd=tmp_path)


@pytest.mark.slow
def test_without_a_repository_the_snippet_loads_the_folder_that_it_is_in(tmp_path):
    model, processor = compose_tiny(["clip"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = snippet_of(card_text(model, processor))
    assert 'AutoModelForMultimodalLM.from_pretrained(".")' in code and 'AutoProcessor.from_pretrained(".")' in code
    run_python(code + "\n", cwd=tmp_path)


def test_the_snippet_says_which_files_of_the_user_it_needs():
    model, processor = users_own()
    lines = usage_snippet(model, processor, "me/own", False).splitlines()
    assert lines[1] == (
        "import user_parts  # defines the class PatchEncoder, the projection 'users_gated', the callback 'users_drop'; "
        "not part of this repository"
    )
    assert own_parts(compose_tiny(["clip", "esm"], projector="resampler")[0]) == {}


@pytest.mark.parametrize("module", ["__main__", "transformers_modules.me.x.0a", "a b"])
def test_code_that_no_import_finds_is_described(monkeypatch, module):
    monkeypatch.setattr(user_parts.PatchEncoder, "__module__", module)
    lines = usage_snippet(*users_own(), "me/own", False).splitlines()
    assert lines[1] == "# First run the code that defines the class PatchEncoder; not part of this repository."
    assert lines[2].startswith("import user_parts  # defines the projection 'users_gated', the callback")


def test_feature_counts_of_the_user_are_needed_too(monkeypatch):
    def count(inputs, config):
        return 5

    monkeypatch.setattr(FEATURE_COUNTS, "_entries", {"vision": count, "clip_vision_model": count})
    assert list(own_parts(compose_tiny(["clip"])[0])) == [
        "the feature count of 'vision'",
        "the feature count of 'clip_vision_model'",
    ]


def test_a_checkpoint_with_code_needs_nothing_but_trust():
    lines = usage_snippet(*users_own(), "me/own", True).splitlines()
    assert not [line for line in lines if "cornstarch" in line or "user_parts" in line]
    assert [line for line in lines if "from_pretrained" in line] == [
        'model = AutoModelForMultimodalLM.from_pretrained("me/own", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("me/own", trust_remote_code=True)',
    ]


def test_without_a_processor_the_model_is_loaded_alone():
    model, _ = compose_tiny(["clip"])
    assert usage_snippet(model, None, "me/x", False).splitlines()[1:] == [
        "from transformers import AutoModelForMultimodalLM",
        "",
        'model = AutoModelForMultimodalLM.from_pretrained("me/x")',
        "model.describe()",
    ]


def test_items_that_cannot_be_made_are_left_out():
    model, processor = compose_tiny(["clip", "whisper"], vision={"additional_args": ["note"]})
    assert unaskable(model, processor) == ["vision"]
    alone = MultimodalProcessor(
        tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=compose_tiny(["clip", "esm"])[0]
    )
    assert unaskable(compose_tiny(["clip", "esm"])[0], alone) == ["protein"]
    code = usage_snippet(model, processor, "me/x", False)
    assert '"audio"' in code and '"image"' not in code and "PIL" not in code
    packed = compose_tiny(["qwen2_vl"], vision={"kind": "video"})
    assert unaskable(*packed) == ["vision"]


def test_a_sound_fits_into_the_window_of_its_encoder():
    model, processor = compose_tiny(["whisper"])
    processor.processors["audio"].n_samples = 4000
    assert "np.arange(4000, dtype=np.float32)" in usage_snippet(model, processor, "me/x", False)


class VideoConfig(PreTrainedConfig):
    model_type = "card_usage_video"
    hidden_size, num_frames = 12, 3


class VideoEncoder(PreTrainedModel):
    config_class, main_input_name, input_modalities = VideoConfig, "pixel_values_videos", ("video",)

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Linear(3, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values_videos):
        return BaseModelOutput(last_hidden_state=self.embed(pixel_values_videos.mean((2, 3))))


class Videos:
    def __call__(self, videos, return_tensors=None):
        return {"pixel_values_videos": torch.tensor(np.stack(videos), dtype=torch.float32)}


def test_frames_of_a_video(capsys):
    model = MultimodalModel(
        encoders={"clip": ModalEncoderModule(VideoEncoder(VideoConfig()))}, language_model=tiny.llama()
    ).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"clip": Videos()}, model=model)
    code = usage_snippet(model, processor, "me/video", False)
    assert '{"type": "video", "video": np.zeros((3, 240, 320, 3), dtype=np.uint8)}' in code
    lines = [line for line in code.splitlines() if "from_pretrained" not in line]  # such a processor cannot be saved
    exec("\n".join(lines), {"model": model, "processor": processor})
    assert capsys.readouterr().out


def test_items_of_further_kinds(capsys):
    series = built(PatchTSTModel, shrunk(PatchTSTConfig, context_length=16, patch_length=8, patch_stride=8))
    frames = {"model": tiny.clip(), "processor": tiny.clip_processor(num_frames=3), "kind": "video"}
    encoders = {
        "film": frames,
        "series": series,
        "scene": PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=6)),
    }
    model, processor = compose(tiny.llama(), encoders, tokenizer=tiny.tokenizer())
    assert unaskable(model, processor) == []
    code = usage_snippet(model, processor, "me/x", False)
    for part in ("np.zeros((3, 240, 320, 3), dtype=np.uint8)", "np.ones((16, 1), dtype=np.float32)", "np.ones((4, 6), dtype=np.float32)"):  # fmt: skip
        assert part in code
    exec(
        "\n".join(x for x in code.splitlines() if "from_pretrained" not in x), {"model": model, "processor": processor}
    )
    assert capsys.readouterr().out
    processor.processors["film"].num_frames, processor.processors["film"].fps = None, 12
    assert '"fps": 24' in usage_snippet(model, processor, "me/x", False)


def test_snippets_are_formatted():
    code = "\n".join(usage_snippet(*MADE[name](), "me/x", code) + "\n" for name in FAST for code in (False, True))
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--isolated",
        "--line-length",
        "128",
        "-",
        "--stdin-filename",
        "x.py",
    ]
    shown = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    # The formatter joins blank lines between snippets; nothing else changes.
    assert [line for line in shown.splitlines() if line] == [line for line in code.splitlines() if line]


def test_encoder_types_of_the_user_are_needed_too():
    encoder = ModalEncoderModule(typed_parts.StripEncoder(typed_parts.StripConfig()))
    needed = own_parts(MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()))
    assert needed == {
        "the class StripEncoder": typed_parts.StripEncoder,
        "the encoder type 'users_strip_encoder'": typed_parts.strips,
    }
