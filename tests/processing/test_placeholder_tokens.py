"""Placeholder tokens: which one each modality gets, and their place in the tokenizer."""

import pytest
import tiny
from helpers import compose_tiny

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.processing.placeholder_text import add_placeholder_tokens, placeholder_tokens


def config(**encoders):
    modules = {name: ModalEncoderModule(tiny.ENCODERS[key][1]()) for name, key in encoders.items()}
    return MultimodalModel(encoders=modules, language_model=tiny.llama()).config


def test_a_kind_that_one_modality_has_gives_the_token():
    found = placeholder_tokens(config(vision="clip", sound="whisper", protein="esm"), {})
    assert found == {"vision": "<image>", "sound": "<audio>", "protein": "<protein>"}
    assert placeholder_tokens(config(left="clip", right="siglip"), {}) == {"left": "<left>", "right": "<right>"}


def test_chosen_tokens_come_before_stored_ones():
    made = config(vision="clip", audio="whisper")
    made.modality("vision")["token"], made.modality("audio")["token"] = "[I]", "[A]"
    assert placeholder_tokens(made, {"audio": "<x>"}) == {"vision": "[I]", "audio": "<x>"}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"smell": "<s>"},
            r"tokens names \['smell'\], the model has placeholders of the encoders \['vision', 'audio'\]",
        ),
        ({"vision": " <i>"}, "vision: a placeholder token must be text without spaces around it, got ' <i>'"),
        ({"vision": "\n"}, "without spaces"),
        ({"vision": 7}, "got 7"),
        ({"vision": "<audio>"}, "audio: the placeholder token '<audio>' stands for another modality"),
    ],
)
def test_tokens_that_cannot_be_used(chosen, message):
    with pytest.raises(ValueError, match=message):
        placeholder_tokens(config(vision="clip", audio="whisper"), chosen)


def test_new_tokens_get_new_ids_and_stay_whole():
    tokenizer = tiny.tokenizer()
    size = len(tokenizer)
    ids = add_placeholder_tokens(tokenizer, {"vision": "<image>", "audio": "the sound"})
    assert ids == {"vision": size, "audio": size + 1} and len(tokenizer) == size + 2
    text = "a<image>the sound<image>"
    assert [i for i in tokenizer.encode(text) if i >= size] == [size, size + 1, size]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "a"


def test_tokens_that_exist_keep_their_ids():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<image>"]})
    tokenizer.add_tokens(["<plain>"])
    size, expected = len(tokenizer), tokenizer.convert_tokens_to_ids(["<image>", "<plain>"])
    ids = add_placeholder_tokens(tokenizer, {"vision": "<image>", "audio": "<plain>"})
    assert list(ids.values()) == expected and len(tokenizer) == size
    assert add_placeholder_tokens(tokenizer, {"vision": "<image>"}) == {"vision": expected[0]}
    assert all(tokenizer.added_tokens_decoder[i].special for i in [tokenizer.convert_tokens_to_ids("<a>"), *expected])


@pytest.mark.parametrize(("token", "kind"), [("<s>", "bos"), ("</s>", "eos"), ("<pad>", "pad")])
def test_tokens_with_another_meaning(token, kind):
    with pytest.raises(ValueError, match=f"vision: '{token}' is the tokenizer's {kind} token"):
        add_placeholder_tokens(tiny.tokenizer(), {"vision": token})


def test_model_and_processor_agree():
    model, processor = compose_tiny(["clip", "esm"])
    for name, token in processor.tokens.items():
        entry = model.config.modality(name)
        assert (entry["token"], entry["token_id"]) == (token, processor.tokenizer.convert_tokens_to_ids(token))
