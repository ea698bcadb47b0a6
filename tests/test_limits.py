"""The caps: named in their errors, both numbers told, and set by whoever needs more."""

import pytest

from cornstarch_hf import limits


def test_a_cap_is_named_with_both_numbers_and_the_remedy(monkeypatch):
    limits.check_image(8_000, 8_000, "vision, item 0")
    with pytest.raises(
        ValueError,
        match=r"8000 x 8001 pixels has 64,008,000, more than cornstarch_hf.limits.MAX_IMAGE_PIXELS = 64,000,000: .* set",
    ):
        limits.check_image(8_000, 8_001, "vision, item 0")
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 64_008_000)
    limits.check_image(8_000, 8_001, "vision, item 0")
    assert limits.cap("MAX_IMAGE_PIXELS") == 64_008_000


def test_features():
    limits.check_features(limits.MAX_ITEM_FEATURES, "vision")
    with pytest.raises(ValueError, match="vision: .*MAX_ITEM_FEATURES"):
        limits.check_features(limits.MAX_ITEM_FEATURES + 1, "vision")


def test_every_cap_is_in_the_page_about_safety():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "safety.md").read_text()
    assert [name for name in dir(limits) if name.isupper() and f"`{name}`" not in text] == []


def test_positive_integers():
    assert limits.is_count(1) and limits.is_count(10**9) and limits.is_count(0, least=0)
    assert not any(map(limits.is_count, (0, -1, True, 1.0, "1", None)))
