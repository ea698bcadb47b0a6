"""Native processors of transformers, tiny and offline, whose settings fit the models of `native_types`.  A plain module, no tests."""

import functools

import convertible_models
import native_models
import tiny
import torch
import transformers
from native_types import PLACEHOLDERS, build, inputs_of
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from cornstarch_hf import from_native
from cornstarch_hf.conversion.entries import setting
from cornstarch_hf.conversion.refusals import entry_of


def tokenizer(*specials, **named):
    """The tiny tokenizer with special tokens, some of which a processor finds by an attribute of that name."""
    made = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<pad>", extra_special_tokens=dict(named))  # fmt: skip
    tokens = [AddedToken(token, special=True, normalized=False) for token in specials]
    made.add_tokens(tokens, special_tokens=True)
    return made


def images(name, side=32, **settings):
    """The image processor of that name, for squares."""
    settings = {"size": {"height": side, "width": side}} | settings
    return getattr(transformers, f"{name}ImageProcessor{tiny.BACKEND}")(**settings)


def _cut(name, **settings):
    return images(name, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **settings)


def _packing(name, size, **settings):
    return images(name, size={"shortest_edge": 4 * size**2, "longest_edge": 64 * size**2}, patch_size=size, **settings)


def _sounds(**settings):
    return transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=250, **settings)


_CORNERS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_CONTEXT = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
_LLAVA = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_TILES = [[32, 64], [64, 32]]


def _paligemma(features):
    processor = images("Siglip")
    processor.image_seq_length = features
    return transformers.PaliGemmaProcessor(processor, tokenizer("<image>"))


# model type -> a processor, by the features of a picture that fills the tower
IMAGES = {
    "llava": lambda n: transformers.LlavaProcessor(_cut("Llava"), tokenizer("<image>"), **_LLAVA),
    "vipllava": lambda n: transformers.LlavaProcessor(_cut("Llava"), tokenizer("<image>"), **_LLAVA),
    "llava_next": lambda n: transformers.LlavaNextProcessor(
        _cut("LlavaNext", image_grid_pinpoints=_TILES), tokenizer("<image>"), **_LLAVA
    ),
    "qianfan_ocr": lambda n: transformers.QianfanOCRProcessor(
        images("GotOcr2", min_patches=1, max_patches=4, crop_to_patches=True), tokenizer("<image>", **_CONTEXT), image_seq_length=n
    ),
    "idefics2": lambda n: transformers.Idefics2Processor(
        images("Idefics2", size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False),
        tokenizer("<image>", "<fake_token_around_image>"), image_seq_len=n,
    ),
    "idefics3": lambda n: transformers.Idefics3Processor(
        images("Idefics3", size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer("<image>", "<fake_token_around_image>", "<global-img>", *_CORNERS), image_seq_len=n,
    ),
    "janus": lambda n: transformers.JanusProcessor(
        images("Janus", min_size=4), tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"), num_image_tokens=n
    ),
    "deepseek_vl": lambda n: transformers.DeepseekVLProcessor(
        images("DeepseekVL", min_size=4), tokenizer(image_token="<image_placeholder>"), num_image_tokens=n
    ),
    "deepseek_vl_hybrid": lambda n: transformers.DeepseekVLHybridProcessor(
        images("DeepseekVLHybrid", min_size=4, high_res_size={"height": 64, "width": 64}),
        tokenizer(image_token="<image_placeholder>"), num_image_tokens=n,
    ),
    "aya_vision": lambda n: transformers.AyaVisionProcessor(
        images("GotOcr2", min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
        patch_size=8, img_size=32, downsample_factor=2,
    ),
    "got_ocr2": lambda n: transformers.GotOcr2Processor(images("GotOcr2", 512), tokenizer("<imgpad>", "<img>", "</img>")),
    "aria": lambda n: transformers.AriaProcessor(
        images("Aria", size=None), tokenizer(image_token="<|img|>"), size_conversion={490: 1, 980: n}
    ),
    "lighton_ocr": lambda n: transformers.LightOnOcrProcessor(
        images("Pixtral", size={"longest_edge": 32}, patch_size=16),
        tokenizer(image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>"),
        patch_size=8, spatial_merge_size=2,
    ),
    "paddleocr_vl": lambda n: transformers.PaddleOCRVLProcessor(
        _packing("PaddleOCRVL", 4, merge_size=2), tokenizer(image_token="<|IMAGE_PLACEHOLDER|>")
    ),
    "hunyuan_vl": lambda n: transformers.HunYuanVLProcessor(
        _packing("HunYuanVL", 4, merge_size=2),
        tokenizer(image_token="<|img|>", image_start_token="<|img_start|>", image_end_token="<|img_end|>"),
    ),
    "gemma3": lambda n: transformers.Gemma3Processor(
        images("Gemma3", do_pan_and_scan=True, pan_and_scan_min_crop_size=4, pan_and_scan_max_num_crops=3,
               pan_and_scan_min_ratio_to_activate=1.1), tokenizer(**_GEMMA), image_seq_length=n,
    ),
    "paligemma": _paligemma,
    "ovis2": lambda n: transformers.Ovis2Processor(
        images("Ovis2", min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"), image_seq_length=n,
    ),
}  # fmt: skip
_VISION = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
_PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}


def _videos(name, **settings):
    return getattr(transformers, f"{name}VideoProcessor")(**settings)


def _qwen(cls, size, **settings):
    """A processor of patches that are packed, of images and videos."""
    edges = {"size": {"shortest_edge": 4 * size**2, "longest_edge": 64 * size**2}}
    videos = _videos("Qwen3VL" if "3VL" in cls else "Qwen2VL", patch_size=size, **edges)
    return getattr(transformers, cls)(_packing("Qwen2VL", size), tokenizer(**_PADS, **_VISION), videos, **settings)


# Those whose classes, or their processors of videos, need torchvision.
if is_torchvision_available():
    IMAGES |= {
        "llava_onevision": lambda n: transformers.LlavaOnevisionProcessor(
            images("LlavaOnevision", image_grid_pinpoints=_TILES), tokenizer("<image>", "<video>"),
            _videos("LlavaOnevision", size={"height": 32, "width": 32}), num_image_tokens=16,
            vision_feature_select_strategy="full",
        ),
        "internvl": lambda n: transformers.InternVLProcessor(
            images("GotOcr2", min_patches=1, max_patches=4), tokenizer(video_token="<video>", **_CONTEXT),
            _videos("InternVL", size={"height": 32, "width": 32}), image_seq_length=n,
        ),
        "cohere2_vision": lambda n: transformers.Cohere2VisionProcessor(
            images("Cohere2Vision", 256, min_patches=1, max_patches=4),
            tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", img_line_break_token="<line>"),
        ),
        "mistral3": lambda n: transformers.PixtralProcessor(
            images("Pixtral", size={"longest_edge": 32}, patch_size=16), tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
            patch_size=8, spatial_merge_size=2,
        ),
        "qwen2_vl": lambda n: _qwen("Qwen2VLProcessor", 4),
        "qwen2_5_vl": lambda n: _qwen("Qwen2_5_VLProcessor", 4),
        "qwen3_vl": lambda n: _qwen("Qwen3VLProcessor", 4),
    }  # fmt: skip
SOUNDS = {
    "qwen2_audio": lambda n: transformers.Qwen2AudioProcessor(_sounds(), tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")),
    "audioflamingo3": lambda n: transformers.AudioFlamingo3Processor(_sounds(), tokenizer("<sound>"), max_audio_len=4),
    "glmasr": lambda n: transformers.GlmAsrProcessor(_sounds(), tokenizer("<|pad|>"), max_audio_len=4),
    "qwen3_asr": lambda n: transformers.Qwen3ASRProcessor(
        transformers.Qwen3ASRFeatureExtractor(feature_size=8, n_window=4),
        tokenizer(audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>"),
    ),
    "moss_transcribe_diarize": lambda n: transformers.MossTranscribeDiarizeProcessor(
        transformers.MossTranscribeDiarizeFeatureExtractor(feature_size=8, chunk_length=1, hop_length=250),
        tokenizer("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"),
    ),
}  # fmt: skip
PROCESSORS = IMAGES | SOUNDS
ROWS = 384  # of embeddings: more than a tokenizer has tokens
# Of models whose processors make pictures of one size, or text for one number of features.
CHANGES = {
    "got_ocr2": {"vision_config": {"image_size": 512}},
    "cohere2_vision": {"vision_config": {"image_size": 256}, "alignment_intermediate_size": 64},
    "ovis2": {
        "text": {"vocab_size": ROWS},
        "vocab_size": ROWS,
        "visual_indicator_token_ids": [343, 344, 345, 346, 347],
    },
    "aria": {"vision_config": {"image_size": 980, "patch_size": 70}, "projector_patch_to_query_dict": {196: 4}},
}
# Token that stands as often as there are features, where no attribute of the processor has its id.
REPEATED = {"ovis2": "<IMG_ATOM>"}


def pair(model_type):
    """A tiny native model with as many rows of embeddings as its processor's tokenizer has tokens, and the processor."""
    if model_type in CHANGES:
        made = convertible_models.build if model_type in convertible_models.TYPES else native_models.native
        native = made(model_type, **CHANGES[model_type])
    else:
        native = build(model_type)
    kind = "image" if model_type in IMAGES else "audio"
    processor = PROCESSORS[model_type](features(native))
    if native.get_input_embeddings().num_embeddings != ROWS:
        native.resize_token_embeddings(ROWS)
    entry = entry_of(native.config)
    for part in entry.parts_for(native.config).values():
        *folders, last = part.token.split(".")
        owner = setting(native.config, ".".join(folders)) if folders else native.config
        setattr(owner, last, placeholder_id(model_type, processor, kind))
    _set_videos(native, processor)
    return native, processor


def _set_videos(native, processor):
    """Give the model the id of its processor's placeholder of videos, if it has any."""
    token = getattr(processor, "video_token", None)
    for key in ("video_token_id", "video_token_index"):
        if token is not None and hasattr(native.config, key):
            setattr(native.config, key, processor.tokenizer.convert_tokens_to_ids(token))


def placeholder_id(model_type, processor, kind):
    """The id that stands as often as there are features."""
    if model_type in REPEATED:
        return processor.tokenizer.convert_tokens_to_ids(REPEATED[model_type])
    ids = getattr(processor, f"{kind}_token_ids", None) or [None]
    return (
        ids[0] if ids[0] is not None else processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
    )


def features(native):
    """How many features a picture, or a sound that fills its window, has in the native model."""
    ids = inputs_of(native)["input_ids"][0]
    return int(torch.isin(ids, torch.tensor(PLACEHOLDERS)).sum())


def compositions(template=None):
    """A function of model types: the native model, its processor, and the composition of both with its; each is made once.

    `template`, where it is given, gets the placeholder as texts have it for TOKEN, and is the processors' chat template.
    """

    @functools.cache
    def of(model_type):
        native, processor = pair(model_type)
        if template is not None:
            processor.chat_template = template.replace("TOKEN", written_by(model_type, processor))
        return native, processor, *from_native((native, processor))

    return of


def written_by(model_type, processor):
    """The placeholder of its first kind of items as texts for a native processor have it."""
    names = ["audio_token"] if model_type in SOUNDS else ["image_placeholder_token", "image_token"]
    token = next(token for name in names if (token := getattr(processor, name, None)))
    token = getattr(token, "content", token)
    return f"<|img_start|>{token}<|img_end|>" if model_type == "hunyuan_vl" else token
