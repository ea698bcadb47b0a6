"""How much an operation of a template makes, found before it is done."""

import time

import pytest

from cornstarch_hf import limits
from cornstarch_hf.processing.template_bounds import GROWING, OPERATORS, Budget, TemplateLimit, weight


def test_weights_count_what_is_shared_each_time_and_stop(monkeypatch):
    shared = "a" * 100
    assert weight([shared, shared]) == 216
    assert weight({"k": 1}) == 17
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    monkeypatch.setattr(limits, "MAX_TEMPLATE_WORK", 1000)
    assert 1000 < weight(nested) < 2000


@pytest.mark.parametrize(
    ("operator", "left", "right", "made"),
    [
        ("*", "ab", 5, "ab" * 5),
        ("*", 3, [1, 2], [1, 2] * 3),
        ("+", "ab", "c", "abc"),
        ("%", "%s and %d", ("x" * 50, 3), "x" * 50 + " and 3"),
    ],
)
def test_operators_never_promise_less_than_they_make(operator, left, right, made):
    assert OPERATORS[operator](left, right) >= len(made)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("replace", ("aXa", "a", "bbb")),
        ("replace", ("abc", "", "zz")),
        ("center", ("a", 50)),
        ("zfill", ("a", 50)),
        ("expandtabs", ("\t\t", 10)),
        ("translate", ("aa", {97: "bbb"})),
    ],
)
def test_methods_never_promise_less_than_they_make(name, arguments):
    assert GROWING[name](*arguments) >= len(getattr(str, name)(*arguments))


@pytest.mark.parametrize(
    ("operator", "left", "right"),
    [("**", 9, 10**6), ("*", 1 << 4000, 1 << 4000), ("%", "%99999d", 1), ("%", "%*d", (9, 1))],
)
def test_operators_that_are_refused(operator, left, right):
    with pytest.raises(TemplateLimit):
        OPERATORS[operator](left, right)


def test_a_budget(monkeypatch):
    monkeypatch.setattr(limits, "MAX_TEMPLATE_STEPS", 2)
    budget = Budget()
    budget.step()
    budget.step()
    with pytest.raises(ValueError, match="MAX_TEMPLATE_STEPS = 2"):
        budget.step()
    monkeypatch.setattr(limits, "MAX_TEMPLATE_SECONDS", -1.0)
    with pytest.raises(TemplateLimit, match="MAX_TEMPLATE_SECONDS"):
        Budget().step()


def test_waiting_is_no_computing(monkeypatch):
    monkeypatch.setattr(limits, "MAX_TEMPLATE_SECONDS", 0.2)
    budget = Budget()
    time.sleep(0.3)  # as on a machine where others compute
    budget.step()
