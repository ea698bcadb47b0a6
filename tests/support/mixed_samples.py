"""Left-padded samples with an image and a sound, an image, and text alone, for models of any type."""

import torch

IMAGE, SOUND = 310, 311  # inside the vocabulary, so that the hand-made reference can embed whatever is there


PLACEHOLDERS = {"vision": IMAGE, "audio": SOUND}


def inputs():
    """Three left-padded samples: an image and a sound, an image, text alone."""
    image, sound = [IMAGE] * 5, [SOUND] * 6
    rows = [[11, 12, *image, 13, *sound, 14, 15], [21, *image, 22, 23], [31, 32, 33, 34]]
    length = max(map(len, rows))
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "input_features": torch.randn(1, 8, 12, generator=generator),
    }
