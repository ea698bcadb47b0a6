"""What the document of the original Cornstarch shows works, after the edits of names that this package needs."""

import functools

import tiny
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
)


def test_creating_a_model_and_its_module_tree():
    mllm = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(tiny.clip()),
            "audio": ModalEncoderModule(tiny.whisper()),
            "whatever": ModalEncoderModule(tiny.esm()),
        },
        language_model=tiny.llama(),
    )
    assert list(mllm.encoders) == ["vision", "audio", "whatever"]
    for name, encoder in mllm.encoders.items():
        assert encoder is getattr(mllm, f"{name}_encoder") and isinstance(encoder, ModalEncoderModule)
        assert isinstance(encoder.projector, MultimodalProjector) and isinstance(encoder.module, nn.Module)
    assert mllm.whatever_encoder.module.config.model_type == "esm"
    assert mllm.language_model.config.model_type == "llama"


def test_a_dict_given_first_means_encoders():
    mllm = MultimodalModel({"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    assert list(mllm.encoders) == ["vision"]


def test_creating_projectors():
    wrapped = MultimodalProjector(MultimodalProjectorConfig(), nn.Linear(16, 32))
    own = ModalEncoderModule(module=tiny.clip(), projector=wrapped)
    lazy = ModalEncoderModule(module=tiny.whisper(), projector=None)
    assert lazy.projector is None and own.projector is wrapped
    mllm = MultimodalModel(
        {"vision": own, "audio": lazy}, tiny.llama(), init_projector_type="mlp", init_activation="gelu"
    )
    assert mllm.vision_encoder.projector is wrapped
    assert [type(m).__name__ for m in mllm.audio_encoder.projector.projection] == ["Linear", "GELUActivation", "Linear"]


def postprocess_projector_callback(
    inputs: dict, output: BaseModelOutput | tuple, vision_feature_select_strategy: str | None = None
) -> BaseModelOutput | tuple:
    pixel_values = inputs.get("pixel_values")
    if pixel_values is not None and pixel_values.size(0) > 0:
        # output[0] == output.last_hidden_state
        image_features = output[0]
        if vision_feature_select_strategy == "default":
            image_features = image_features[:, 1:]
    if isinstance(output, ModelOutput):
        output.last_hidden_state = image_features
    else:
        output = (image_features, *output[1:])
    return output


def test_the_callback_example_with_a_bound_argument():
    callback = functools.partial(postprocess_projector_callback, vision_feature_select_strategy="default")
    for encoder, language_model in ((tiny.clip(), tiny.llama()), (tiny.siglip(), tiny.qwen3())):
        mllm = MultimodalModel(
            encoders={"vision": ModalEncoderModule(model=encoder, postprocess_projector_callback=callback)},
            language_model=language_model,
        ).eval()
        processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=mllm)
        inputs = processor(text="<image>", images=tiny.image(), return_tensors="pt")
        plain = mllm.vision_encoder.projector(encoder(inputs["pixel_values"]).last_hidden_state)[0][:, 1:]
        assert torch.equal(mllm.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0], plain[0])
        assert (inputs["input_ids"] == processor.image_token_id).sum() == len(plain[0])
        mllm(**inputs)


def test_peft_example_also_on_the_meta_device():
    from accelerate import init_empty_weights

    def parts():
        vision = get_peft_model(
            tiny.clip(), LoraConfig(task_type=None, inference_mode=False, target_modules="all-linear")
        )
        language = get_peft_model(tiny.llama(), LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False))
        return {"vision": ModalEncoderModule(vision)}, language

    encoders, language_model = parts()
    mllm = MultimodalModel(encoders, language_model=language_model)
    mllm.set_modality_token_ids({"vision": 9})
    ids = torch.tensor([[1, *[9] * 5, 30]])
    mllm.train()(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), labels=ids).loss.backward()
    moved = [n for n, p in mllm.named_parameters() if p.grad is not None]
    assert any("vision_encoder.module" in n and "lora_" in n for n in moved)
    assert any("language_model" in n and "lora_" in n for n in moved)
    assert not any("lora_" not in n and ".projector." not in n for n in moved)
    with init_empty_weights():
        encoders, language_model = parts()
        empty = MultimodalModel(encoders, language_model=language_model)
    assert all(p.is_meta for p in empty.parameters())
