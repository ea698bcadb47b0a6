"""A catalogue of real processors, each with a tiny encoder that takes what it gives.  A plain module, no tests."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import transformers
from shrunk import built, shrunk

# Names of its classes, which it takes half a second to list.
IN_TRANSFORMERS = frozenset(dir(transformers))

SQUARE = {"height": 32, "width": 32}
RESIZED = {"size": SQUARE}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


@dataclass(frozen=True)
class Pair:
    """One processor and an encoder.

    Attributes:
        encoder: its file ``transformers.models.*.modeling_*`` and class name, ``"clip.CLIPVisionModel"``.
        settings: of the processor's constructor.
        changes: of the encoder's configuration, on top of `shrunk`.
        options: keyword arguments of the encoder's constructor.
        module: keyword arguments of `ModalEncoderModule`.
        call: arguments of the processor's call.
        one_size: whether images of one call must have one size.
        smallest, largest: sides of an image, in pixels.
        ratio: of an image's sides, which the processor takes only below this.
        shortest: of sounds, in samples; they are up to `longest` long.
    """

    encoder: str
    settings: Mapping = field(default_factory=dict)
    changes: Mapping = field(default_factory=dict)
    options: Mapping = field(default_factory=dict)
    module: Mapping = field(default_factory=dict)
    call: Mapping = field(default_factory=dict)
    one_size: bool = False
    smallest: int = 1
    largest: int = 97
    ratio: float = 200
    shortest: int = 1000
    longest: int = 6000


# Where the file of a model is not named after its folder.
FOLDERS = {"donut_swin": "donut", "maskformer_swin": "maskformer", "data2vec_vision": "data2vec"}


def named(where: str, name: str):
    """A class of a module of transformers that `where` tells by folder: its processing, configuration or modeling."""
    return getattr(importlib.import_module(f"transformers.models.{where}"), name)


def build_encoder(pair: Pair):
    """The pair's tiny encoder."""
    where, name = pair.encoder.split(".")
    model_class = named(f"{FOLDERS.get(where, where)}.modeling_{where}", name)
    return built(model_class, shrunk(model_class.config_class, **pair.changes), **pair.options)


def build_processor(name: str, pair: Pair):
    """The pair's processor, small."""
    return getattr(importlib.import_module("transformers"), name)(**pair.settings)


CLIP = "clip.CLIPVisionModel"
RESNET = "resnet.ResNetModel"
SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_hidden_layers": 4}
HEADS = {"num_attention_heads": [1, 1, 2, 2], "num_hidden_layers": 4}
SWIN = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "patch_size": 4, "window_size": 4}
QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
GLM = {
    "patch_size": 4,
    "spatial_merge_size": 2,
    "hidden_size": 16,
    "out_hidden_size": 16,
    "num_heads": 2,
    "depth": 1,
    "intermediate_size": 32,
}

IMAGES: dict[str, Pair] = {
    "BeitImageProcessorPil": Pair("beit.BeitModel", RESIZED),
    "BitImageProcessorPil": Pair("dinov2.Dinov2Model", CROPPED),
    "BlipImageProcessorPil": Pair("blip.BlipVisionModel", RESIZED),
    "BridgeTowerImageProcessorPil": Pair(RESNET, {"size": {"shortest_edge": 32}, "crop_size": {"shortest_edge": 32}, "size_divisor": 1}, SMALL_RESNET),
    "ChameleonImageProcessorPil": Pair("vit.ViTModel", CROPPED),
    "ChineseCLIPImageProcessorPil": Pair("chinese_clip.ChineseCLIPVisionModel", CROPPED),
    "CLIPImageProcessorPil": Pair(CLIP, CROPPED),
    "CohereCompassImageProcessorPil": Pair("cohere_compass.CohereCompassVisionModel", QWEN, {"spatial_merge_size": 2, "patch_size": 4}),
    "ConditionalDetrImageProcessorPil": Pair(RESNET, RESIZED, SMALL_RESNET),
    "ConvNextImageProcessorPil": Pair("convnext.ConvNextModel", {"size": {"shortest_edge": 64}, "crop_pct": 1.0}, STAGES),
    "Cosmos3EdgeImageProcessorPil": Pair("cosmos3_edge.Cosmos3EdgeVisionModel", QWEN, {"patch_size": 4}),
    "DeepseekVLImageProcessorPil": Pair("siglip.SiglipVisionModel", RESIZED),
    "DeepseekVLHybridImageProcessorPil": Pair("siglip.SiglipVisionModel", RESIZED | {"high_res_size": {"height": 64, "width": 64}}),
    "DeformableDetrImageProcessorPil": Pair(RESNET, RESIZED, SMALL_RESNET),
    "DeiTImageProcessorPil": Pair("deit.DeiTModel", {"size": {"height": 36, "width": 36}, "crop_size": SQUARE}),
    "DetrImageProcessorPil": Pair(RESNET, RESIZED, SMALL_RESNET),
    "DonutImageProcessorPil": Pair("donut_swin.DonutSwinModel", RESIZED, SWIN, ratio=12),
    "DPTImageProcessorPil": Pair("dpt.DPTModel", RESIZED),
    "EfficientNetImageProcessorPil": Pair("pvt_v2.PvtV2Model", RESIZED, STAGES | {"num_attention_heads": [1, 1, 2, 2]}),
    "EomtImageProcessorPil": Pair("swin.SwinModel", {"size": {"shortest_edge": 32, "longest_edge": 32}, "do_pad": True}, SWIN, ratio=4),
    "Ernie4_5_VLMoeImageProcessorPil": Pair("ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel", QWEN, {"patch_size": 4, "depth": 1}),
    "FlavaImageProcessorPil": Pair("flava.FlavaImageModel", CROPPED | RESIZED),
    "Gemma3ImageProcessorPil": Pair("siglip.SiglipVisionModel", RESIZED),
    "Glm46VImageProcessorPil": Pair("glm4v.Glm4vVisionModel", QWEN, GLM),
    "Glm4vImageProcessorPil": Pair("glm4v.Glm4vVisionModel", QWEN, GLM),
    "Glm5NextImageProcessorPil": Pair("glm5_next.Glm5NextVisionModel", {"patch_size": 4, "merge_size": 2, "min_image_tokens": 1, "max_image_tokens": 16}, GLM),
    "GlmImageImageProcessorPil": Pair("glm_image.GlmImageVisionModel", QWEN | {"temporal_patch_size": 1}, {"patch_size": 4}, ratio=4, smallest=8),
    "GlmgaImageProcessorPil": Pair("glm4v.Glm4vVisionModel", QWEN, GLM),
    "GLPNImageProcessorPil": Pair("glpn.GLPNModel", {}, STAGES | HEADS, one_size=True, smallest=32, largest=80),
    "GotOcr2ImageProcessorPil": Pair("internvl.InternVLVisionModel", RESIZED, {"image_size": [32, 32], "patch_size": [8, 8]}),
    "GraniteDoclingImageProcessorPil": Pair("granite_docling.GraniteDoclingVisionModel", RESIZED | {"crop_to_patches": False}),
    "GroundingDinoImageProcessorPil": Pair(RESNET, RESIZED, SMALL_RESNET),
    "HunYuanVLImageProcessorPil": Pair("hunyuan_vl.HunYuanVLVisionTransformer", QWEN, {"patch_size": 4}),
    "HYV4VLImageProcessorPil": Pair("hy_v4_vl.HYV4VLVisionModel", QWEN, {"patch_size": 4, "num_key_value_heads": 4}),
    "IdeficsImageProcessorPil": Pair("metaclip_2.MetaClip2VisionModel", RESIZED),
    "Idefics3ImageProcessorPil": Pair("idefics3.Idefics3VisionTransformer", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False}),
    "ImageGPTImageProcessorPil": Pair("imagegpt.ImageGPTModel", {"size": {"height": 4, "width": 4}, "clusters": [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]}, {"n_positions": 16, "vocab_size": 4}),
    "JanusImageProcessorPil": Pair("janus.JanusVisionModel", RESIZED),
    "LayoutLMv2ImageProcessorPil": Pair("vit_msn.ViTMSNModel", RESIZED | {"apply_ocr": False}),
    "LayoutLMv3ImageProcessorPil": Pair("ijepa.IJepaModel", RESIZED | {"apply_ocr": False}),
    "LevitImageProcessorPil": Pair("levit.LevitModel", {"size": {"shortest_edge": 32}, "crop_size": {"height": 64, "width": 64}}, {"image_size": 64, "patch_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
    "LlavaImageProcessorPil": Pair("mlcd.MLCDVisionModel", CROPPED),
    "Mask2FormerImageProcessorPil": Pair("maskformer_swin.MaskFormerSwinModel", RESIZED, SWIN),
    "MaskFormerImageProcessorPil": Pair("maskformer_swin.MaskFormerSwinModel", RESIZED, SWIN),
    "MiniCPMV4_6ImageProcessorPil": Pair("minicpmv4_6.MiniCPMV4_6VisionModel", {"slice_mode": False, "scale_resolution": 32, "patch_size": 4}, {"patch_size": 4}),
    "MobileNetV1ImageProcessorPil": Pair("mobilenet_v1.MobileNetV1Model", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, {"depth_multiplier": 0.25}),
    "MobileNetV2ImageProcessorPil": Pair("mobilenet_v2.MobileNetV2Model", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, {"depth_multiplier": 0.25}),
    "MobileViTImageProcessorPil": Pair("mobilevit.MobileViTModel", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "patch_size": 2, "num_attention_heads": 2}),
    "NougatImageProcessorPil": Pair("donut_swin.DonutSwinModel", RESIZED, SWIN, ratio=12),
    "OneFormerImageProcessorPil": Pair("blip_2.Blip2VisionModel", RESIZED),
    "Ovis2ImageProcessorPil": Pair("ovis2.Ovis2VisionModel", RESIZED, {"hidden_stride": 1}),
    "Owlv2ImageProcessorPil": Pair("owlv2.Owlv2VisionModel", RESIZED),
    "OwlViTImageProcessorPil": Pair("owlvit.OwlViTVisionModel", RESIZED),
    "PerceiverImageProcessorPil": Pair("hiera.HieraModel", {"size": SQUARE, "crop_size": {"height": 36, "width": 36}}, {"image_size": [32, 32], "depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1}),
    "Pix2StructImageProcessorPil": Pair("pix2struct.Pix2StructVisionModel", {"patch_size": {"height": 4, "width": 4}, "max_patches": 24}, {"patch_size": 4, "patch_embed_hidden_size": 48, "d_kv": 8}),
    "Kosmos2_5ImageProcessorPil": Pair("kosmos2_5.Kosmos2_5VisionModel", {"patch_size": {"height": 4, "width": 4}, "max_patches": 24}, {"patch_size": 4, "patch_embed_hidden_size": 48, "head_dim": 8}),
    "PixtralImageProcessorPil": Pair("pixtral.PixtralVisionModel", {"patch_size": {"height": 8, "width": 8}, "size": {"longest_edge": 32}}, ratio=12),
    "PoolFormerImageProcessorPil": Pair("poolformer.PoolFormerModel", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, STAGES),
    "PPChart2TableImageProcessorPil": Pair("got_ocr2.GotOcr2VisionEncoder", RESIZED, {"image_size": 32, "patch_size": 8, "output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32}),
    "PromptDepthAnythingImageProcessorPil": Pair("dinov2_with_registers.Dinov2WithRegistersModel", RESIZED),
    "PvtImageProcessorPil": Pair("pvt.PvtModel", RESIZED, STAGES | HEADS | {"image_size": 32, "patch_size": 4}),
    "Qwen2VLImageProcessorPil": Pair("qwen2_vl.Qwen2VisionTransformerPretrainedModel", QWEN, {"patch_size": 4, "depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2}),
    "RTDetrImageProcessorPil": Pair(RESNET, RESIZED, SMALL_RESNET),
    "SamImageProcessorPil": Pair("sam.SamVisionModel", {"size": {"longest_edge": 32}, "pad_size": SQUARE}, {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32}, ratio=32),
    "SegformerImageProcessorPil": Pair("segformer.SegformerModel", RESIZED, STAGES | HEADS),
    "SegGptImageProcessorPil": Pair("yolos.YolosModel", RESIZED, {"image_size": [32, 32], "num_detection_tokens": 4}),
    "SiglipImageProcessorPil": Pair("siglip.SiglipVisionModel", RESIZED),
    "Siglip2ImageProcessorPil": Pair("siglip2.Siglip2VisionModel", {"patch_size": 8, "max_num_patches": 24}, {"num_patches": 16}),
    "SmolVLMImageProcessorPil": Pair("smolvlm.SmolVLMVisionTransformer", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False}),
    "SuperPointImageProcessorPil": Pair("regnet.RegNetModel", RESIZED, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}),
    "Swin2SRImageProcessorPil": Pair("swin2sr.Swin2SRModel", {}, {"depths": [1], "num_heads": [2], "embed_dim": 16, "window_size": 2, "image_size": 32, "patch_size": 1}, one_size=True, smallest=8, largest=28),
    "TextNetImageProcessorPil": Pair("convnextv2.ConvNextV2Model", {"size": {"shortest_edge": 32}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True}, STAGES),
    "VideoLlama3ImageProcessorPil": Pair("video_llama_3.VideoLlama3VisionModel", QWEN | {"merge_size": 1}, {"patch_size": 4}),
    "ViTImageProcessorPil": Pair("vit.ViTModel", RESIZED),
    "YolosImageProcessorPil": Pair("yolos.YolosModel", RESIZED, {"image_size": [32, 32], "num_detection_tokens": 4}),
    "ZoeDepthImageProcessorPil": Pair("vit_mae.ViTMAEModel", RESIZED | {"keep_aspect_ratio": False, "ensure_multiple_of": 8}, {"mask_ratio": 0.0}),
}  # fmt: skip

CONV = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
SOUNDS: dict[str, Pair] = {
    "ASTFeatureExtractor": Pair("audio_spectrogram_transformer.ASTModel", {"num_mel_bins": 16, "max_length": 32}, {"num_mel_bins": 16, "max_length": 32, "patch_size": 8}),
    "ClapFeatureExtractor": Pair("clap.ClapAudioModel", {"feature_size": 8, "sampling_rate": 16_000, "max_length_s": 1, "hop_length": 160, "truncation": "rand_trunc"}, {"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16, "window_size": 4, "enable_fusion": False, "num_hidden_layers": 2}),
    "ClvpFeatureExtractor": Pair("whisper.WhisperEncoder", {"feature_size": 8, "sampling_rate": 16_000, "chunk_length": 1, "default_audio_length": 1, "hop_length": 1400}, {"num_mel_bins": 8, "max_source_positions": 6}, call={"audio_kwargs": {"return_attention_mask": False}}),
    "CohereAsrFeatureExtractor": Pair("parakeet.ParakeetEncoder", {"feature_size": 16, "dither": 0.0}, {"num_mel_bins": 16}),
    "LasrFeatureExtractor": Pair("lasr.LasrEncoder", {"feature_size": 16}, {"num_mel_bins": 16}, shortest=3000, longest=9000),
    "MossTranscribeDiarizeFeatureExtractor": Pair("moss_transcribe_diarize.MossTranscribeDiarizeAudioModel", {"feature_size": 8, "chunk_length": 1, "hop_length": 1600}, {"num_mel_bins": 8, "max_source_positions": 5}),
    "NemotronAsrStreamingFeatureExtractor": Pair("nemotron_asr_streaming.NemotronAsrStreamingEncoder", {"feature_size": 16}, {"num_mel_bins": 16}),
    "OmniASRFeatureExtractor": Pair("omniasr.OmniASRAudioModel", {}, CONV),
    "ParakeetFeatureExtractor": Pair("parakeet.ParakeetEncoder", {"feature_size": 16}, {"num_mel_bins": 16}),
    "PeAudioFeatureExtractor": Pair("pe_audio.PeAudioEncoder", {"sampling_rate": 16_000}, {}),
    "Qwen3ASRFeatureExtractor": Pair("qwen3_asr.Qwen3ASREncoder", {"feature_size": 16, "chunk_length": 1, "min_length": 800}, {"num_mel_bins": 16}),
    "SeamlessM4TFeatureExtractor": Pair("wav2vec2_bert.Wav2Vec2BertModel", {"feature_size": 16, "num_mel_bins": 16}, {"feature_projection_input_dim": 32}),
    "Speech2TextFeatureExtractor": Pair("speech_to_text.Speech2TextEncoder", {"feature_size": 16, "num_mel_bins": 16}, {"input_feat_per_channel": 16, "conv_channels": 16}),
    "SpeechT5FeatureExtractor": Pair("speecht5.SpeechT5EncoderWithSpeechPrenet", {}, CONV),
    "Gemma3nAudioFeatureExtractor": Pair("gemma3n.Gemma3nAudioEncoder", {"feature_size": 16}, {"input_feat_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4, "sscp_conv_channel_size": [8, 4]}),
    "Gemma4UnifiedAudioFeatureExtractor": Pair("wav2vec2_bert.Wav2Vec2BertModel", {}, {"feature_projection_input_dim": 640}),
    "MuseSparkFeatureExtractor": Pair("hubert.HubertModel", {"sampling_rate": 16_000, "samples_per_token": 64}, CONV),
    "InklingFeatureExtractor": Pair("wav2vec2_bert.Wav2Vec2BertModel", {"feature_size": 16}, {"feature_projection_input_dim": 16}),
    "Wav2Vec2FeatureExtractor": Pair("wav2vec2.Wav2Vec2Model", {}, CONV),
    "WhisperFeatureExtractor": Pair("whisper.WhisperEncoder", {"feature_size": 8, "chunk_length": 1, "hop_length": 1333}, {"num_mel_bins": 8, "max_source_positions": 6}),
}  # fmt: skip
PAIRS = IMAGES | SOUNDS

# Images of 40 x 64 and 64 x 40 that are refused together, and the reason in words.
LANDSCAPES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
REFUSED: dict[str, tuple[Pair, str]] = {
    "DetrImageProcessorPil": (Pair(RESNET, {"size": {"shortest_edge": 32, "longest_edge": 64}}, SMALL_RESNET), "item 0: Detr.* padded it from 32 x 51 to 51 x 51, and its encoder takes no pixel_mask"),
    "AriaImageProcessorPil": (Pair(CLIP, {"max_image_size": 490}), "item 0: Aria.* padded it from 336 x 490 to 490 x 490"),
    "LlavaNextImageProcessorPil": (Pair(CLIP, CROPPED | LANDSCAPES), "item 0: LlavaNext.* into 3 crops, expected 1"),
    "LlavaOnevisionImageProcessorPil": (Pair(CLIP, RESIZED | LANDSCAPES), "item 0: LlavaOnevision.* into 3 crops, expected 1"),
    "Idefics2ImageProcessorPil": (Pair("idefics2.Idefics2VisionTransformer", {"size": {"shortest_edge": 16, "longest_edge": 32}}), r"\(3, 20, 32\) for item 0 and \(3, 32, 20\) for item 1, .*fixed size"),
    "GotOcr2ImageProcessorPil": (Pair(CLIP, RESIZED | {"crop_to_patches": True, "max_patches": 4}), "'pixel_values' has 6 rows for 2 items: .*crop_to_patches=False"),
    "FuyuImageProcessorPil": (Pair(CLIP), "its encoder takes .*'pixel_values'.*but got only"),
    "SuperGlueImageProcessorPil": (Pair(CLIP, RESIZED), "item 0: SuperGlue.* cannot process it, .* A pair of PIL images"),
    "LightGlueImageProcessorPil": (Pair(CLIP, RESIZED), "item 0: LightGlue.* cannot process it, .* A pair of PIL images"),
    "EfficientLoFTRImageProcessorPil": (Pair(CLIP, RESIZED), "item 0: EfficientLoFTR.* cannot process it, .* A pair of PIL images"),
    "VitMatteImageProcessorPil": (Pair(CLIP), "item 0: VitMatte.* cannot process it, .*'trimaps'"),
    "VitPoseImageProcessorPil": (Pair(CLIP, RESIZED), "item 0: VitPose.* cannot process it, .*'boxes'"),
}  # fmt: skip
