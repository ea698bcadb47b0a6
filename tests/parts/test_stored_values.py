"""Values of JSON files: what passes, and what is refused with its place."""

import json

import pytest

from cornstarch_hf import limits
from cornstarch_hf.parts.stored_values import (
    check_auto_map,
    check_dtype,
    check_number_of_values,
    check_pattern,
    check_switches,
    check_types,
    check_values,
    read_json,
)


def test_ordinary_values_pass():
    check_values(
        {"model_type": "x", "dtype": "bfloat16", "text_config": {"torch_dtype": "auto", "num_hidden_layers": 96}}, "f"
    )
    check_values(
        {"time_step_limit": [0.0, float("inf")], "limit": {"__float__": "Infinity"}, "id2label": {"0": "update"}}, "f"
    )
    check_values(
        {
            "vision_feature_layer": -2,
            "vocab_size": 256_000,
            "drop_prefix": 5,
            "hidden_dropout_prob": 1,
            "max_position_embeddings": 10**7,
            "attn_implementation": "sdpa",
        },
        "f",
    )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"a": {"__init__": 1}}, "f: a has the key '__init__'"),
        ({"save_pretrained": 1}, "replace methods"),
        ({"text_config": {"model_type": 3}}, "model_type 3, expected a string"),
        ({"dtype": "float33"}, "f: dtype is 'float33'"),
        ({"a": {"n_layer": 2001}}, "f: a.n_layer is 2,001, more than cornstarch_hf.limits.MAX_LAYERS"),
        ({"depths": [2, 5000]}, "MAX_LAYERS"),
        ({"x": [float("nan")]}, "f: x is nan"),
        ({"x": -(2**63) * 4}, "an integer of 66 bits"),
        (
            {"audio_config": {"activation_dropout": 2**62}},
            r"f: audio_config.activation_dropout is 4\d+, expected a rate from 0",
        ),
        ({"text_config": {"attn_pdrop": -0.5}}, "attn_pdrop is -0.5, expected a rate from 0 to 1"),
        ({"vision_config": {"drop_path_rate": 1.5}}, "drop_path_rate is 1.5, expected a rate from 0 to 1"),
        ({"auto_map": "x"}, "auto_map must be a dictionary"),
        ({"experts_implementation": "a/b"}, "kernels"),
    ],
)
def test_what_is_refused(values, match):
    with pytest.raises(ValueError, match=match):
        check_values(values, "f")


def test_size_and_depth(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CONFIG_VALUES", 10)
    check_values({"x": [1] * 7}, "f")
    with pytest.raises(ValueError, match="MAX_CONFIG_VALUES = 10"):
        check_values({"x": [1] * 20}, "f")
    monkeypatch.undo()
    deep = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ValueError, match="depth of 33"):
        check_values(deep, "f")


def test_auto_map():
    for entry in ("modeling_x.Model", "user/repo--modeling_x.Model"):
        check_auto_map({"AutoModel": entry, "AutoTokenizer": [None, entry]}, "f")
    check_auto_map({"AutoModel": "user/repo--modeling_x.Model"}, "f", "user/repo", here_only=True)
    for entry in ("../x.Model", "user/repo--modeling_x.Model", "x"):
        with pytest.raises(ValueError, match="auto_map\\['AutoModel'\\]"):
            check_auto_map({"AutoModel": entry}, "f", here_only=True)


def test_dtypes_types_and_switches():
    for name in ("float32", "torch.bfloat16"):
        check_dtype(name, "f")
    for name in ("os", "nn", "tensor", "", "float32.x", 3, None):
        with pytest.raises(ValueError, match="expected the name of a torch data type"):
            check_dtype(name, "f")
    check_types({"a": None, "b": 3}, {"a": (dict,), "b": (int,), "c": (str,)}, "f")
    with pytest.raises(ValueError, match="f: b must be a int, got bool"):
        check_types({"b": True}, {"b": (int,)}, "f")
    check_switches({"a": True}, "f")
    with pytest.raises(ValueError, match="the argument 'a' must be True or False, got 1"):
        check_switches({"a": 1}, "f")


@pytest.mark.parametrize(
    "pattern", [r".*layers\.\d+\.(self_attn|mlp)\..*_proj", "q_proj|v_proj", r"(\.model)?.*q", "q{1,3}", "[a-z]+"]
)
def test_patterns_that_are_usual(pattern):
    check_pattern(pattern, "f")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        r"(\w+)+!",
        "(a|a)*b",
        ".*.*.*.*.*x",
        "(a|a)" * 9,
        "a" * 1001,
        r"(a)\1",
        "(",
        3,
        "(?:(?:a{1,99}){1,99})",
    ],
)
def test_patterns_without_end(pattern):
    with pytest.raises(ValueError, match="f: "):
        check_pattern(pattern, "f")


def test_files_are_read_strictly(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": {"b": 1}}')
    assert read_json(path, "x") == {"a": {"b": 1}}
    for text, match in [
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
        ("{", "no JSON"),
        ("[" * 10**5, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "no JSON|digits"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_json(path, "x")
    monkeypatch.setattr(limits, "MAX_CONFIG_BYTES", 10)
    path.write_text(json.dumps("x" * 20))
    with pytest.raises(ValueError, match="MAX_CONFIG_BYTES"):
        read_json(path, "x")


@pytest.mark.parametrize(
    ("text", "values"),
    [('{"a": [1, {}, "x,[{"], "b": "\\",[{"}', 6), ("[[[[ ]]]]", 4), ('[",,,,,,", "\\\\", 3]', 4), ("[{},{},{}]", 4)],
)
def test_values_are_counted_before_they_are_made(text, values, monkeypatch):
    json.loads(text)  # is JSON
    monkeypatch.setattr(limits, "MAX_CONFIG_VALUES", values)
    check_number_of_values(text, "x")
    monkeypatch.setattr(limits, "MAX_CONFIG_VALUES", values - 1)
    with pytest.raises(
        ValueError, match=f"x: its number of values is at least {values}, more than .*MAX_CONFIG_VALUES"
    ):
        check_number_of_values(text, "x")
