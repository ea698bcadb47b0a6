"""The Auto classes of transformers know composed models, their processors and projectors."""

import pytest
from helpers import compose_tiny
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto import modeling_auto

from cornstarch_hf import (
    MODEL_CLASSES,
    MultimodalConfig,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    register_auto_classes,
)
from cornstarch_hf.configuration_multimodal import STATIC_TABLES


@pytest.fixture(scope="module")
def pair():
    return compose_tiny(["clip"])


def tables():
    names = [dict(cls._model_mapping._extra_content) for cls in MODEL_CLASSES]
    return names, [dict(getattr(modeling_auto, table)) for table in STATIC_TABLES]


def test_registering_again_changes_nothing():
    before = tables()
    register_auto_classes()
    assert tables() == before


def test_configurations_by_their_model_type():
    assert type(AutoConfig.for_model("cornstarch_multimodal")) is MultimodalConfig
    assert type(AutoConfig.for_model("multimodal-projector")) is MultimodalProjectorConfig
    for table in STATIC_TABLES:
        assert getattr(modeling_auto, table)["cornstarch_multimodal"] == "MultimodalModel"


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
def test_every_auto_class_builds_the_model(auto_class, pair):
    made = auto_class.from_config(pair[0].config)
    assert type(made) is MultimodalModel and made.state_dict().keys() == pair[0].state_dict().keys()


def test_a_saved_folder_is_read_without_naming_a_class(tmp_path, pair):
    for part in pair:
        part.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.name_or_path = ""  # which only the Auto class fills in
    assert config == MultimodalConfig.from_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MultimodalProcessor
    assert all(type(cls.from_pretrained(tmp_path)) is MultimodalModel for cls in MODEL_CLASSES)


def test_projectors_alone(tmp_path):
    made = MultimodalProjector(MultimodalProjectorConfig(in_features=3, out_features=4, projection_type="mlp"))
    made.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MultimodalProjector
    assert all((value == made.state_dict()[key]).all() for key, value in loaded.state_dict().items())
