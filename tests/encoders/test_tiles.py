"""Encoders of images in tiles: packing, counts, training, round trips, and what is refused; with real image processors."""

import copy
import itertools

import numpy as np
import pytest
import tiles
import tiny
import torch
from own_memory import check_comes_back, own_memory
from PIL import Image
from tiles import PROCESSORS, TELL_NO_GRID, UNPADS, composed
from trainers import Rows
from transformers import (
    AutoModel,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from cornstarch_hf import ModalEncoderModule, MultimodalCollator, MultimodalModel, MultimodalProcessor, compose
from cornstarch_hf.encoders.selection import EncoderOutput
from cornstarch_hf.encoders.tiles import PACKINGS, PackedTiles

ENCODERS = ("clip", "siglip", "dinov2")
SIZES = [(1, 1), (8, 8), (1, 60), (60, 1), (2, 2), (7, 9), (16, 8), (8, 16), (16, 16), (24, 8), (8, 24), (9, 17), (33, 20), (20, 33),
         (5, 40), (40, 5), (12, 13), (64, 64), (3, 90), (100, 101)]  # fmt: skip


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def runs(ids, token):
    return [len(list(run)) for found, run in itertools.groupby(ids.tolist(), key=lambda i: i == token) if found]


def check_counts(model, processor, sizes):
    """Each item has as many placeholders as features, alone, by its size, and in one batch with a row of text alone."""
    token, name = processor.image_token_id, model.config.encoders[0]
    images, counts = [picture(size, seed) for seed, size in enumerate(sizes)], []
    for image in images:
        one = processor(text="<image>", images=image, return_tensors="pt")
        with torch.no_grad():
            items = model.get_image_features(
                **{k: v for k, v in one.items() if k not in ("input_ids", "attention_mask")}
            )
        (features,) = items.pooler_output
        assert runs(one["input_ids"][0], token) == [len(features)]
        counts.append(len(features))
    by_size = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert by_size["num_image_tokens"] == counts
    texts = ["a <image> b <image>", "text alone", " ".join(["c", *["<image>"] * (len(images) - 2)])]
    batch = processor(text=texts, images=[images[:2], [], images[2:]], padding=True, return_tensors="pt")
    assert batch["num_tiles"].tolist() == by_size["num_image_patches"] and name == "vision"
    assert [runs(ids, token) for ids in batch["input_ids"]][:2] == [counts[:2], []]
    assert int((batch["input_ids"] == token).sum()) == sum(counts)
    with torch.no_grad():
        assert model(**batch).logits.shape[:2] == batch["input_ids"].shape
    return batch


CASES = [(name, "concat") for name in PROCESSORS] + [(n, "newline") for n in PROCESSORS if n not in TELL_NO_GRID]
CASES += [(name, "unpad") for name in UNPADS]


@pytest.mark.parametrize("name, packing", CASES[:: len(CASES) // 8])
def test_placeholders_are_features(name, packing):
    check_counts(*composed(name, packing), SIZES[2:7:2])


@pytest.mark.wide
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name, packing", CASES)
def test_placeholders_are_features_whatever_encoder_and_size(name, packing, encoder):
    model, processor = composed(name, packing, encoder)
    sizes = [size for size in SIZES if tiles.takes(name, size)]
    for start in range(0, len(sizes), 5):
        check_counts(model, processor, sizes[start : start + 5])


def check_whole_life(name, packing, folder):
    """Forward, generation, a step of Trainer with frozen towers and checkpointing, and a round trip."""
    model, processor = composed(name, packing)
    images = [picture((9, 30)), picture((30, 9), 1)]
    texts = ["see <image>", "no image"]
    batch = processor(text=texts, images=[images[:1], []], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate(**batch, **options).shape[0] == 2
    encoded = model.get_image_features(**{k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")})
    texts_only = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        given = model(**texts_only, mm_encoder_outputs={"vision": encoded}).logits
        assert torch.equal(given, model(**batch).logits)
    model.freeze("vision_encoder.module", "language_model")
    newline = getattr(model.vision_encoder.postprocess_projector_callback, "image_newline", None)
    before = None if newline is None else newline.detach().clone()
    rows = [{"prompt": "a <image> ", "completion": " b", "images": images[:1]}, {"prompt": "c", "completion": " d"}]
    rows += [{"prompt": "a <image><image> ", "completion": " b", "images": images}]
    arguments = TrainingArguments(
        output_dir=str(folder / "t"), max_steps=1, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no",
        remove_unused_columns=False, gradient_checkpointing=True, learning_rate=0.1, optim="sgd", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(rows), data_collator=MultimodalCollator(processor)
    )
    assert np.isfinite(trainer.train().training_loss)
    assert before is None or not torch.equal(before, newline)
    model.eval()
    model.save_pretrained(folder / "c")
    processor.save_pretrained(folder / "c")
    again, reloaded = AutoModel.from_pretrained(folder / "c"), AutoProcessor.from_pretrained(folder / "c")
    assert reloaded.to_dict() == processor.to_dict()
    found = reloaded(text=texts, images=[images[:1], []], padding=True, return_tensors="pt")
    assert found.keys() == batch.keys() and all(torch.equal(found[key], batch[key]) for key in batch)
    check_comes_back(model, again, dict(batch), **options)


def test_a_composition_with_tiles_lives(tmp_path):
    check_whole_life("LlavaNext", "unpad", tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("name, packing", [case for case in CASES if case != ("LlavaNext", "unpad")])
def test_every_composition_with_tiles_lives(name, packing, tmp_path):
    check_whole_life(name, packing, tmp_path)


def test_unpad_is_what_llava_next_does_to_the_bit():
    clip, llama, images = (
        tiny.clip(),
        tiny.llama(),
        [picture(size, i) for i, size in enumerate([(9, 30), (30, 9), (16, 16), (1, 40)])],
    )
    entry = {
        "model": copy.deepcopy(clip),
        "processor": tiles.built("LlavaNext"),
        "tiles": "unpad",
        "layer": -2,
        "drop_prefix": 1,
    }
    model, processor = compose(copy.deepcopy(llama), {"vision": entry}, "mlp", tokenizer=tiny.tokenizer())
    config = LlavaNextConfig(
        vision_config=clip.config, text_config=llama.config, image_token_index=processor.image_token_id,
        image_grid_pinpoints=tiles.POINTS, tie_word_embeddings=llama.config.tie_word_embeddings,
    )  # fmt: skip
    native, encoder = LlavaNextForConditionalGeneration(config).eval(), model.vision_encoder
    native.model.vision_tower.load_state_dict(clip.state_dict())
    native.model.language_model.load_state_dict(llama.model.state_dict())
    native.lm_head.load_state_dict(llama.lm_head.state_dict())
    for layer, index in (("linear_1", 0), ("linear_2", 2)):
        own = encoder.projector.projection[index].state_dict()
        native.model.multi_modal_projector.get_submodule(layer).load_state_dict(own)
    native.model.image_newline.data.copy_(encoder.postprocess_projector_callback.image_newline.data)
    texts = ["<image> x <image>", "text alone", "<image><image>!"]
    batch = processor(text=texts, images=[images[:2], [], images[2:]], padding=True, return_tensors="pt")
    raw = tiles.built("LlavaNext")(images, return_tensors="pt")
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = own_memory(model)(**own_memory(dict(batch))).logits
        assert torch.equal(found, own_memory(native)(**own_memory(ids | dict(raw))).logits)


def packed(packing, tiles_of, grids, features):
    callback = PackedTiles(packing, 2)
    if callback.image_newline is not None:
        callback.image_newline.data.fill_(-1.0)
    inputs = {"pixel_values": torch.zeros(len(features), 3, 8, 8), "num_tiles": torch.tensor(tiles_of)}
    inputs |= {"tile_grids": torch.tensor(grids)}
    return callback(inputs, EncoderOutput(last_hidden_state=features), tiny.clip().config, "vision").last_hidden_state


@pytest.mark.parametrize("whole", [-1, 0, 4])
def test_rows_of_tiles_are_rows_of_the_image(whole):
    # Each feature is the place in the image, row and column, that it is of; the whole image is of 9s.
    grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)  # (4, 4, 2)
    pieces = [grid[r : r + 2, c : c + 2].reshape(4, 2) for r in (0, 2) for c in (0, 2)]
    if whole >= 0:
        pieces.insert(whole, torch.full((4, 2), 9.0))
    (found,) = packed("newline", [len(pieces)], [[2, 2, whole]], torch.stack(pieces))
    rows = torch.cat([grid, torch.full((4, 1, 2), -1.0)], 1).reshape(20, 2)
    small = [torch.full((4, 2), 9.0)]
    assert torch.equal(found, torch.cat((small if whole == 0 else []) + [rows] + (small if whole > 0 else [])))


def test_tiles_follow_one_another_as_the_processor_gives_them():
    features = torch.arange(40.0).view(5, 4, 2)
    found = packed("concat", [2, 3], [[0, 0, -1]] * 2, features)
    assert [x.tolist() for x in found] == [features[:2].flatten(0, 1).tolist(), features[2:].flatten(0, 1).tolist()]


def test_an_image_of_one_tile_ends_in_the_learnt_vector_and_rows_alone_are_such_images():
    features = torch.arange(8.0).view(1, 4, 2)
    (found,) = packed("newline", [1], [[1, 1, -1]], features)
    assert torch.equal(found, torch.cat([features[0], torch.full((1, 2), -1.0)]))


@pytest.mark.parametrize(
    "counts, grids, tokens, told",
    [
        ([2], [[1, 2, -1]], 4, r"vision: num_tiles=\[2\] makes 2 tiles, got 4 rows"),
        ([4, 0], [[2, 2, -1]] * 2, 4, r"num_tiles=\[4, 0\] makes 4 tiles"),
        ([4], [[1, 2, -1]], 4, "vision, item 0: .*got 4 whose processor does not tell how"),
        ([4], [[0, 0, -1]], 4, "vision, item 0: .*take tiles='concat'"),
        ([4], [[2, 2, -1]], 5, r"5 features of a tile do not fill its grid of 2 x 2 = 4 patches.*drop_prefix=1 more"),
        ([4], [[2, 2, -1]], 9, r"9 features of a tile .*drop_prefix=5 more"),  # a square by chance: DINOv2's registers
        ([4], [[2, 2, -1]], 3, "3 features of a tile .*take tiles='concat'"),
    ],
)
def test_what_does_not_fit_is_refused(counts, grids, tokens, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        packed("newline", counts, grids, torch.zeros(4, tokens, 2))


@pytest.mark.parametrize("projector, left", [("pixel_shuffle", 1), ("avg_pool", 1), ("linear", 4), ("mlp", 4)])
def test_each_tile_is_reduced_by_itself(projector, left):
    model, processor = composed("LlavaNext", "newline", projector=projector)
    batch = check_counts(model, processor, [(9, 30), (16, 16), (30, 9)])
    assert batch["num_tiles"].tolist() == [4, 5, 4]
    model, processor = composed("GotOcr2", "concat", projector=projector)
    one = processor(text="<image>", images=picture((8, 16)), return_tensors="pt")
    assert int((one["input_ids"] == processor.image_token_id).sum()) == left * int(one["num_tiles"])


def test_options_that_cannot_be_done_are_refused():
    for packing in ("flat", 3, ["concat"]):
        with pytest.raises(ValueError, match=r"tiles must be one of \['concat', 'newline', 'unpad'\]"):
            ModalEncoderModule(tiny.clip(), tiles=packing)
    with pytest.raises(ValueError, match="(?s)image: tiles='unpad' is what follows the projector.*leave out tiles="):
        ModalEncoderModule(tiny.clip(), tiles="unpad", postprocess_projector_callback=lambda inputs, output: output)
    with pytest.raises(ValueError, match="audio: tiles='concat' is for an encoder of images"):
        ModalEncoderModule(tiny.whisper(), tiles="concat")
    for projector in ("resampler", "frame_stack"):
        with pytest.raises(
            ValueError, match=f"vision: tiles='newline' needs features .*'{projector}' leaves a sequence"
        ):
            composed("LlavaNext", "newline", projector=projector)


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in UNPADS])
def test_padding_that_is_not_known_is_not_cut(name):
    _, processor = composed(name, "unpad")
    with pytest.raises(
        ValueError, match="^vision, item 0: tiles='unpad' needs tile_image_sizes, which its processor does"
    ):
        processor(text="<image>", images=picture((8, 8)), return_tensors="pt")


def test_a_class_token_and_tiles_of_another_size_are_refused():
    _, processor = composed("LlavaNext", "unpad", drop_prefix=0)
    with pytest.raises(ValueError, match="^vision, item 0: 5 features of a tile .*drop_prefix=1 more"):
        processor(text="<image>", images=picture((9, 30)), return_tensors="pt")
    _, processor = composed("LlavaNext", "unpad", image_size=12)
    with pytest.raises(ValueError, match="vision, item 0: .*takes pixel_values of 3 x 12 x 12, got 3 x 8 x 8"):
        processor(text="<image>", images=picture((9, 30)), return_tensors="pt")


def test_without_the_option_a_processor_that_makes_tiles_is_refused_and_the_error_names_it():
    for name in ("LlavaNext", "Idefics3", "GotOcr2"):
        entry = {"model": tiny.clip(), "processor": tiles.built(name)}
        _, processor = compose(tiny.llama(), {"vision": entry}, tokenizer=tiny.tokenizer())
        with pytest.raises(ValueError, match="vision.*choose tiles= of its encoder, or turn "):
            processor(text="<image><image>", images=[picture((9, 30)), picture((8, 16))], return_tensors="pt")


def test_other_callbacks_of_the_user_run_beside():
    def halved(inputs, output):
        output["last_hidden_state"] = output.last_hidden_state[:, ::2]  # of each tile
        return output

    seen = []
    encoder = ModalEncoderModule(
        tiny.clip(), drop_prefix=1, tiles="concat", postprocess_module_callback=halved,
        preprocess_callback=lambda inputs: seen.append(sorted(inputs)) or inputs, additional_args=["num_tiles"],
    )  # fmt: skip
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiles.built("GotOcr2")}, model=model)
    batch = processor(text="<image>", images=picture((8, 16)), return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 2 * int(batch["num_tiles"]) == 6
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1] and seen[0] == ["num_tiles", "pixel_values"]


def test_tensors_that_are_processed_already_and_mismatches():
    model, processor = composed("LlavaNext", "unpad")
    batch = processor(text="<image><image>", images=[picture((9, 30)), picture((16, 16))], return_tensors="pt")
    ready = {key: batch[key] for key in PACKINGS["unpad"]} | {"pixel_values": batch["pixel_values"]}
    again = processor(text="<image><image>", encoder_inputs={"vision": ready}, return_tensors="pt")
    assert again.keys() == batch.keys() and all(torch.equal(again[key], batch[key]) for key in batch)
    assert set(batch) <= set(processor.model_input_names)
    wrong = dict(batch) | {"num_tiles": batch["num_tiles"] + 1}
    with pytest.raises(ValueError, match=r"vision: num_tiles=\[5, 6\] makes 11 tiles, got 9 rows of pixel_values"):
        model(**wrong)
    with pytest.raises(ValueError, match="vision, item 0: tiles='unpad' needs tile_grids, which was not given"):
        model(**{key: value for key, value in batch.items() if key != "tile_grids"})
