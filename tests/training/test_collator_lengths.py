"""Lengths of rows: those of the batches, in every form and for every encoder, and Trainer's grouping by them."""

import copy
import io
import warnings

import numpy as np
import pytest
import soundfile
import tiny
import torch
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher
from films import film
from helpers import compose_tiny
from PIL import Image as PIL
from transformers import Trainer, TrainingArguments

from cornstarch_hf import MultimodalCollator, limits


def real(collate, rows):
    """What the collator itself makes of each row."""
    return [int(collate([row])["attention_mask"].sum()) for row in rows]


def encoded(image, form, orientation=None):
    raw, exif = io.BytesIO(), PIL.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(raw, form, **({} if orientation is None else {"exif": exif}))
    return raw.getvalue()


def wav(sound):
    raw = io.BytesIO()
    soundfile.write(raw, sound, 16_000, format="wav", subtype="FLOAT")
    return raw.getvalue()


# ---- every form of row, every encoder


def forms(name, token, items):
    """Rows of every form with the same items."""
    part = [{"type": name, name: item} for item in items]
    bare = [{"type": name} for _ in items]
    answer = {"role": "assistant", "content": "it is"}
    typed = [{"type": "text", "text": f"what is {token}?"}]
    return [
        {"text": f"what {token * len(items)} is", name: items},
        {"prompt": f"what {token * len(items)}", "completion": " is it", name: items},
        {"messages": [{"role": "user", "content": [*part, *typed]}, answer]},
        {"messages": [{"role": "user", "content": [*typed, *bare]}, answer, answer | {"role": "user"}, answer], name: items},
        {"prompt": [{"role": "user", "content": part}], "completion": [answer], "length": 7},
        {"text": "none at all"},
    ]  # fmt: skip


ITEMS = {
    "image": [tiny.image(i, size) for i, size in enumerate([(12, 10), (60, 60), (33, 71), (200, 40)])],
    "audio": [tiny.sound(i, length) for i, length in enumerate((1600, 900, 700, 1599))],
    "protein": [tiny.protein(i, length) for i, length in enumerate((7, 3, 11, 5))],
    "video": [film(frames, seed) for seed, frames in enumerate((4, 2, 3, 1))],
}


@pytest.mark.parametrize(
    ("encoders", "projector", "options"),
    [
        (["clip"], "linear", {}),
        (["siglip"], "mlp", {}),
        (["dinov2"], "linear", {"vision": {"drop_prefix": 1}}),
        (["convnext"], "linear", {}),
        (["qwen2_vl"], "linear", {}),
        (["whisper"], "linear", {}),
        (["wav2vec2"], "frame_stack", {}),
        (["wav2vec2"], "avg_pool", {}),
        (["esm"], "linear", {}),
        ({"film": "clip"}, "linear", {"film": {"kind": "video"}}),
        (["qwen2_vl", "wav2vec2", "esm"], "linear", {}),
    ],
)
def test_lengths_are_those_of_the_batches(encoders, projector, options):
    _, processor = compose_tiny(encoders, projector=projector, **options)
    collate = MultimodalCollator(processor)
    for name in processor.tokens:
        kind = processor.config.modality(name)["kind"]
        items = ITEMS[kind if kind in ITEMS else name]
        if "Whisper" in type(processor.processors[name]).__name__:
            items = [tiny.sound(i, 700 + 100 * i) for i in range(4)]
        rows = [row for i in range(3) for row in forms(name, processor.tokens[name], items[i : i + 2])]
        found = collate.lengths(rows)
        assert found == real(collate, rows) and all(isinstance(length, int) for length in found)
        assert collate.lengths(iter(rows)) == collate.lengths(tuple(rows)) == found
        assert len(set(found)) > 2


@pytest.mark.parametrize("side", ["right", pytest.param("left", marks=pytest.mark.slow)])
def test_lengths_are_those_of_rows_that_are_cut(side):
    _, processor = compose_tiny(["qwen2_vl", "wav2vec2"])
    rows = [
        {"text": "the <image> quick <audio> brown <image> fox jumps", "audio": [tiny.sound(i, 900 + 200 * i)],
         "images": [tiny.image(i, (30 + i, 50)), tiny.image(i, (20, 90 - i))]}
        for i in range(4)
    ]  # fmt: skip
    longest = max(MultimodalCollator(processor).lengths(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuts
        for limit in range(6, longest + 2, 5):
            collate = MultimodalCollator(processor, max_length=limit, truncation=side, pad_to_multiple_of=8)
            for row in rows:
                try:
                    expected = real(collate, [row])
                except ValueError as error:
                    with pytest.raises(ValueError, match="none has a label") as caught:
                        collate.lengths([row])
                    assert str(caught.value) == str(error)
                else:
                    assert collate.lengths([row]) == expected


def test_encoders_that_share_items_count_each():
    _, processor = compose_tiny({"vision": "clip", "tiles": "qwen2_vl"})
    rows = [{"text": "a <vision><tiles> b", "vision": [item], "tiles": [item]} for item in ITEMS["image"]]
    collate = MultimodalCollator(processor)
    assert collate.lengths(rows) == real(collate, rows)


# ---- pictures whose headers tell


TURNED = [(form, turn) for form in ("JPEG", "PNG", "WEBP", "TIFF", None) for turn in (None, 1, 3, 6, 8)]


@pytest.mark.parametrize(("form", "orientation"), [*TURNED, *((form, None) for form in ("GIF", "BMP", "ICO", "PPM"))])
def test_a_picture_has_the_length_of_its_pixels_in_every_file(form, orientation, tmp_path):
    _, processor = compose_tiny(["qwen2_vl"])
    collate, items = MultimodalCollator(processor), []
    for seed, size in enumerate([(32, 96), (90, 30)]):
        picture = tiny.image(seed, size)
        if form is None:  # in memory
            exif = picture.getexif()
            if orientation is not None:
                exif[0x0112] = orientation
            items.append(picture)
            continue
        raw = encoded(picture, form, orientation)
        path = tmp_path / f"{seed}.{form.lower()}"
        path.write_bytes(raw)
        items += [raw, str(path), {"bytes": raw, "path": None}, PIL.open(path), io.BytesIO(raw)]
    items += [np.asarray(tiny.image(2, (40, 80))), torch.tensor(np.asarray(tiny.image(2, (40, 80)))).permute(2, 0, 1)]
    rows = [{"text": "a <image> b", "images": [item]} for item in items]
    found = collate.lengths(rows)
    assert found == real(collate, rows) and len(set(found)) > 1


def test_pixels_are_not_read_where_the_header_tells(monkeypatch):
    _, processor = compose_tiny(["clip", "whisper"])
    whole = encoded(tiny.image(0, (400, 300)), "JPEG")
    collate = MultimodalCollator(processor)
    calls, run = [], type(processor)._run_subprocessor
    monkeypatch.setattr(type(processor), "_run_subprocessor", lambda *args: calls.append(args[1]) or run(*args))
    sound = {"text": "a <audio> b", "audio": [tiny.sound(0, 800)]}
    image = {"text": "a <image> b", "images": [whole]}
    found = collate.lengths([image, sound])
    assert calls == ["audio"] and found == real(collate, [image, sound])
    calls.clear()
    cut = {"text": "a <image> b", "images": [whole[: len(whole) // 2]]}  # its header is whole
    assert collate.lengths([cut]) == found[:1] and not calls
    with pytest.raises(ValueError, match="row 0: vision, item 0: the image cannot be decoded"):
        collate([cut])


def test_what_an_image_processor_of_somebodys_own_makes_is_found_by_running_it():
    _, processor = compose_tiny(["qwen2_vl"])
    own = type(processor.processors["vision"])

    class Trimmed(own):
        """Cuts black columns away."""

        def preprocess(self, images, *args, **kwargs):
            images = images if isinstance(images, list) else [images]
            return super().preprocess([image.crop(image.getbbox()) for image in images], *args, **kwargs)

    processor.processors["vision"] = Trimmed(
        **{
            k: v
            for k, v in processor.processors["vision"].to_dict().items()
            if k in ("patch_size", "merge_size", "size", "temporal_patch_size")
        }
    )
    black = PIL.new("RGB", (90, 30))
    black.paste(tiny.image(0, (30, 30)), (0, 0))
    rows = [{"text": "a <image> b", "images": [image]} for image in (black, tiny.image(1, (90, 30)))]
    collate = MultimodalCollator(processor)
    found = collate.lengths(rows)
    assert found == real(collate, rows)


# ---- refusals


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"text": "a b"}, TypeError, r"lengths\(\) takes rows, got dict: give a list with a dict for each row"),
        ("a b", TypeError, r"lengths\(\) takes rows, got str"),
        (None, TypeError, r"lengths\(\) takes rows, got NoneType"),
        ([{"text": "a b"}, 3], TypeError, "row 1: expected a dict of columns, got int"),
        ([{"text": "a b"}, {"text": "<image>"}], ValueError, "row 1: vision.*1 placeholders"),
        ([{"text": "a b", "images": [b"x"]}], ValueError, "row 0: vision, item 0: the image cannot be decoded from 1 byte"),
        ([{"text": "<image> b", "images": [PIL.new("I;16", (9, 9))]}], ValueError, "row 0: vision, item 0: the image has mode"),
        ([{"text": "a b", "colour": 1}], ValueError, r"row 0: unknown columns \['colour'\]"),
    ],
)  # fmt: skip
def test_rows_that_no_batch_takes_have_no_length(fresh_pair, rows, error, message):
    with pytest.raises(error, match=message):
        MultimodalCollator(fresh_pair[1]).lengths(rows)


def test_a_picture_of_too_many_pixels_has_no_length(fresh_pair, monkeypatch):
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 100)
    row = {"text": "<image> b", "images": [encoded(tiny.image(0, (20, 20)), "PNG")]}
    with pytest.raises(ValueError, match="row 0: vision, item 0: .*MAX_IMAGE_PIXELS"):
        MultimodalCollator(fresh_pair[1]).lengths([row])


# ---- columns that trainers and tables add


@pytest.mark.parametrize(
    "column",
    [{"length": 3}, {"length": np.int64(3)}, {"length": torch.tensor(3)}, {"length": 3.0}, {"length": None},
     {"__index_level_0__": 5}, {"__key__": "a", "__url__": "b"}],
)  # fmt: skip
def test_columns_that_trainers_and_tables_add_are_left_out(fresh_pair, column):
    collate, row = MultimodalCollator(fresh_pair[1]), {"text": "a b"}
    with_column = row | column
    found, expected = collate([with_column]), collate([row])
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert with_column == row | column, "the row is the caller's"


@pytest.mark.parametrize("column", [{"length": "three"}, {"length": [3]}, {"lengths": 3}, {"__x": 3}, {"size": 3}])
def test_columns_of_the_rows_own_are_not(fresh_pair, column):
    with pytest.raises(ValueError, match=rf"row 0: unknown columns \['{next(iter(column))}'\]"):
        MultimodalCollator(fresh_pair[1])([{"text": "a b"} | column])


def test_the_column_of_lengths_may_have_another_name(fresh_pair):
    collate = MultimodalCollator(fresh_pair[1], length_column_name="size")
    assert collate([{"text": "a b", "size": 3}])["input_ids"].shape == (1, collate.lengths([{"text": "a b"}])[0])
    with pytest.raises(ValueError, match=r"row 0: unknown columns \['length'\]"):
        collate([{"text": "a b", "length": 3}])
    for taken in ("text", "messages", "images", "audio", "vision", "tools", "video"):
        with pytest.raises(ValueError, match=f"length_column_name='{taken}' is a column that the collator reads"):
            MultimodalCollator(fresh_pair[1], length_column_name=taken)


def test_a_modality_of_that_name_keeps_its_column():
    _, processor = compose_tiny({"length": "clip"})
    batch = MultimodalCollator(processor)([{"text": "a <image> b", "length": [tiny.image()]}])
    assert batch["pixel_values"].shape[0] == 1


# ---- Trainer


def table(count=32):
    """Rows of very different lengths, in no order."""
    made = []
    for i in range(count):
        row = {"text": "the fox " * (1 + i * 7 % 11), "images": None, "audio": None}
        if i % 3:
            row["text"] += "<image>" * (i % 3)
            row["images"] = [
                {"bytes": encoded(tiny.image(i + k, (30 + 9 * i, 40)), "JPEG"), "path": None} for k in range(i % 3)
            ]
        if i % 4 == 1:
            row |= {
                "text": row["text"] + " <audio>",
                "audio": {"bytes": wav(tiny.sound(i, 700 + 40 * i)), "path": None},
            }
        made.append(row)
    features = {
        "text": Value("string"),
        "images": [Image()],
        "audio": {"bytes": Value("binary"), "path": Value("string")},
    }
    return Dataset.from_list(made, features=Features(features))


class Recording(MultimodalCollator):
    """Keeps the rows that it was given."""

    def __call__(self, rows):
        self.seen.append([dict(row) for row in rows])
        return super().__call__(rows)


def trained(model, processor, rows, folder, strategy, **options):
    collate = Recording(processor)
    collate.seen = []
    arguments = {"output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1,
                 "report_to": "none", "save_strategy": "no", "seed": 1, "use_cpu": True, "remove_unused_columns": False,
                 "disable_tqdm": True, "train_sampling_strategy": strategy}  # fmt: skip
    made = Trainer(
        model=copy.deepcopy(model), args=TrainingArguments(**arguments | options), train_dataset=rows, eval_dataset=rows,
        data_collator=collate,
    )  # fmt: skip
    made.train()
    return made, collate.seen, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_trainer_groups_rows_by_their_lengths(workers, tmp_path):
    model, processor = compose_tiny(["qwen2_vl", "wav2vec2"])
    collate, rows = MultimodalCollator(processor), table()
    before = Hasher.hash(collate)
    plain = rows.cast_column("images", [Image(decode=False)])  # headers are enough
    measured = plain.map(lambda row: {"length": collate.lengths([row])[0]}, num_proc=workers)
    assert Hasher.hash(collate) == before, "else `datasets` would compute everything anew"
    lengths = list(measured["length"])
    assert lengths == collate.lengths(rows) == real(collate, list(rows)) and len(set(lengths)) > 12
    rows = rows.add_column("length", lengths)
    made, seen, losses = trained(model, processor, rows, tmp_path, "group_by_length")
    grouped = [[row["length"] for row in batch] for batch in seen]
    flat = [length for batch in grouped for length in batch]
    assert sorted(flat) == sorted(lengths) and flat[0] == max(lengths)
    # Trainer sorts 2 batches at a time here, and puts the longest of all in front of the first two.
    parts = [flat[i + 1 : i + 8] for i in range(0, len(flat), 8)]
    assert parts == [sorted(part, reverse=True) for part in parts]
    padded = sum(len(batch) * max(batch) for batch in grouped)
    in_order = sum(4 * max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    assert padded < 0.8 * in_order
    # The same rows in the same order, without Trainer's grouping, train to the same bits.
    ordered = [{k: v for k, v in row.items() if k != "length"} for batch in seen for row in batch]
    _, _, expected = trained(model, processor, ordered, tmp_path, "sequential")
    assert losses == expected and torch.tensor(losses).isfinite().all()
    assert np.isfinite(made.evaluate()["eval_loss"]), "evaluation groups by the same column"


def test_trainers_own_balance_of_batches_takes_the_lengths(tmp_path):
    model, processor = compose_tiny(["qwen2_vl", "wav2vec2"])
    rows = table()
    rows = rows.add_column("tokens", MultimodalCollator(processor).lengths(rows))
    with pytest.raises(ValueError, match=r"row 0: unknown columns \['tokens'\]"):
        trained(model, processor, rows, tmp_path, "group_by_length", length_column_name="tokens")
    _, _, losses = trained(
        model, processor, rows.rename_column("tokens", "length"), tmp_path, "batch_rebalance",
        gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    assert torch.tensor(losses).isfinite().all()
