"""One test for each thing that the original model got wrong, showing what is right here."""

import copy
import pickle

import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs
from own_memory import check_comes_back
from peft import LoraConfig, get_peft_model
from torch import nn

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor


def test_peft_wrapped_encoders_run():
    wrapped = get_peft_model(tiny.clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(wrapped)}, language_model=tiny.llama()).eval()
    model.set_modality_token_ids({"vision": 9})
    inputs = {"input_ids": torch.tensor([[9] * 5]), "pixel_values": torch.randn(1, 3, 8, 8)}
    before = model(**inputs).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.equal(model(**inputs).logits, before)


def test_the_callers_attention_mask_and_left_padding_count(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    ones = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert inputs["attention_mask"][2, 0] == 0
    assert not torch.equal(model(**inputs).logits[2], model(**ones).logits[2])


def test_placeholders_without_inputs_are_refused(pair):
    model, processor = pair
    ids = torch.tensor([[processor.image_token_id] * 5])
    with pytest.raises(ValueError, match="5 placeholder.*0 features"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="5 placeholder.*0 features"):
        model.generate(input_ids=ids, max_new_tokens=1)


def test_no_input_is_missing_from_the_signature_that_trainer_reads(pair):
    import inspect

    model, processor = pair
    assert set(uneven_inputs(processor)) <= set(inspect.signature(model.forward).parameters)


def test_the_number_of_items_reaches_the_loss(pair):
    model, _processor = pair
    ids = torch.randint(3, 250, (2, 9))
    mean = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(input_ids=ids, labels=ids, num_items_in_batch=4 * 16).loss * 4, mean)


def test_both_of_two_encoders_with_pixel_values_run():
    model, processor = compose_tiny({"left": "clip", "right": "siglip"})
    inputs = uneven_inputs(processor)
    for key in ("left_pixel_values", "right_pixel_values"):
        changed = inputs | {key: inputs[key] + 1}
        assert not torch.equal(model(**inputs).logits, model(**changed).logits)


def test_no_counts_leak_between_processors():
    _first_model, first = compose_tiny(["clip"])
    _second_model, second = compose_tiny(["siglip"])
    for processor, count in ((first, 5), (second, 4), (first, 5)):
        ids = processor(text="<image>", images=tiny.image(), return_tensors="pt")["input_ids"]
        assert (ids == processor.image_token_id).sum() == count


def test_special_tokens_of_the_tokenizer_are_added_to_not_replaced():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    processor = MultimodalProcessor(tokenizer, {"vision": tiny.clip_processor()}, model=model)
    assert len(processor.tokenizer("<tool>")["input_ids"]) == 1 and len(tokenizer) == len(processor.tokenizer) - 1


def test_forward_needs_neither_labels_nor_mask_nor_ids(pair):
    model, _ = pair
    ids = torch.randint(3, 250, (1, 6))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=embeds).logits)


def test_generate_takes_a_list_of_eos_ids(pair):
    model, processor = pair
    assert model.generate(**uneven_inputs(processor), eos_token_id=[2, 5], max_new_tokens=2) is not None


def test_train_and_eval_return_the_model_and_do_not_freeze(pair):
    model = copy.deepcopy(pair[0])
    grads = [p.requires_grad for p in model.parameters()]
    assert model.eval() is model and model.train() is model
    assert [p.requires_grad for p in model.parameters()] == grads


def test_bf16_parts_with_a_lazy_projector_run():
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(tiny.clip().bfloat16())}, language_model=tiny.llama().bfloat16()
    )
    model.set_modality_token_ids({"vision": 9})
    assert model(input_ids=torch.tensor([[9] * 5]), pixel_values=torch.randn(1, 3, 8, 8)).logits.dtype is torch.bfloat16


@pytest.mark.parametrize(("key", "count"), [("dinov2", 5), ("clip", 5), ("siglip", 4)])
def test_counts_include_the_class_token_exactly_where_there_is_one(key, count):
    _, processor = compose_tiny([key])
    ids = processor(text="<image>", images=tiny.image(), return_tensors="pt")["input_ids"]
    assert (ids == processor.image_token_id).sum() == count


@pytest.mark.parametrize(
    ("text", "numbers"), [("<image> <image>", "2 placeholders.*1 items"), ("none", "0 placeholders.*1 items")]
)
def test_more_and_fewer_placeholders_than_images(pair, text, numbers):
    with pytest.raises(ValueError, match=numbers):
        pair[1](text=text, images=[tiny.image()])


def test_literal_placeholder_text_is_not_corrupted(pair):
    _, processor = pair
    message = [{"role": "user", "content": "write <image> in HTML"}]
    ids = processor.apply_chat_template(message, tokenize=True)[0]
    assert processor.image_token_id not in ids and "write <image> in HTML" in processor.decode(ids)


def test_config_save_and_pickle(tmp_path, pair):
    model, processor = pair
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    twin = pickle.loads(pickle.dumps(model))
    for other in (again, twin):
        check_comes_back(model, other, uneven_inputs(processor))
