"""Registries: names that users add to, and what happens to names that are taken, missing or malformed."""

import pytest
from torch import nn

from cornstarch_hf import (
    register_callback,
    register_feature_count,
    register_mask_rule,
    register_position_rule,
    register_projector,
)
from cornstarch_hf.parts.registries import (
    CALLBACKS,
    FEATURE_COUNTS,
    MASK_RULES,
    POSITION_RULES,
    PROJECTORS,
    Callback,
    Registry,
)

REGISTERS = [(register_projector, PROJECTORS), (register_callback, CALLBACKS), (register_feature_count, FEATURE_COUNTS)]
REGISTERS += [(register_position_rule, POSITION_RULES), (register_mask_rule, MASK_RULES)]


def one(*_):
    return 1


def two(*_):
    return 2


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for _, registry in REGISTERS:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def registry():
    made = Registry("flavour", "Add one with taste(name).")
    made.add("sweet", one)
    made.add("sour", Callback(two))
    return made


def test_it_reads_like_a_mapping(registry):
    assert list(registry) == ["sweet", "sour"] and "sweet" in registry and "salty" not in registry
    assert registry["sweet"] is one and registry.get("salty") is None and registry.get("salty", 3) == 3


def test_an_unknown_name_lists_the_known_ones_and_the_remedy(registry):
    with pytest.raises(ValueError, match=r"Unknown flavour 'salty'.*\['sour', 'sweet'\]\. Add one with taste"):
        registry["salty"]


def test_the_same_entry_again_is_fine_another_is_refused(registry):
    registry.add("sweet", one)
    with pytest.raises(ValueError, match="flavour 'sweet' is registered already"):
        registry.add("sweet", two)
    assert registry["sweet"] is one


@pytest.mark.parametrize("name", ["", None, 3, ("a",)])
def test_names_are_text(registry, name):
    with pytest.raises(TypeError, match="name of a flavour must be a non-empty string"):
        registry.add(name, one)


def test_names_are_found_by_identity(registry):
    assert registry.name_of(one) == "sweet" and registry.name_of(two) == "sour"
    assert registry.name_of(lambda *_: 1) is None


@pytest.mark.parametrize(("register", "registry"), REGISTERS)
def test_public_functions_fill_their_own_registry(register, registry):
    register("mine", one)
    register("mine", one)
    assert registry.name_of(one) == "mine"
    assert [r for _, r in REGISTERS if "mine" in r] == [registry]
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register("mine", two)
    with pytest.raises(TypeError, match=r"register_\w+\('other', .*got 'one'"):
        register("other", "one")
    assert "other" not in registry


def test_a_callbacks_count_belongs_to_its_registration():
    register_callback("mine", one, feature_count=two)
    assert CALLBACKS["mine"] == (one, two) and CALLBACKS["mine"].feature_count is two
    with pytest.raises(ValueError, match="callback 'mine'"):
        register_callback("mine", two)


def test_something_may_be_registered_while_another_thread_looks_something_up():
    registry = Registry("thing", "Add one.")

    class Adds:
        def __getattr__(self, name):
            registry.add(f"more {len(registry._entries)}", 1)
            raise AttributeError(name)

    for name in "ab":
        registry.add(name, Adds())
    for name in registry:
        registry.add(f"{name} again", 2)
    assert registry.name_of(object()) is None and set(registry) >= {"a", "b", "a again"}


def test_a_projector_is_registered_by_its_class():
    with pytest.raises(TypeError, match=r"got Linear\(.*: register Linear, its class"):
        register_projector("an_instance", nn.Linear(2, 2))
    assert "an_instance" not in PROJECTORS
