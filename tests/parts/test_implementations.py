"""Attention and experts implementations of parts, and of the parts of these, come back as they were."""

import pytest
import tiny
import torch
from own_memory import check_comes_back
from transformers import AutoModel, BitConfig, DPTConfig, DPTModel

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel
from cornstarch_hf.parts.classes import apply_implementations, part_implementations

BACKBONE = {
    "global_padding": "same", "layer_type": "bottleneck", "depths": [1, 1, 1], "hidden_sizes": [8, 16, 32], "num_groups": 2,
    "embedding_size": 8, "out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True,
}  # fmt: skip


def hybrid(**options):
    """A tower on top of a convolutional backbone, which knows eager attention alone."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    config = DPTConfig(
        **sizes, image_size=64, patch_size=16, is_hybrid=True, backbone_config=BitConfig(**BACKBONE), backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4, backbone_featmap_shape=[1, 32, 4, 4], readout_type="project", **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return DPTModel(config).eval()


@pytest.mark.parametrize(("options", "attention"), [({}, "sdpa"), ({"attn_implementation": "eager"}, "eager")])
def test_a_part_whose_backbone_has_another_implementation_comes_back(options, attention, tmp_path):
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(hybrid(**options))}, language_model=tiny.llama()
    ).eval()
    model.set_modality_token_ids({"vision": 7})
    features = model.vision_encoder(pixel_values=torch.ones(1, 3, 64, 64)).pooler_output[0]
    inputs = {"input_ids": torch.tensor([[5, *[7] * len(features), 6]]), "pixel_values": torch.ones(1, 3, 64, 64)}
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    check_comes_back(model, loaded, inputs)
    for config in (model.config.vision_config, loaded.config.vision_config):
        assert config._attn_implementation == attention and config.backbone_config._attn_implementation == "eager"
    assert part_implementations(loaded.config) == part_implementations(model.config)


def test_a_name_stands_for_all_that_is_below():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    assert part_implementations(model.config)["vision_config"]["attn"] == "sdpa"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"other_config": {"attn": "sdpa"}}, r"names 'other_config'.*expected some of"),
        ({"text_config": "sdpa"}, r"names 'text_config': 'sdpa'"),
        (
            {"text_config": {"attn": "some/kernel"}},
            r"text_config asks for the attn implementation 'some/kernel'.*are code",
        ),
        (
            {"text_config": {"attn": {"": "sdpa", "below": "some/kernel"}}},
            r"text_config\.below asks for .*'some/kernel'",
        ),
        ({"text_config": {"attn": {}}}, r"text_config asks for the attn implementation \{\}"),
    ],
)
def test_what_is_no_implementation_is_refused(stored, message):
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    with pytest.raises(ValueError, match=message):
        apply_implementations(MultimodalConfig(**model.config.to_dict()), stored)
