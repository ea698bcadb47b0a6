"""The collator: labels, rows of every form, errors that name the row."""

import pytest
import tiny
import torch
from helpers import compose_tiny

from cornstarch_hf import MultimodalCollator


@pytest.fixture
def pair():
    return compose_tiny(["clip", "whisper"])


def test_collator_labels_only_what_is_to_be_learnt(pair):
    _, processor = pair
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what is <image>?"}],
        },
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "five"},
    ]
    batch = MultimodalCollator(processor)(
        [
            {"messages": talk},
            {"prompt": "a <audio> b", "completion": " is it", "audio": [tiny.sound()]},
            {"text": "<image> and <audio>", "vision": [tiny.image(1)], "audio": [tiny.sound(1)]},
            {"text": "none"},
        ]
    )
    learnt = [processor.decode([i for i in row if i != -100]) for row in batch["labels"].tolist()]
    assert learnt == ["seven</s>five</s>", " is it", " and ", "none"]
    assert batch["pixel_values"].shape[0] == 2 and batch["input_features"].shape[0] == 2
    assert torch.equal(batch["attention_mask"].sum(-1) > 0, torch.ones(4).bool())
    assert torch.equal(batch["labels"][batch["attention_mask"] == 0].unique(), torch.tensor([-100]))
    assert (batch["attention_mask"][:, 0] == 1).all(), "padded on the right"


def test_collator_joins_sequences_of_different_lengths():
    model, processor = compose_tiny(["wav2vec2"])
    items = [{"text": "<audio>", "audio": [tiny.sound(i, n)]} for i, n in enumerate((300, 500))]
    batch = MultimodalCollator(processor)(items)
    assert batch["audio_attention_mask"].sum(-1).tolist() == [300, 500]
    alone = [MultimodalCollator(processor)([item]) for item in items]
    with torch.no_grad():
        for row, one in enumerate(alone):
            length = one["input_ids"].shape[1]
            torch.testing.assert_close(
                model(**batch).logits[row, :length], model(**one).logits[0], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": []}, r"row 1: expected 'messages'"),
        ({"text": "x", "colour": 1}, r"row 1: unknown columns \['colour'\]"),
        ({"text": "<image>"}, "row 1: vision.*1 placeholders"),
        ({"text": "long " * 50}, "row 1: the row has .* tokens, max_length is 40"),
    ],
)
def test_collator_names_the_row(pair, row, message):
    with pytest.raises(ValueError, match=message):
        MultimodalCollator(pair[1], max_length=40)([{"text": "fine"}, row])
    with pytest.raises(ValueError, match="no rows"):
        MultimodalCollator(pair[1])([])
