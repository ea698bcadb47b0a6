"""Image processors that split images into tiles, with settings for tiles of 8 x 8 pixels, and compositions with them."""

import tiny
import transformers

from cornstarch_hf import compose

SQUARE = {"height": 8, "width": 8}
POINTS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
PROCESSORS: dict[str, dict] = {
    "LlavaNext": {"size": {"shortest_edge": 8}, "crop_size": SQUARE, "image_grid_pinpoints": POINTS},
    "LlavaOnevision": {"size": SQUARE, "image_grid_pinpoints": POINTS},
    "Idefics3": {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 8}},
    "SmolVLM": {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 8}},
    "GotOcr2": {"size": SQUARE, "crop_to_patches": True, "max_patches": 6},
    "Ovis2": {"size": SQUARE, "crop_to_patches": True, "max_patches": 6},
    "Gemma3": {"size": SQUARE, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4, "pan_and_scan_max_num_crops": 4,
               "pan_and_scan_min_ratio_to_activate": 1.2},
    "Idefics2": {"size": SQUARE, "do_image_splitting": True},
    # Its crops have 490 or 980 pixels.
    "Aria": {"max_image_size": 490, "split_image": True, "split_resolutions": [[490, 980], [980, 490], [980, 980]]},
}  # fmt: skip
UNPADS = ("LlavaNext", "LlavaOnevision")  # those that fit images into the middle of a canvas and say so
TELL_NO_GRID = ("Idefics2",)
LARGE = {"image_size": 490, "patch_size": 245}


def takes(name, size):
    """Whether an image processor makes something of pictures of that size: beside torchvision Idefics 2's rounds thin sides to none."""
    return min(size) > 1 or name != "Idefics2" or tiny.BACKEND == "Pil"


def built(name):
    """A processor of the backend that a saved one loads as."""
    return getattr(transformers, f"{name}ImageProcessor{tiny.BACKEND}")(**PROCESSORS[name])


def composed(name, packing, encoder="clip", projector="linear", drop_prefix=None, **changes):
    """A tiny model and its processor; of the encoder what is no patch is dropped."""
    tower = getattr(tiny, encoder)(**(LARGE if name == "Aria" else {}) | changes)
    dropped = drop_prefix if drop_prefix is not None else 0 if encoder == "siglip" else 1
    entry = {"model": tower, "processor": built(name), "tiles": packing, "drop_prefix": dropped}
    return compose(tiny.llama(), {"vision": entry}, projector, tokenizer=tiny.tokenizer())
