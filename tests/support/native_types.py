"""Every native type of the conversion table: a tiny random model, its inputs, and what its composition must be equal in.

A plain module, no tests.
"""

import copy
import hashlib
from pathlib import Path

import convertible_models
import native_models
import pytest
import torch
from own_memory import own_memory
from transformers import AutoConfig

from cornstarch_hf import MultimodalModel, from_native, to_native
from cornstarch_hf.conversion.keys import key_map, prefixes
from cornstarch_hf.conversion.refusals import entry_of
from cornstarch_hf.conversion.table_rules import RULED

# Llama 4 has a test of its own: its `forward` fails in transformers 5.24, which asks the language model for outputs of images.
TYPES = sorted([*convertible_models.TYPES, *native_models.COMPARED])
ALONE = ["llama4"]
WITH_VIDEOS = sorted(
    [name for name, row in convertible_models.TYPES.items() if row.videos]
    + ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "cosmos3_omni"]
)
PLACEHOLDERS = [convertible_models.IMAGE, convertible_models.VIDEO, convertible_models.AUDIO]
PLACEHOLDERS += [native_models.IMAGE, native_models.VIDEO]


def build(model_type):
    """A tiny random model of a type, in evaluation mode."""
    if model_type in convertible_models.TYPES:
        return convertible_models.build(model_type)
    return native_models.native(model_type)


def inputs_of(native, videos=False):
    """A left-padded batch with uneven media and a row of text; with `videos` these and images in one row."""
    model_type = native.config.model_type
    if row := convertible_models.TYPES.get(model_type):
        media = row.media(native)
        if videos:
            films = row.videos(native)
            media = convertible_models.Media({**media.inputs, **films.inputs}, {**media.counts, **films.counts})
        return convertible_models.batch(media)
    if model_type in native_models.PICTURES:
        return native_models.picture_inputs(native)
    apart = RULED[model_type].positions.get("frames_apart", False)
    inputs = native_models.video_inputs(native, apart) if videos else native_models.image_inputs(native)
    return inputs | ({"second_per_grid_ts": torch.tensor([0.5, 1.5])} if videos and model_type == "qwen2_5_vl" else {})


def digests(model):
    """``{name: dtype, shape and hash}`` of all that a checkpoint of the model holds."""
    found = {}
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(bits.numpy().tobytes()).hexdigest())
    return found


def files(model, folder):
    """The configurations that a model writes, as text."""
    model.save_pretrained(folder)
    names = ("config.json", "generation_config.json")
    return {name: (Path(folder) / name).read_text() for name in names if (Path(folder) / name).is_file()}


def logits_of(model, inputs):
    """At attended positions."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def check_equal(native, model, inputs):
    """Equal logits at attended positions, equal greedy tokens; gives the logits."""
    expected = logits_of(native, inputs)
    assert torch.equal(logits_of(model, inputs), expected)
    allowed = [token for token in PLACEHOLDERS if token < expected.shape[-1]]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": allowed}
    tokens, found = native.generate(**inputs, **options), model.generate(**inputs, **options)
    assert torch.equal(found[:, -4:], tokens[:, -4:])
    return expected


def check_there_and_back(native, tmp_path):
    """A composition equals its native model, also stored and loaded, and gives it back; the native one stays as it is."""
    inputs = inputs_of(native)
    tensors, config, ties = digests(native), copy.deepcopy(native.config.to_dict()), dict(native.all_tied_weights_keys)
    model, processor = from_native(native)
    assert processor is None and isinstance(model, MultimodalModel)
    logits = check_equal(native, model, inputs)
    louder = {key: x * 1.5 if x.is_floating_point() else x for key, x in inputs.items()}
    assert not torch.equal(logits_of(native, louder), logits)  # or else the media did not matter
    assert digests(native) == tensors and native.config.to_dict() == config and native.all_tied_weights_keys == ties
    again = to_native(model)
    assert type(again) is type(native) and digests(again) == tensors
    written = files(native, tmp_path / "native")
    assert files(again, tmp_path / "again") == written
    model.save_pretrained(tmp_path / "composed")
    loaded = MultimodalModel.from_pretrained(tmp_path / "composed").eval()
    given = own_memory(inputs)
    expected = logits_of(own_memory(model), given)
    assert torch.equal(logits_of(own_memory(loaded), given), expected)
    if native.config.model_type == "shieldgemma2":  # transformers writes it by names that its class does not read again
        with pytest.raises(ValueError, match="have no tensors, or of another shape, for"):
            from_native(tmp_path / "native")
    else:
        converted = check_loaded(tmp_path / "native", native)
        assert torch.equal(logits_of(own_memory(converted), given), expected)
        converted.save_pretrained(tmp_path / "converted")
        assert digests(MultimodalModel.from_pretrained(tmp_path / "converted")) == digests(model)
    back = to_native(loaded)
    assert digests(back) == tensors and files(back, tmp_path / "back") == written


def settings_of(model):
    """Each module's class, and those attributes of it that are plain values, names or sets of names."""
    plain = (bool, int, float, str, tuple, list, frozenset, set, type(None), torch.dtype)
    return {
        name: (
            type(module),
            {k: tuple(x) if type(x) is list else x for k, x in vars(module).items() if isinstance(x, plain)},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def check_loaded(folder, native):
    """A composition of a native checkpoint, whose parts are those that were loaded, is that of the live native model."""
    live = type(native).from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    (loaded, _), (model, _) = from_native(folder), from_native(live)
    found, expected = settings_of(loaded), settings_of(model)
    assert found.keys() == expected.keys()
    for name, (kind, values) in expected.items():
        other, got = found[name]
        assert other is kind, name
        differing = {key for key in got.keys() | values.keys() if got.get(key) != values.get(key)}
        assert differing <= {"name_or_path"}, (name, differing)
    assert digests(loaded) == digests(model) and loaded.config.to_dict() == model.config.to_dict()
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    trained = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (loaded, model)]
    assert trained[0] == trained[1]  # each parameter by one name: what is tied is one
    assert not [name for name, x in (*loaded.named_parameters(), *loaded.named_buffers()) if x.is_meta]
    # Parts have the configurations that the composition's holds, and not others of equal values.
    assert loaded.language_model.config is loaded.config.text_config
    for name, encoder in loaded.encoders.items():
        assert "module" in encoder.shares or encoder.module.config is getattr(loaded.config, f"{name}_config")
    assert files(to_native(loaded), folder / "again") == files(live, folder / "live")
    return loaded


def check_videos(native, tmp_path):
    """Images and videos of one row are equal too, and their tower is stored once."""
    inputs = inputs_of(native, videos=True)
    model, _ = from_native(native)
    check_equal(native, model, inputs)
    model.save_pretrained(tmp_path / "with videos")
    native.save_pretrained(tmp_path / "native")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("with videos", "native")]
    assert abs(sizes[0] - sizes[1]) < 40_000  # of names in the header, and metadata
    loaded = MultimodalModel.from_pretrained(tmp_path / "with videos").eval()
    given = own_memory(inputs)
    assert torch.equal(logits_of(own_memory(loaded), given), logits_of(own_memory(model), given))
    assert digests(to_native(loaded)) == digests(native)


def check_bfloat16(native):
    """The composition of a native model in bfloat16 computes in it, to the bit."""
    inputs = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in inputs_of(native).items()}
    native = copy.deepcopy(native).to(torch.bfloat16)
    found = logits_of(from_native(native)[0], inputs)
    assert found.dtype == torch.bfloat16 and torch.equal(found, logits_of(native, inputs))


# Types whose own forward adds up gradients in another order, to the last bit of some.
ADDED_OTHERWISE = {"muse_glimmer": 1e-8}


def check_gradients(native):
    """A training step of the composition has the native model's loss, and its gradient of every parameter."""
    inputs = inputs_of(native)
    # Without the first token of a row, which would be predicted from padding, where logits are nobody's.
    attended = inputs["attention_mask"].bool()
    learnt = attended & torch.nn.functional.pad(attended, (1, 0))[:, :-1]
    learnt &= ~torch.isin(inputs["input_ids"], torch.tensor(PLACEHOLDERS))
    labels = inputs["input_ids"].masked_fill(~learnt, -100)
    native = copy.deepcopy(native)
    model, _ = from_native(copy.deepcopy(native))
    losses = []
    for each in (native.train(), model.train()):
        torch.manual_seed(0)
        loss = each(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    theirs, ours = (dict(each.named_parameters(remove_duplicate=False)) for each in (native, model))
    pairs = prefixes(native, model, entry_of(native.config))
    names = {a: b for a, b in key_map(native, model, pairs)[0].items() if a in ours and b in theirs}
    assert any(theirs[name].grad is not None for name in names.values())
    for mine, its in names.items():
        found, expected = ours[mine].grad, theirs[its].grad
        assert (found is None) == (expected is None), mine
        near = ADDED_OTHERWISE.get(native.config.model_type, 0)
        assert found is None or float((found - expected).abs().max()) <= near, mine
