"""The sizes at which everything is measured: the full ones, and small ones that only show that the harness runs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What is built and how often it is measured.

    Attributes:
        vision: of the CLIP vision tower.
        text: of the Llama, without its vocabulary.
        vocabularies: tokens of the language model; the placeholder is the last one.
        batch: samples of a training step and of a forward pass, one image each.
        text_tokens: tokens beside the image's features in each sample.
        labelled: last tokens of each sample that have a label.
        pairs: how often each of the two models is timed, by measurement.
        loads: how many loads make one sample, their least.
        new_tokens: tokens that are decoded.
        memory_vocabularies: those at which peak memory is taken.
        memory_modes: what trains in these steps.
        allocators: how memory is freed in them, names of `memory.ALLOCATORS`.
        image: width and height of the processor's images in pixels.
        judged: whether results are held against the targets.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    vocabularies: tuple[int, ...]
    batch: int
    text_tokens: int
    labelled: int
    pairs: dict[str, int]
    loads: int
    new_tokens: int
    memory_vocabularies: tuple[int, ...]
    memory_modes: tuple[str, ...]
    allocators: tuple[str, ...]
    image: tuple[int, int]
    judged: bool

    @property
    def image_tokens(self) -> int:
        """Features of one image: its patches, the CLS token dropped."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


FULL = Sizes(
    vision={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    text={
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
    },
    vocabularies=(32_000, 128_256),
    batch=2,
    text_tokens=64,
    labelled=32,
    pairs={
        "import": 5,
        "memory": 1,
        "counting": 7,
        "forward": 5,
        "train": 3,
        "generate": 5,
        "processor": 15,
        "save": 7,
        "load": 15,
        "forward, smallest": 400,
        "decode, smallest": 6,  # rounds, of `new_tokens` pairs each
        "generate, smallest": 60,
        "forward, ordinary": 7,
        "decode, ordinary": 2,
        "generate, ordinary": 5,
        "labels": 5,
        "labels, memory": 1,
        "chat": 5,
        "collator": 15,
        "ladder": 5,
    },
    loads=5,
    new_tokens=64,
    memory_vocabularies=(32_000, 128_256),
    memory_modes=("projector", "all"),
    allocators=("", ", freed memory returned"),
    image=(640, 480),
    judged=True,
)

QUICK = Sizes(
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    },
    text={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    vocabularies=(400,),
    batch=2,
    text_tokens=8,
    labelled=4,
    pairs=dict.fromkeys(FULL.pairs, 1),
    loads=2,
    new_tokens=4,
    memory_vocabularies=(400,),
    memory_modes=("projector",),
    allocators=("",),
    image=(40, 30),
    judged=False,
)
