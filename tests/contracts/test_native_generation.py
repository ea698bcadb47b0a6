"""Every way to generate, of native models that were taken apart: the native model's tokens, with its inputs."""

import copy

import convertible_models
import native_models
import pytest
import torch

from cornstarch_hf import from_native
from cornstarch_hf.parts.versions import CACHE

SUPPRESSED = [convertible_models.IMAGE, convertible_models.AUDIO, native_models.IMAGE, native_models.VIDEO]
TYPES = ["qwen2_vl", "qwen3_vl", "gemma3", "llava_next", "voxtral"]
STATIC = {"cache_implementation": "static", "disable_compile": True}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": STATIC,
    "static cache and beams": STATIC | {"num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
    "without a cache": {"use_cache": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "looked up": {"prompt_lookup_num_tokens": 3},
}
# Inputs of which each item, and not each row of text, has one.
MEDIA = ("pixel_values", "image_grid_thw", "image_sizes", "input_features")


@pytest.fixture(scope="module")
def sides():
    """A function that gives a native model, its composition, a batch, and the batch's first row with its item."""
    made = {}

    def of(model_type):
        if model_type not in made:
            if model_type in convertible_models.TYPES:
                native = convertible_models.build(model_type)
                media = convertible_models.TYPES[model_type].media(native)
                if model_type == "voxtral":  # its own class repeats items for beams as if each row had one
                    media.inputs = {key: value[:2] for key, value in media.inputs.items()}
                    media.counts = {token: counts[:2] for token, counts in media.counts.items()}
                inputs = convertible_models.batch(media)
            else:
                native = native_models.native(model_type)
                packed = model_type in native_models.PACKED
                inputs = (native_models.image_inputs if packed else native_models.picture_inputs)(native)
            made[model_type] = native, from_native(copy.deepcopy(native))[0], inputs, first_row(inputs)
        return made[model_type]

    return of


def first_row(inputs):
    """The first row of a batch, which has one item, without its padding."""
    start = int(inputs["attention_mask"][0].argmax())
    row = {key: value[:1] if key in MEDIA else value[:1, start:] for key, value in inputs.items()}
    if "image_grid_thw" in row:
        row["pixel_values"] = inputs["pixel_values"][: int(row["image_grid_thw"].prod())]
    return row


def generated(model, inputs, **options):
    usual = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": SUPPRESSED}
    allowed = model.get_output_embeddings().weight.shape[0]
    usual["suppress_tokens"] = [token for token in SUPPRESSED if token < allowed]
    torch.manual_seed(0)
    return model.generate(**inputs, **usual | options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TYPES)
def test_every_way_gives_the_tokens_of_the_native_model(sides, model_type, way):
    native, model, batch, row = sides(model_type)
    inputs = row if way == "looked up" else batch
    # What a native class cannot do in this way gives the tokens that it gives greedily: chunks of sounds, lookup of placeholders.
    without = way == "looked up" or (model_type, way) == ("voxtral", "chunked prefill")
    expected = generated(native, inputs, **{} if without else WAYS[way])
    assert torch.equal(generated(model, inputs, **WAYS[way]), expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_an_assistant_gives_the_tokens_of_the_native_model(sides, model_type):
    native, model, _, row = sides(model_type)
    draft = copy.deepcopy(model)
    with torch.no_grad():  # one that is sometimes wrong
        draft.get_output_embeddings().weight.add_(0.05 * torch.randn(draft.get_output_embeddings().weight.shape))
    assert torch.equal(generated(model, row, assistant_model=draft), generated(native, row))


@pytest.mark.parametrize("again", [False, True], ids=["text", "another item"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_chat_goes_on_behind_the_cache(sides, model_type, again):
    native, model, _, row = sides(model_type)
    answer = generated(model, row, return_dict_in_generate=True)
    assert torch.equal(answer.sequences, generated(native, row))
    prompt = row["input_ids"]
    placed = (prompt == prompt.mode().values).long()  # placeholders are the commonest token of the prompt
    token = int(prompt[placed.bool()][0])
    more = torch.tensor([[7, *[token] * (int(placed.sum()) if again else 0), 9, 10]])
    ids = torch.cat([answer.sequences, more], 1)
    media = {key: torch.cat([row[key], row[key]]) if again else row[key] for key in MEDIA if key in row}
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = {"token_type_ids", "mm_token_type_ids"} & set(row)
    whole = second | media | {key: (ids == token).long() for key in kinds}
    expected = generated(native, whole)  # from the beginning, without a cache to go on from
    assert torch.equal(generated(model, whole, **{CACHE: answer[CACHE]}), expected)
    assert torch.equal(generated(model, second | media), expected)
