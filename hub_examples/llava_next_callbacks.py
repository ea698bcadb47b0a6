"""LLaVA-NeXT by callbacks: any-resolution tiles on top of any vision encoder and any language model.

The encoder itself knows one tile.  A preprocess callback flattens the tiles of all images; a callback after the
projector puts each image's tiles together, cuts off what padding added, and ends every row of patches with a learnt
feature (Liu et al. 2024, https://llava-vl.github.io/blog/2024-01-30-llava-next/).  The callbacks are registered, so
they are saved with the model and found again; the learnt feature is a parameter of one of them.

    python hub_examples/llava_next_callbacks.py --language-model mistralai/Mistral-7B-Instruct-v0.3 \
        --vision openai/clip-vit-large-patch14-336
"""

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from cornstarch_hf import compose, register_callback


def flatten_tiles(inputs: dict, grid_pinpoints: list, tile_size: int) -> dict:
    """``(images, most tiles, channels, size, size)`` to ``(all tiles, channels, size, size)``, padding tiles dropped."""
    counts = [image_size_to_num_patches(size, grid_pinpoints, tile_size) for size in inputs["image_sizes"]]
    tiles = [pixels[:count] for pixels, count in zip(inputs["pixel_values"], counts, strict=True)]
    return inputs | {"pixel_values": torch.cat(tiles), "tiles": counts}


class PackTiles(nn.Module):
    """The features of each image's tiles as one sequence, row by row, with a learnt feature at each row's end."""

    def __init__(self, hidden_size: int, grid_pinpoints: list, tile_size: int, patches_per_side: int):
        super().__init__()
        self.hidden_size, self.grid_pinpoints = hidden_size, grid_pinpoints
        self.tile_size, self.patches_per_side = tile_size, patches_per_side
        self.image_newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)

    def forward(self, inputs, output):
        images = torch.split(output[0], inputs["tiles"])
        packed = [self.pack(image, size) for image, size in zip(images, inputs["image_sizes"], strict=True)]
        output.last_hidden_state = packed
        return output

    def pack(self, tiles: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
        """``(tiles, patches, hidden)`` of one image to ``(features, hidden)``."""
        side = self.patches_per_side
        whole, parts = tiles[0], tiles[1:]
        rows, columns = get_anyres_image_grid_shape(image_size, self.grid_pinpoints, self.tile_size)
        grid = parts.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        grid = unpad_image(grid, image_size)  # (hidden, height, width)
        newline = self.image_newline[:, None, None].expand(*grid.shape[:-1], 1).to(grid)
        grid = torch.cat([grid, newline], dim=-1).flatten(1, 2).transpose(0, 1)
        return torch.cat([whole, grid])


register_callback("llava_next.flatten_tiles", flatten_tiles)
register_callback("llava_next.pack_tiles", PackTiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a ViT-like vision encoder with a class token")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vision = options.vision or make_vision_encoder(folder / "vision", any_resolution=True)
        language_model = options.language_model or make_language_model(folder / "language")
        config = AutoConfig.from_pretrained(vision)
        config = getattr(config, "vision_config", config)
        size, side = config.image_size, config.image_size // config.patch_size
        grids = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
        shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        hidden = AutoConfig.from_pretrained(language_model).get_text_config().hidden_size
        model, processor = compose(
            language_model,
            {
                "vision": {
                    "model": vision,
                    "processor": LlavaNextImageProcessorPil(**shape, image_grid_pinpoints=grids),
                    "layer": -2,
                    "drop_prefix": 1,
                    "additional_args": ["image_sizes"],
                    "preprocess_callback": functools.partial(flatten_tiles, grid_pinpoints=grids, tile_size=size),
                    "postprocess_projector_callback": PackTiles(hidden, grids, size, side),
                }
            },
            projector="mlp",
        )
        model.save_pretrained(folder / "composed")
        processor.save_pretrained(folder / "composed")
        model, processor = (
            AutoModel.from_pretrained(folder / "composed"),
            AutoProcessor.from_pretrained(folder / "composed"),
        )
        images = [Image.new("RGB", (3 * size, size), "red"), Image.new("RGB", (size, 2 * size), "blue")]
        text = ["<image> what is it?", "describe the picture <image>"]
        inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
        features = model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
        counts = (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()
        print("features per image:", [len(x) for x in features.pooler_output], "placeholders:", counts)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        print("answers:", processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
