"""Code of a checkpoint taken over by the running package: what is run, what is not, and what two checkpoints may not do."""

import importlib
import sys

import pytest
import tiny

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel, MultimodalProjectorConfig
from cornstarch_hf.checkpoints.trusted_code import with_shared_code
from cornstarch_hf.parts.classes import SharedConfig, carries_code
from cornstarch_hf.parts.registries import CALLBACKS, MASK_RULES, POSITION_RULES

PART = """from cornstarch_hf import register_callback


def scale(inputs, output):
    output.last_hidden_state = output[0] * {factor}
    return output


register_callback("{name}", scale)
"""


@pytest.mark.parametrize(
    "auto_map, expected",
    [
        (None, False),
        ({}, False),
        ({"AutoModel": 3}, False),
        ({"AutoModel": "load_with_cornstarch_hf.MultimodalModel"}, False),
        ({"AutoModel": "multimodal_code.MultimodalModel"}, True),
        ({"AutoModel": "user/repo--multimodal_code.MultimodalModel"}, True),
    ],
)
def test_code_is_recognised_by_its_entry(auto_map, expected):
    assert carries_code(auto_map) is expected


def saved(folder, monkeypatch, name, factor):
    """A checkpoint whose callback comes from a file that this process has forgotten again."""
    source = folder / f"src_{factor}"
    source.mkdir(parents=True)
    (source / "scaling.py").write_text(PART.format(name=name, factor=factor))
    monkeypatch.syspath_prepend(source)
    sys.modules.pop("scaling", None)
    import scaling

    parts = {"vision": ModalEncoderModule(tiny.clip(), postprocess_module_callback=scaling.scale)}
    MultimodalModel(encoders=parts, language_model=tiny.llama()).save_pretrained(folder / "made", include_code=True)
    sys.modules.pop("scaling")
    CALLBACKS._entries.pop(name)
    monkeypatch.undo()
    return folder / "made"


def test_only_trusted_code_is_run_and_once(tmp_path, monkeypatch):
    folder = saved(tmp_path, monkeypatch, "test_shared_once", 2)
    with pytest.raises(ValueError, match="Unknown callback 'test_shared_once'.*trust_remote_code=True"):
        MultimodalModel.from_pretrained(folder)
    for trust in (None, False):
        with_shared_code(folder, {"trust_remote_code": trust})
        assert "test_shared_once" not in CALLBACKS
    models = [MultimodalModel.from_pretrained(folder, trust_remote_code=True) for _ in range(2)]
    first, second = (model.vision_encoder.postprocess_module_callback for model in models)
    assert first is second and first.__module__.startswith("cornstarch_hf_shared_")
    assert first is CALLBACKS["test_shared_once"].target


RULE = """from cornstarch_hf import register_{kind}_rule


def rule(*given):
    return given


register_{kind}_rule("test_shared_rule", rule)
"""


@pytest.mark.parametrize("key, kind, rules", [("positions", "position", POSITION_RULES), ("mask", "mask", MASK_RULES)])
def test_a_users_rule_comes_from_trusted_code(tmp_path, monkeypatch, key, kind, rules):
    (tmp_path / f"users_{kind}.py").write_text(RULE.format(kind=kind))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(f"users_{kind}")
    parts, rule = {"vision": ModalEncoderModule(tiny.clip())}, {"rule": "test_shared_rule"}
    model = MultimodalModel(encoders=parts, language_model=tiny.llama(), **{key: rule})
    model.save_pretrained(tmp_path / "made", include_code=True)
    sys.modules.pop(f"users_{kind}")
    del rules._entries["test_shared_rule"]
    with pytest.raises(ValueError, match=f"Unknown {kind} rule 'test_shared_rule'.*trust_remote_code=True"):
        MultimodalModel.from_pretrained(tmp_path / "made")
    model = MultimodalModel.from_pretrained(tmp_path / "made", trust_remote_code=True)
    assert getattr(model.config, key) == rule
    assert rules["test_shared_rule"].__module__.startswith("cornstarch_hf_shared_")
    del rules._entries["test_shared_rule"]


def test_two_checkpoints_that_define_a_name_differently_are_refused(tmp_path, monkeypatch):
    one = saved(tmp_path / "one", monkeypatch, "test_shared_twice", 2)
    two = saved(tmp_path / "two", monkeypatch, "test_shared_twice", 3)
    MultimodalModel.from_pretrained(one, trust_remote_code=True)
    with pytest.raises(ValueError, match="'test_shared_twice' is registered already.*processes of their own"):
        MultimodalModel.from_pretrained(two, trust_remote_code=True)
    MultimodalModel.from_pretrained(one, trust_remote_code=True)


def test_a_part_of_unknown_type_keeps_its_values_until_its_code_is_run():
    auto_map = {"AutoConfig": "multimodal_code.MultimodalConfig"}
    values = {"encoders": ["vision"], "vision_config": {"model_type": "test_not_known", "size": [1, 2]},
              "vision_projector_config": {"projection_type": "test_not_known", "projection_kwargs": {"a": 1}},
              "text_config": {"model_type": "llama"}}  # fmt: skip
    with pytest.raises(ValueError, match="'test_not_known'.*trust_remote_code=True"):
        MultimodalConfig.from_dict(values)
    config = MultimodalConfig.from_dict(values | {"auto_map": auto_map})
    part = config.vision_config
    assert isinstance(part, SharedConfig) and part.model_type == "test_not_known" and part.size == [1, 2]
    assert config.to_dict()["vision_config"] == values["vision_config"]
    assert config.vision_projector_config.projection_kwargs == {"a": 1}
    with pytest.raises(ValueError, match="'test_not_known'"):
        config.with_shared_parts()
    with pytest.raises(ValueError, match="Unknown projection type"):
        MultimodalProjectorConfig(projection_type="test_not_known")
