"""Name patterns: lists of patterns and the sets of parameter names that they stand for."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cornstarch_hf.parts.names import as_regex, compress, matches

WORD = st.sampled_from(["a", "b", "norm", "q_proj"])
NUMBER = st.sampled_from(["0", "1", "2", "10"])
NAME = st.lists(st.one_of(WORD, NUMBER), min_size=1, max_size=5).map(".".join)


def leaves(names):
    """A name of a parameter is never that of a module too."""
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


NAMES = st.lists(NAME, unique=True, max_size=24).map(leaves)


@settings(max_examples=300, deadline=None)
@given(st.data(), NAMES)
def test_patterns_match_exactly_what_they_were_made_from(data, names):
    selected = {name for name in names if data.draw(st.booleans())}
    assert matches(compress(selected, names), names) == selected


@settings(max_examples=200, deadline=None)
@given(NAMES.filter(bool))
def test_everything_takes_one_pattern_for_each_root(names):
    assert compress(names, names) == sorted({name.split(".")[0] for name in names})
    assert compress([], names) == [] and matches([], names) == set()


@settings(max_examples=200, deadline=None)
@given(st.data(), NAMES)
def test_order_and_repetition_do_not_matter(data, names):
    selected = [name for name in names if data.draw(st.booleans())]
    assert compress(selected * 2, reversed(names)) == compress(selected, names)


def test_patterns_of_a_real_model_are_short():
    names = [name for name, _ in tiny.llama().named_parameters()]
    attention = [name for name in names if ".self_attn." in name]
    assert compress(attention, names) == ["model.layers.*.self_attn"]
    first = [name for name in names if name.startswith("model.layers.0.")]
    assert matches(compress(first, names), names) == set(first)
    assert compress([name for name in names if name != "lm_head.weight"], names) == ["model"]


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("a", "a.w", True),
        ("a", "ab.w", False),
        ("a.*", "a.12.w", True),
        ("a.*", "a.b.w", False),
        ("a.*.w", "a.1.w.x", True),
        ("a.*.w", "a.1.2.w", False),
        ("a+b", "aab", False),
        ("w", "a.w", False),
    ],
)
def test_a_pattern_ends_at_a_dot_and_a_star_is_one_number(pattern, name, found):
    assert (name in matches([pattern], [name])) is found
    assert as_regex(pattern).startswith("^")
