"""Texts as items: proteins and sentences through the encoder's own tokenizer, alone as in a batch, never cut unasked."""

import pytest
import tiny
import torch
from helpers import compose_tiny
from own_memory import check_comes_back
from shrunk import built, shrunk
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, EsmTokenizer, MPNetConfig, XLMRobertaConfig

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from cornstarch_hf.processing.texts import position_limit, run_tokenizer

PROTEINS = ["MKV", "LAGVSERTIDPK", "W"]
ROUNDING = {"atol": 1e-6, "rtol": 1e-5}  # of products of other shapes
LETTERS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


@pytest.fixture
def esm_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(LETTERS))
    return EsmTokenizer(str(tmp_path / "vocab.txt"))


def bert(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=320, max_position_embeddings=8, **changes)
    return BertModel(config, add_pooling_layer=False).eval()


def test_esm_with_its_own_tokenizer(tmp_path, esm_tokenizer):
    torch.manual_seed(0)
    model = MultimodalModel({"protein": ModalEncoderModule(tiny.esm())}, tiny.llama()).eval()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    processor = MultimodalProcessor(tokenizer, {"protein": esm_tokenizer}, model=model)
    texts = ["<protein> and <protein>?", "<protein>"]
    inputs = processor(text=texts, protein=[PROTEINS[:2], PROTEINS[2:]], padding=True, return_tensors="pt")
    counts = (inputs["input_ids"] == model.config.protein_modality["token_id"]).sum(-1).tolist()
    assert counts == [5 + 14, 3], "each protein's letters, with <cls> and <eos>"
    together = model.protein_encoder(
        **{
            parameter: inputs[key]
            for key, parameter in model.config.protein_modality["input_names"].items()
            if key in inputs
        }
    ).pooler_output
    for i, (protein, found) in enumerate(zip(PROTEINS, together, strict=True)):
        others = [protein if i == j else "A" * len(other) for j, other in enumerate(PROTEINS)]
        among = esm_tokenizer(others, padding=True, return_tensors="pt")
        assert torch.equal(found, model.protein_encoder(**among).pooler_output[i]), "whatever stands beside it"
        alone = esm_tokenizer(protein, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(found, model.protein_encoder(input_ids=alone).pooler_output[0], **ROUNDING)
    model.save_pretrained(tmp_path / "made")
    processor.save_pretrained(tmp_path / "made")
    again, reader = AutoModel.from_pretrained(tmp_path / "made"), AutoProcessor.from_pretrained(tmp_path / "made")
    assert type(reader.processors["protein"]) is type(esm_tokenizer)
    found = reader(text=texts, protein=[PROTEINS[:2], PROTEINS[2:]], padding=True, return_tensors="pt")
    assert found.keys() == inputs.keys() and all(torch.equal(found[key], inputs[key]) for key in inputs)
    check_comes_back(model, again, dict(inputs), max_new_tokens=4, do_sample=False)


def test_texts_are_cut_only_where_the_caller_asks_for_it():
    tokenizer, config = tiny.tokenizer(), bert().config
    long = "the quick brown fox jumps over the lazy dog"
    length = len(tokenizer(long)["input_ids"])
    assert length > 8
    tokenizer.backend_tokenizer.enable_truncation(3)  # as a file may say
    assert len(run_tokenizer(tokenizer, "note", [long], {}, None)["input_ids"][0]) == length
    assert len(run_tokenizer(tokenizer, "note", [long], {"max_length": 3}, None)["input_ids"][0]) == length
    message = f"note, item 1: the text has {length} tokens, but the encoder has 8 positions.*'max_length': 8"
    with pytest.raises(ValueError, match=message):
        run_tokenizer(tokenizer, "note", ["the", long], {}, config)
    cut = run_tokenizer(tokenizer, "note", ["the", long], {"truncation": True, "max_length": 8}, config)
    assert cut["attention_mask"].sum(-1).tolist() == [1, 8]


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers():
    model, processor = compose_tiny(["esm"])
    expected = processor(text="<protein><protein>", protein=["MKV", "L"], return_tensors="pt")
    processor.processors["protein"].padding_side = "left"
    found = processor(text="<protein><protein>", protein=["MKV", "L"], return_tensors="pt")
    assert torch.equal(found["protein_input_ids"], expected["protein_input_ids"])
    model(**found)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (["MKV", 3], TypeError, "protein, item 1: expected a string, got int"),
        ([b"MKV"], TypeError, "protein, item 0: expected a string, got bytes"),
        (["L", ""], ValueError, "protein, item 1: the text '' gives no token"),
        (["L", "MK\ud800"], ValueError, r"protein, item 1: U\+D800 at character 2 is half of a surrogate pair"),
    ],
)
def test_what_is_no_text(items, error, message):
    with pytest.raises(error, match=message):
        run_tokenizer(tiny.protein_tokenizer(), "protein", items, {}, tiny.esm().config)


def test_positions_that_an_encoder_has():
    tokenizer = tiny.tokenizer()
    assert position_limit(tokenizer, bert().config) == 8
    assert position_limit(tokenizer, tiny.esm().config) is None and position_limit(tokenizer, None) is None
    assert position_limit(tokenizer, tiny.llama().config) is None
    table = {"max_position_embeddings": 8, "pad_token_id": 1, "hidden_size": 16, "num_attention_heads": 2}
    for config in (XLMRobertaConfig(**table), MPNetConfig(**table)):
        assert position_limit(tokenizer, config) == 6
        encoder = built(AutoModel.from_config, shrunk(type(config), **table, num_hidden_layers=1))
        encoder(input_ids=torch.full((1, 6), 5))
        with pytest.raises((IndexError, RuntimeError)):
            encoder(input_ids=torch.full((1, 7), 5))
    tokenizer.model_max_length = 6
    assert position_limit(tokenizer, bert().config) == 6
