"""Tiny vision encoders of every class of transformers: the rows of the catalogue.  A plain module, no tests."""

from catalog import Case, Inputs, floats


def image(side: int = 32, other: int | None = None, name: str = "pixel_values", channels: int = 3):
    """Items that are one image; of an encoder that takes any size, odd items have another one."""

    def items(i: int) -> Inputs:
        return {name: floats(i, 1, channels, other if other and i % 2 else side, side)}

    return items


CASES: dict[str, Case] = {
    "CLIPVisionModel": Case(image()),
}
