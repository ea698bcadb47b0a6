"""The features of an image's tiles as one sequence; `processing/tiles` makes the tiles.

A checkpoint's code carries this file only where an encoder takes tiles.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..parts.registries import register_callback
from ..processing.tiles import run_tiled
from ..projectors.projector import per_item
from .grids import patch_grid

# What each way of packing reads besides the tiles, as `run_tiled` gives it.
PACKINGS = {
    "concat": ("num_tiles",),
    "newline": ("num_tiles", "tile_grids"),
    "unpad": ("num_tiles", "tile_grids", "tile_image_sizes"),
}
_WHY = dict.fromkeys(("num_tiles", "tile_grids"), "which was not given: pass what the processor gave together")
_WHY["tile_image_sizes"] = (
    "which its processor does not give: it does not fit images into the middle of a canvas; take tiles='newline' or 'concat'"
)
RUN = run_tiled  # whose file puts it where the processor looks for it


class PackedTiles(nn.Module):
    """Joins the projected features of an image's tiles to one sequence, in the order of its processor.

    ``"newline"`` puts the tiles together to the image that they are of and ends each of its rows by a learnt vector; the whole
    image made small, before or behind them, stays a sequence.  ``"unpad"`` also leaves out the features of what was padded
    (LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next/).  An image of one tile ends in the vector.

    Args:
        packing: ``"concat"``, ``"newline"`` or ``"unpad"``.
        hidden_size: width of the learnt vector; by the language model, when a model is composed.

    Raises:
        ValueError: another packing.
    """

    takes_config = takes_name = True

    def __init__(self, packing: str, hidden_size: int | None = None):
        super().__init__()
        if not isinstance(packing, str) or packing not in PACKINGS:
            raise ValueError(f"tiles must be one of {list(PACKINGS)}, or left out, got {packing!r:.100}.")
        self.packing, self.hidden_size = packing, hidden_size
        newline = torch.randn(hidden_size) * hidden_size**-0.5 if hidden_size else None
        self.image_newline = None if newline is None else nn.Parameter(newline)

    @classmethod
    def chosen(cls, packing: Any, inputs: Sequence[str], callback: Any, kind: str) -> tuple[list[str], "PackedTiles"]:
        """Additional inputs and the callback of an encoder with that option; `callback` is the one of its user.

        ValueError for an unknown packing, an encoder of another kind than images, and beside a callback of the user's.
        """
        tiles = cls(packing)
        if callback is not None:
            raise ValueError(
                f"{kind}: tiles={packing!r} is what follows the projector, and so is postprocess_projector_callback: leave out "
                "tiles= and pack in your callback, or work on single tiles in postprocess_module_callback."
            )
        if kind != "image":
            raise ValueError(
                f"{kind}: tiles={packing!r} is for an encoder of images, its kind is {kind!r}: leave it out."
            )
        return [*inputs, *(name for name in PACKINGS[packing] if name not in inputs)], tiles

    def complete(self, encoder: Any, width: int) -> None:
        """Make the learnt vector for a language model of that width (in place), on the projector's device and in its dtype.

        ValueError for a projector whose features lie in no grid, and a vector of another width.
        """
        projector = encoder.projector
        if self.packing == "concat":
            return
        if projector.reduces and not projector.needs_grid:
            raise ValueError(
                f"{encoder.name}: tiles={self.packing!r} needs features that lie in rows and columns, the projector "
                f"{projector.config.projection_type!r} leaves a sequence of each tile: take tiles='concat', or 'pixel_shuffle' "
                "or 'avg_pool' to reduce."
            )
        if self.hidden_size not in (None, width):
            raise ValueError(
                f"{encoder.name}: its tiles' newline has the width {self.hidden_size}, the language model {width}: leave "
                "hidden_size out."
            )
        if self.image_newline is None:
            self.hidden_size = width
            weight = next(projector.parameters(), torch.empty(0))
            start = torch.randn(width, dtype=weight.dtype, device=weight.device) * width**-0.5
            self.image_newline = nn.Parameter(start)

    def forward(self, inputs: dict[str, Any], output: Any, config: Any = None, name: str = "tiles") -> BaseModelOutput:
        """Projected tiles ``(tiles of all images, tokens, hidden)``, or packed, to one ``(n_i, hidden)`` per image.

        Rows without `num_tiles` are images of one tile.  ValueError where inputs and tiles do not fit together.
        """
        tiles: Any = per_item(output.last_hidden_state, output.lengths, name)  # of each tile (tokens, hidden)
        missing = [key for key in PACKINGS[self.packing] if inputs.get(key) is None]
        if 0 < len(missing) < len(PACKINGS[self.packing]):
            raise ValueError(f"{name}, item 0: tiles={self.packing!r} needs {missing[0]}, {_WHY[missing[0]]}.")
        counts = [1] * len(tiles) if missing else inputs["num_tiles"].tolist()
        if sum(counts) != len(tiles) or min(counts, default=1) < 1:
            raise ValueError(
                f"{name}: num_tiles={counts!r:.200} makes {sum(counts)} tiles, got {len(tiles)} rows of pixel_values: pass "
                "what the processor gave together."
            )
        packed, start = list[Tensor](), 0
        for i, count in enumerate(counts):
            own, where = tiles[start : start + count], f"{name}, item {i}"
            packed.append(torch.cat(own) if self.packing == "concat" else self._in_rows(own, i, inputs, config, where))
            start += count
        return BaseModelOutput(last_hidden_state=packed)  # type: ignore[arg-type]

    def _in_rows(self, tiles: list[Tensor], i: int, inputs: dict[str, Any], config: Any, where: str) -> Tensor:
        """One image's features ``(n, hidden)``, rows of its tiles put together ended by the learnt vector."""
        if self.image_newline is None:
            raise ValueError(
                f"{where}: tiles={self.packing!r} has no learnt vector yet: compose the encoder into a model."
            )
        newline = self.image_newline.to(tiles[0])
        if len(tiles) == 1:
            return torch.cat([tiles[0], newline[None]])
        rows, columns, whole = inputs["tile_grids"][i].tolist()
        if not rows or rows * columns + (whole >= 0) != len(tiles) or whole not in (-1, 0, len(tiles) - 1):
            raise ValueError(
                f"{where}: tiles={self.packing!r} needs tiles that lie in rows and columns, got {len(tiles)} whose processor "
                f"does not tell how (tile_grids {[rows, columns, whole]}): take tiles='concat'."
            )
        side = _tile_grid(tiles[0], inputs, config, where)
        places = [k for k in range(len(tiles)) if k != whole]
        # (tiles, tokens, hidden) to maps (hidden, rows of tokens, columns of tokens)
        maps = (
            torch.stack([tiles[k] for k in places]).view(rows, columns, *side, -1).permute(4, 0, 2, 1, 3).contiguous()
        )
        maps = maps.flatten(1, 2).flatten(2, 3)
        if self.packing == "unpad":
            maps = _without_padding(maps, inputs["tile_image_sizes"][i].tolist())
        maps = torch.cat([maps, newline[:, None, None].expand(*maps.shape[:-1], 1)], dim=-1)
        sequence = maps.flatten(1, 2).transpose(0, 1)
        order = [sequence] if whole < 0 else [tiles[0], sequence] if whole == 0 else [sequence, tiles[whole]]
        return torch.cat(order)


def _without_padding(maps: Tensor, size: list[int]) -> Tensor:
    """Maps ``(hidden, rows, columns)`` of an image ``(height, width)`` that was fitted into their middle, without the rest."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    return unpad_image(maps, size)


def _tile_grid(tile: Tensor, inputs: dict[str, Any], config: Any, where: str) -> tuple[int, int]:
    """Rows and columns of a tile's features ``(tokens, hidden)``: its encoder's patches, or squares of them made one."""
    tokens, patches = len(tile), patch_grid(inputs, config)
    rows, columns = patches[-2:] if patches else (0, 0)
    side = isqrt(rows * columns // tokens) if tokens else 0
    if not side or rows % side or columns % side or rows * columns != tokens * side**2:
        surplus = tokens - rows * columns
        remedy = (
            f"remove class and register tokens by drop_prefix={surplus} more" if surplus > 0 else "take tiles='concat'"
        )
        raise ValueError(
            f"{where}: {tokens} features of a tile do not fill its grid of {rows} x {columns} = {rows * columns} patches, nor "
            f"squares of them: {remedy}."
        )
    return rows // side, columns // side


register_callback("tiles", PackedTiles)
