"""Texts on their way through a native processor: where the parts of a text lie in what the class made of it."""

import pytest

from cornstarch_hf.processing.native_texts import in_changed_text

IMAGE, FAKE, END = "<image>", "<fake>", "<end>"
SPECIAL = [IMAGE, FAKE, END, "<s>"]
ITEM = f"{FAKE}{IMAGE}{IMAGE}{FAKE}"
# What is given; what a class makes of it; parts of the former that are looked up in the latter.
CHANGED = {
    "a space behind an item": ("a <image>b c", f"a {ITEM} b c", ["a ", "b c"]),
    "no space": ("a <image> b", f"a {ITEM} b", ["a ", " b"]),
    "the letters of a token": ("<image>fake<image>z", f"{ITEM} fake{ITEM} z", ["fake", "z"]),
    "side by side": ("<image><image>x", f"{FAKE}{IMAGE}{IMAGE}{FAKE}{IMAGE}{IMAGE}{FAKE} x", ["x"]),
    "at the end": ("x<image>", f"x{ITEM}", ["x"]),
    "a special token behind an item": ("<image><end>y", f"{ITEM}{END}y", ["<end>y"]),
    "a token for the beginning": ("<image>what is", f"{IMAGE}{IMAGE}<s>what is\n", ["what is"]),
    "the same token twice": ("<image><s>what", f"{IMAGE}{IMAGE}<s><s>what\n", ["<s>what"]),
    "no item": ("what", "what\n", ["what"]),
    "line breaks": ("<image>\nis\n", f"{IMAGE}<s>\nis\n\n", ["\nis\n"]),
}


@pytest.mark.parametrize("given, changed, parts", CHANGED.values(), ids=CHANGED)
def test_parts_are_found_in_what_became_of_a_text(given, changed, parts):
    found = in_changed_text(given, changed, [IMAGE], SPECIAL)
    for part in parts:
        start = given.index(part)
        moved = found.moved(start), found.moved(start + len(part) - 1) + 1
        assert changed[slice(*moved)] == part
    assert found.text == changed


@pytest.mark.parametrize(
    "given, changed",
    [
        ("a<image>b", f"a{ITEM}B"),
        ("a<image>b", f"A{ITEM}b"),
        ("a<image>b", f"a{ITEM}  b"),
        ("a<image>b", f"a{ITEM}b and more"),
        ("a<image><end><image>", f"a{ITEM}{END}{ITEM}"),
        ("a", ""),
    ],
)
def test_what_cannot_be_found_is_said(given, changed):
    assert in_changed_text(given, changed, [IMAGE], SPECIAL) is None
