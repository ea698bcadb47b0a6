"""How much an untrusted checkpoint, file or message may make this machine do: named caps, and the checks against them.

A user may set each of them, ``cornstarch_hf.limits.MAX_IMAGE_PIXELS = 400_000_000``; errors name the cap that they met.
"""

from typing import Any

# ---- what people send
MAX_IMAGE_PIXELS = 64_000_000  # width x height of one image, before it is decoded, and as resized or padded
MAX_MADE_PIXELS = 256_000_000  # of all that a processor makes of one image: resized, padded, in crops
MAX_AUDIO_SAMPLES = 100_000_000  # frames x channels of one sound, as stored, as resampled and as padded
MAX_VIDEO_FRAMES = 4_096  # frames of one video that are processed
MAX_VIDEO_PIXELS = 1_000_000_000  # frames x width x height of one video, as given and as resized
MAX_PADDED_TOKENS = 10_000_000  # to which the texts of one call are filled up
MAX_ITEM_FEATURES = 262_144  # placeholder tokens into which one item is expanded
MAX_FILE_BYTES = 512_000_000  # of one encoded image or sound, as file or as bytes
MAX_FETCH_SECONDS = 60.0  # from the first look at an address to the last byte of what lies there
LOCAL_MEDIA = True  # whether messages and rows may name files of this machine, and addresses in its networks
# Of pictures as files and bytes, by Pillow's names: those that it decodes by itself, and by no other program.
IMAGE_FORMATS: tuple[str, ...] = (
    "AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI",
    "SGI", "TGA", "TIFF", "WEBP", "XBM",
)  # fmt: skip

# ---- what a checkpoint says
MAX_LAYERS = 2_000  # entries of a configuration that name layers, depths, blocks or stages
MAX_LABELS = 100_000  # classes that a configuration names
MAX_CONFIG_DEPTH = 32  # dictionaries and lists within one another
MAX_CONFIG_VALUES = 1_000_000  # values in one configuration
MAX_CONFIG_BYTES = 100_000_000  # of one JSON file
MAX_BUILD_BYTES = 1_000_000_000  # of tables and masks that are computed, and not read, while parts are built
MAX_PLAIN_SIZE = 2_048  # numbers of a configuration up to which no computed table can be large
MAX_UNSTORED_ELEMENTS = 4_000_000  # of tensors that the configuration describes and the checkpoint does not hold
MAX_MODULES_PER_TENSOR = 8  # tensors that are built for each stored one: each layer makes some
MIN_MODULES = 20_000  # what is allowed however few tensors are stored

# ---- what a chat template does
MAX_TEMPLATE_CHARACTERS = 1_000_000  # of the template itself
MAX_TEMPLATE_TOKENS = 40_000  # words, numbers, signs and pieces of text of which it is written
MAX_TEMPLATE_CODE = 2_000_000  # characters of Python to which it is compiled
MAX_TEMPLATE_STEPS = 2_000_000  # passes through loops, calls, filters and tests
MAX_TEMPLATE_WORK = 200_000_000  # characters and list entries made in between
MAX_TEMPLATE_OUTPUT = 50_000_000  # characters of the text
MAX_TEMPLATE_SECONDS = 5.0  # of computing, while it is compiled and each time that it is rendered


def check(value: float, cap: str, what: str) -> None:
    """Refuse a value above the cap of that name (ValueError with both numbers and the remedy, beginning with `what`)."""
    limit = globals()[cap]
    if value > limit:
        raise ValueError(
            f"{what} {value:,}, more than cornstarch_hf.limits.{cap} = {limit:,}: if that is meant, set the attribute "
            "higher before."
        )


def check_image(width: int, height: int, where: str) -> None:
    """Refuse an image of more than `MAX_IMAGE_PIXELS` (ValueError)."""
    check(int(width) * int(height), "MAX_IMAGE_PIXELS", f"{where}: the image of {width} x {height} pixels has")


def check_features(count: int, name: str) -> None:
    """Refuse an item of more than `MAX_ITEM_FEATURES` features (ValueError)."""
    check(count, "MAX_ITEM_FEATURES", f"{name}: the number of features of one item is")


def cap(name: str) -> Any:
    """The value of a cap at the moment."""
    return globals()[name]


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer (no bool) that is not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(value: Any, what: str, least: int = 1) -> int:
    """The value, if it is an integer (no bool) that is not below `least`; else ValueError that begins with `what`."""
    if not is_count(value, least):
        expected = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{what} must be {expected}, got {value!r}.")
    return value


def check_switch(value: Any, what: str) -> Any:
    """The value, if it is True, False or None; else TypeError that begins with `what`."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r:.100}.")
    return value
