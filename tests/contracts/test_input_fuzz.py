"""Random calls at the input door: the right counts, batch equal to single, errors by name, nothing given changed.

`INPUT_FUZZ` calls, each from its own seed: ``INPUT_FUZZ_SEED=1234`` runs that one alone.
"""

import itertools
import os
import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from fuzz_calls import Call, made_call
from fuzz_wrong import spoil
from PIL import Image

from cornstarch_hf.encoders.items import split_items

CALLS = int(os.environ.get("INPUT_FUZZ", "120"))
MANY = int(os.environ.get("INPUT_FUZZ_SLOW", "3000"))
# Why a call whose items are fine one by one may be refused.
TOGETHER = (
    r"cannot go in one batch|this encoder takes one number of frames|must have one length|padded it from|come out of their "
    r"processor in one size|no mask would tell|tensors want one length"
)
WHOLE = "takes no option|does nothing while"  # of all items


def print_of(value):
    """All of a value that a call could change."""
    if isinstance(value, Mapping):
        return [(key, print_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [print_of(item) for item in value]
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.stride(),
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.strides, value.flags.writeable, repr(value.tolist())
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes(), sorted(map(str, value.info))
    return repr(value)


def outcome(call, **given):
    """What a call returns and its error, one of them None; AssertionError where it changed what it was given."""
    before, batch, error = print_of(given), None, None
    try:
        batch = call(**given)
    except Exception as caught:
        error = caught
    assert print_of(given) == before, "what was given has changed"
    return batch, error


def check_error(error, name=None, item=None, sample=None):
    """ValueError or TypeError that names the modality, and the item or the sample where there are several."""
    assert isinstance(error, (ValueError, TypeError)), f"{type(error).__name__}: {error}"
    told = str(error)
    if name is not None:
        assert re.search(rf"\b{name}\b", told), f"{name} is not named: {told}"
    if item is not None:
        assert re.search(rf"item {item}\b|sample {sample}\b", told), f"item {item} is not named: {told}"


def runs(ids, names):
    """Modality and length of each run of placeholders."""
    return [(names[i], len(list(run))) for i, run in itertools.groupby(ids.tolist()) if i in names]


def features_of(model, batch):
    """Projected features of each item by modality, from encoders called by hand."""
    found = {}
    for name, encoder in model.encoders.items():
        names = model.config.modality(name)["input_names"]
        inputs = {names[k]: torch.as_tensor(v) for k, v in batch.items() if k in names}
        with torch.no_grad():
            found[name] = [x.float() for x in encoder(**inputs).pooler_output] if inputs else []
    return found


def items_of(model, batch, counts):
    """Tensors of each item by modality."""
    found = {}
    for name in model.encoders:
        names = model.config.modality(name)["input_names"]
        inputs = {names[k]: torch.as_tensor(v) for k, v in batch.items() if k in names}
        found[name] = split_items(inputs, counts[name], name) if inputs else []
    return found


def check_same(alone, batched, where):
    """A batch holds an item's own tensors, to the bit, and padding behind them."""
    assert alone.keys() == batched.keys(), where
    for key, value in alone.items():
        if not isinstance(value, torch.Tensor):
            continue
        other = batched[key]
        assert value.dtype == other.dtype, (where, key, value.dtype, other.dtype)
        assert value.ndim == other.ndim and all(a <= b for a, b in zip(value.shape, other.shape, strict=True)), (
            where,
            key,
        )
        inner = other[tuple(slice(0, size) for size in value.shape)]
        # Sums over sounds round by where they lie in memory.
        close = value.is_floating_point() and value.ndim < 4 and torch.allclose(inner, value, rtol=0, atol=1e-5)
        assert close or torch.equal(inner, value), (
            f"{where}: {key} differs, alone and in a batch by {(inner.float() - value.float()).abs().max()}"
        )


class Checked:
    """A call, and what must hold for it."""

    def __init__(self, call: Call):
        self.call, self.model = call, call.world.model
        self.ids = {self.model.config.modality(name)["token_id"]: name for name in self.model.encoders}

    def check(self):
        called, keywords = self.call.given()
        batch, error = outcome(called, **keywords)
        if self.call.wrong is not None:
            return self._check_refused(error)
        alone = [self._alone(sample) for sample in range(len(self.call.samples))]
        if error is not None:
            return self._check_stated(error, [failure for _, failure in alone])
        assert all(failure is None for _, failure in alone), f"a sample alone is refused: {[str(f) for _, f in alone]}"
        self._check_batch(batch, [row for row, _ in alone])
        self._check_texts(batch)

    def _alone(self, sample):
        """A sample by itself, its items in their canonical form."""
        called, keywords = self.call.alone(sample)
        return outcome(called, **keywords)

    def _check_refused(self, error):
        wrong = self.call.wrong
        if wrong.what.startswith("maybe") and error is None:
            return
        assert error is not None, "what nobody can use was taken"
        check_error(error)
        if any(self._alone(sample)[1] is not None for sample in range(len(self.call.samples))):
            return  # something else is wrong too
        several = wrong.name is not None and sum(map(len, self.call.forms[self._slot(wrong.name)])) > 1
        check_error(error, wrong.name, wrong.item if several else None, wrong.sample)
        assert wrong.words in str(error), f"{wrong.words!r} is not named: {type(error).__name__}: {error}"

    def _check_stated(self, error, failures):
        """A call may be refused because one of its samples is, or because its items do not go together."""
        check_error(error)
        failing = [failure for failure in failures if failure is not None]
        if not failing:
            assert re.search(TOGETHER, str(error)), f"each sample alone is fine: {type(error).__name__}: {error}"
            return
        several = len(failures) > 1 and not re.search(WHOLE, str(error))
        check_error(error, f"({'|'.join(self.model.encoders)})", r"\d+" if several else None, r"\d+")

    def _slot(self, name):
        return next(slot for slot, names in self.call.slots.items() if name in names)

    def _check_batch(self, batch, rows):
        counts = {name: sum(map(len, self.call.canonical[self._slot(name)])) for name in self.model.encoders}
        features, items = features_of(self.model, batch), items_of(self.model, batch, counts)
        taken = dict.fromkeys(self.model.encoders, 0)
        for sample, row in enumerate(rows):
            mine = {name: len(self.call.canonical[self._slot(name)][sample]) for name in self.model.encoders}
            own, own_features = items_of(self.model, row, mine), features_of(self.model, row)
            for name, number in ((n, i) for n, count in mine.items() for i in range(count)):
                where, at = f"{name}, item {taken[name] + number}", taken[name] + number
                check_same(own[name][number], items[name][at], where)
                assert own_features[name][number].shape == features[name][at].shape, (
                    f"{where}: other numbers of features"
                )
                torch.testing.assert_close(
                    features[name][at], own_features[name][number], rtol=1e-5, atol=1e-5, msg=where
                )
            ids = torch.as_tensor(batch["input_ids"][sample])[torch.as_tensor(batch["attention_mask"][sample]).bool()]
            alone = torch.as_tensor(row["input_ids"][0])[torch.as_tensor(row["attention_mask"][0]).bool()]
            counted = self._runs_of(sample, {n: [len(f) for f in found] for n, found in own_features.items()})
            assert runs(ids, self.ids) == counted, f"sample {sample}: its features are {counted}"
            assert torch.equal(ids, alone), f"sample {sample}: other ids alone and in the batch"
            taken = {name: taken[name] + mine[name] for name in taken}
        with torch.no_grad():
            self.model(**{k: torch.as_tensor(v) for k, v in batch.items() if k != "token_type_ids"})

    def _runs_of(self, sample, lengths):
        """Modality and length of each run of placeholders, by the features of a sample's items."""
        found = []
        for segment in self._segments(sample):
            if isinstance(segment, str):
                found += [None] if segment else []
            else:
                found += [(name, lengths[name][segment[1]]) for name in self.call.slots[segment[0]]]
        grouped = itertools.groupby(found, key=lambda run: run and run[0])
        return [(name, sum(n for _, n in group)) for name, group in grouped if name is not None]

    def _segments(self, sample):
        if self.call.turns is None:
            return self.call.samples[sample]
        turns = self.call.turns[sample]
        return [segment for turn in turns for segment in (*turn.segments, "between two turns")]

    def _check_texts(self, batch):
        """What was said is there, in order, placeholders and all that looks like markup too."""
        tokenizer = self.call.world.processor.tokenizer
        if "max_length" in self.call.options and "truncation" in self.call.options:
            return
        for sample in range(len(self.call.samples)):
            ids = [i for i in batch["input_ids"][sample].tolist() if i not in self.ids]
            text, at = tokenizer.decode(ids, clean_up_tokenization_spaces=False), 0
            for said in (segment for segment in self._segments(sample) if isinstance(segment, str)):
                if said == "between two turns":
                    continue
                found = text.find(said, at)
                assert found >= 0, f"sample {sample}: {said!r} is not in {text!r} behind {at}"
                at = found + len(said)


def check(seed, folder):
    call = made_call(seed, folder)
    if call.chance.random() < 0.25:
        spoil(call)
    try:
        Checked(call).check()
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{call.describe()}") from error


SEED = os.environ.get("INPUT_FUZZ_SEED")


@pytest.mark.parametrize("first", [int(SEED)] if SEED else range(0, CALLS, 30))
def test_some_calls(first, tmp_path):
    for seed in [first] if SEED else range(first, min(first + 30, CALLS)):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, MANY, 300))
def test_many_calls(first, tmp_path):
    for seed in range(first + CALLS, first + CALLS + 300):
        check(seed, tmp_path)
