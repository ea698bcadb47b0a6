"""Several encoders at once: on the same items, on different ones, of three kinds and more."""

import numpy as np
import pytest
import tiny
import torch
from helpers import check_round_trips
from shrunk import built, shrunk
from trainers import losses, trainer
from transformers import TimesFm2_5Config, TimesFm2_5Model

from cornstarch_hf import MultimodalCollator, PrecomputedFeatures, PrecomputedFeaturesConfig, compose

WIDTH = 6


def film(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2 + seed % 3, 12, 10, 3), dtype=np.uint8)


def series(seed=0):
    return np.random.default_rng(seed).standard_normal(5 + seed).astype(np.float32)


def vectors(seed=0):
    return np.random.default_rng(seed).standard_normal((1 + seed % 4, WIDTH)).astype(np.float32)


def of(key, seed=0, **options):
    _, build, processor, _ = tiny.ENCODERS[key]
    return {"model": build(seed=seed), "processor": processor(), **options}


def timesfm():
    config = shrunk(TimesFm2_5Config, patch_length=4, context_length=64, num_key_value_heads=4)
    return {"model": built(TimesFm2_5Model, config)}


# name -> (encoders, items by name, groups that see the same items)
COMPOSITIONS = {
    "same images": (
        lambda: {"clip": of("clip"), "dino": of("dinov2")},
        {"clip": tiny.image, "dino": tiny.image},
        [["clip", "dino"]],
    ),
    "different images": (
        lambda: {"photo": of("clip"), "scan": of("siglip", layer=[-2, -1])},
        {"photo": tiny.image, "scan": tiny.image},
        None,
    ),
    "four kinds": (
        lambda: {
            "vision": of("siglip"), "audio": of("whisper"), "protein": of("esm"), "film": of("clip", 3, kind="video", drop_prefix=1),
        },
        {"vision": tiny.image, "audio": tiny.sound, "protein": tiny.protein, "film": film},
        None,
    ),
    "eight": (
        lambda: {
            "left": of("clip"), "right": of("siglip"), "packed": of("qwen2_vl"), "audio": of("wav2vec2"), "protein": of("esm"),
            "film": of("clip", 3, kind="video"), "series": timesfm(),
            "scene": {"model": PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))},
        },
        {
            "left": tiny.image, "right": tiny.image, "packed": tiny.image, "audio": tiny.sound, "protein": tiny.protein,
            "film": film, "series": series, "scene": vectors,
        },
        [["left", "right", "packed"]],
    ),
}  # fmt: skip


def made(key):
    encoders, items, groups = COMPOSITIONS[key]
    torch.manual_seed(0)
    model, processor = compose(
        tiny.llama(max_position_embeddings=2048), encoders(), "mlp", tokenizer=tiny.tokenizer(), share_inputs=groups
    )
    processor.items = items
    return model, processor


def samples(processor):
    """Texts and items of three samples: one item of each modality; two in the other order; the first modality alone."""
    tokens = list(processor.tokens.values())
    texts = ["a " + " b ".join(tokens), " and ".join(tokens[::-1] + tokens), tokens[0] + " what"]
    media = {name: [[item(1)], [item(2), item(3)], []] for name, item in processor.items.items()}
    media[next(iter(media))][2] = [processor.items[next(iter(media))](4)]
    return texts, media


def inputs_of(processor, texts, media):
    rate = {"sampling_rate": 16_000} if "audio" in media else {}
    return dict(processor(text=texts, padding=True, return_tensors="pt", **media, **rate))


def features_of(model, inputs):
    """Projected features of each item by modality, from the encoders called by hand."""
    found = {}
    for name, encoder in model.encoders.items():
        names = model.config.modality(name)["input_names"]
        found[name] = encoder(**{names[key]: value for key, value in inputs.items() if key in names}).pooler_output
    return found


@pytest.mark.parametrize("key", COMPOSITIONS)
def test_features_of_all_are_merged_where_their_placeholders_stand(key):
    model, processor = made(key)
    texts, media = samples(processor)
    inputs = inputs_of(processor, texts, media)
    with torch.no_grad():
        logits, features = model(**inputs).logits, features_of(model, inputs)
        embeds = model.language_model.get_input_embeddings()(inputs["input_ids"].clamp(max=tiny.VOCABULARY - 1)).clone()
        for name, items in features.items():
            embeds[inputs["input_ids"] == model.config.modality(name)["token_id"]] = torch.cat(items)
        expected = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(logits, expected)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False))
    length = inputs["input_ids"].shape[1]
    for i, text in enumerate(texts):
        alone = inputs_of(processor, [text], {name: [items[i]] for name, items in media.items()})
        found = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert found.tolist() == tokens[i, length : length + len(found)].tolist(), (
            "a sample alone and left-padded in a batch"
        )


@pytest.mark.parametrize("key", COMPOSITIONS)
def test_a_step_of_trainer_moves_every_projector(tmp_path, key):
    model, processor = made(key)
    model.freeze(*[f"{name}_encoder.module" for name in model.encoders], "language_model")
    before = {name: p.clone() for name, p in model.named_parameters()}
    texts, media = samples(processor)
    rows = [
        {"prompt": text + " ", "completion": f"is {i}"} | {name: items[i] for name, items in media.items() if items[i]}
        for i, text in enumerate(texts)
    ]
    run = trainer(model, processor, tmp_path, rows, eval_strategy="no", max_steps=1, per_device_train_batch_size=3)
    run.train()
    assert np.isfinite(losses(run)).all()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".projector." in name}


@pytest.mark.slow
def test_all_come_back_in_a_fresh_process(tmp_path):
    check_round_trips(tmp_path, {key.replace(" ", "_"): made(key) for key in COMPOSITIONS})


def test_items_of_a_group_are_given_once():
    for key, names in (("same images", ["clip", "dino"]), ("eight", ["left", "right", "packed"])):
        _, processor = made(key)
        tokens = "".join(processor.tokens[name] for name in names)
        images = [tiny.image(1), tiny.image(2)]
        once = processor(text=[tokens, f"a {tokens}"], images=[[x] for x in images], padding=True, return_tensors="pt")
        each = processor(
            text=[tokens, f"a {tokens}"], padding=True, return_tensors="pt", **dict.fromkeys(names, images)
        )
        assert once.keys() == each.keys() and all(torch.equal(once[k], each[k]) for k in once)
        message = [
            {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "what?"}]}
        ]
        assert f"{tokens}what?" in processor.apply_chat_template(message)
        row = MultimodalCollator(processor)([{"prompt": tokens, "completion": "x", "images": images[:1]}])
        assert all(
            torch.equal(row[k], once[k][:1]) for k in once if k.endswith("pixel_values") and not k.startswith("p")
        )
        with pytest.raises(ValueError, match=f"{names[0]}: its items were given twice"):
            processor(text=tokens, images=images[:1], **{names[0]: images[:1]})
        with pytest.raises(ValueError, match=rf"{names[1]}.*have 1 placeholders .*2 items"):
            processor(text=f"{processor.tokens[names[0]]}{tokens}", images=images)
    _, processor = made("different images")
    with pytest.raises(ValueError, match=r"'image' could mean any of \['photo', 'scan'\].*share_inputs"):
        processor(text="<photo><scan>", images=tiny.image())
