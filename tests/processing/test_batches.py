"""Batches of the processor: labels put into one never stand on placeholders."""

import copy
import pickle

import pytest
import tiny
import torch
from helpers import compose_tiny
from trainers import Rows, losses, trainer
from transformers import BatchFeature

from cornstarch_hf.processing.placeholder_text import MultimodalBatch


@pytest.fixture
def batch():
    return MultimodalBatch({"input_ids": torch.tensor([[5, 9, 9, 6], [5, 6, 0, 0]])}, placeholder_ids=[9])


def test_labels_on_placeholders_are_masked_in_a_copy(batch):
    labels = batch["input_ids"].clone()
    batch["labels"] = labels
    assert batch["labels"].tolist() == [[5, -100, -100, 6], [5, 6, 0, 0]]
    assert labels.tolist() == batch["input_ids"].tolist() == [[5, 9, 9, 6], [5, 6, 0, 0]]
    batch.update(labels=labels)
    assert batch["labels"][0, 1] == -100


def test_other_entries_and_labels_that_do_not_fit_stay(batch):
    scores, other = torch.tensor([9, 9]), torch.full((2, 4), 9)
    batch["labels"], batch["other"] = scores, other
    assert batch["labels"] is scores and batch["other"] is other
    batch["labels"] = [[9]]
    assert batch["labels"] == [[9]]
    assert MultimodalBatch({"labels": scores})["labels"] is scores


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), lambda b: b.to("cpu")]
)
def test_copies_and_pickles_know_the_placeholders(batch, again):
    made = again(batch)
    made["labels"] = made["input_ids"].clone()
    assert isinstance(made, BatchFeature) and made["labels"][0].tolist() == [5, -100, -100, 6]


def test_the_usual_collator_of_tutorials_trains_with_plain_trainer(tmp_path):
    """Copy the ids, mask the padding: Trainer counts labels before the model sees them, so they must be right by then."""
    model, processor = compose_tiny(["clip"], tiny.llama(vocab_size=300))
    assert processor.image_token_id >= 300  # the head has no such token

    def collate(rows):
        out = processor(
            text=[r["text"] for r in rows], images=[r["images"] for r in rows], padding=True, return_tensors="pt"
        )
        labels = out["input_ids"].clone()
        labels[out["attention_mask"] == 0] = -100
        out["labels"] = labels
        return out

    items = [{"text": f"<image> it is {i}", "images": [tiny.image(i)]} for i in range(4)]
    batch = collate(items)
    made = trainer(model, processor, tmp_path, items, max_steps=1)
    made.data_collator, made.train_dataset = collate, Rows(items)
    expected = model(**batch).loss.item()
    made.train()
    assert losses(made) == pytest.approx([expected], rel=1e-5)
