"""Tiny encoders of everything but images: audio, text, proteins, time series, codecs.  One row per class; see `catalog`.

An item holds its masks too, all ones where it is alone, as a processor gives them.  Lengths differ where the encoder takes others.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from catalog import Case, Inputs, floats

LENGTHS = (9, 14, 6, 11, 8, 12)


def ids(i: int, vocabulary: int = 300, mask: str | None = "attention_mask") -> Inputs:
    """Token ids ``(1, length)``, none of them special, and a mask."""
    length = LENGTHS[i % len(LENGTHS)]
    generator = torch.Generator().manual_seed(2000 + i)
    found = {"input_ids": torch.randint(5, vocabulary, (1, length), generator=generator)}
    return found | ({mask: torch.ones(1, length, dtype=torch.long)} if mask else {})


def colours(i: int) -> Inputs:
    """Sixteen pixels as ids."""
    return {"input_ids": ids(i)["input_ids"].repeat(1, 3)[:, :16]}


def boxed(i: int) -> Inputs:
    """Token ids with the box of each word on its page, ``(1, length, 4)``."""
    found = ids(i)
    corners = torch.arange(found["input_ids"].shape[1])[:, None] * torch.tensor([3, 2, 3, 2]) + torch.tensor(
        [1, 1, 9, 5]
    )
    return found | {"bbox": corners[None]}


def in_table(i: int) -> Inputs:
    """Token ids with the seven type ids of each cell."""
    found = ids(i)
    types = torch.zeros(1, found["input_ids"].shape[1], 7, dtype=torch.long)
    types[..., 1] = torch.arange(types.shape[1]) % 3
    return found | {"token_type_ids": types}


def in_markup(i: int) -> Inputs:
    """Token ids with the path of each node, ``(1, length, depth)``."""
    found = ids(i)
    path = torch.arange(4) % 3 + torch.arange(found["input_ids"].shape[1])[:, None] % 5
    return found | {"xpath_tags_seq": path[None], "xpath_subs_seq": path[None] + 1}


def wave(
    i: int,
    mask: str | None = "attention_mask",
    channel: bool = False,
    unit: int = 37,
    least: int = 200,
    spread: int = 11,
) -> Inputs:
    """A waveform ``(1, samples)``, or ``(1, 1, samples)``, and a mask ``(1, samples)``."""
    samples = least + unit * (LENGTHS[i % len(LENGTHS)] * spread % 19)
    found = {"input_values": floats(i, 1, *([1] if channel else []), samples)}
    return found | ({mask: torch.ones(1, samples, dtype=torch.long)} if mask else {})


def codec(i: int, mask: str | None = "padding_mask") -> Inputs:
    """A waveform ``(1, 1, samples)`` of whole steps of a codec, and a mask."""
    samples = (384, 464, 336)[i % 3]
    found = {"input_values": floats(i, 1, 1, samples)}
    return found | ({mask: torch.ones(1, samples, dtype=torch.long)} if mask else {})


def even_codec(i: int, mask: str | None = None) -> Inputs:
    """The same of an encoder that takes only equal lengths in one batch."""
    return codec(i % 2, mask) | {"input_values": floats(i, 1, 1, codec(i % 2)["input_values"].shape[-1])}


def mel(
    i: int,
    bins: int = 8,
    name: str = "input_features",
    mask: str | None = "attention_mask",
    bins_first: bool = False,
    frames: Sequence[int] = (40, 56, 33, 48, 27, 64),
    dtype: torch.dtype = torch.long,
    fill: int = 1,
) -> Inputs:
    """A spectrogram ``(1, frames, bins)``, or ``(1, bins, frames)``, and a mask ``(1, frames)``."""
    length = frames[i % len(frames)]
    found = {name: floats(i, 1, *((bins, length) if bins_first else (length, bins)))}
    return found | ({mask: torch.full((1, length), fill, dtype=dtype)} if mask else {})


def window(i: int, mask: str | None = None, frames: int = 32, valid: Sequence[int] = (32, 20, 27, 9)) -> Inputs:
    """A spectrogram ``(1, 8, frames)`` of an encoder that takes one length; the mask tells how much of it is sound."""
    found = {"input_features": floats(i, 1, 8, frames)}
    if mask:
        found[mask] = (torch.arange(frames) < valid[i % len(valid)])[None].long()
    return found


def packed_mel(i: int) -> Inputs:
    """A spectrogram ``(8, frames)``; several lie one after the other on the second axis."""
    frames = (124, 250, 68, 200)[i % 4]
    return {"input_features": floats(i, 8, frames), "feature_lens": torch.tensor([frames])}


def join_packed_mel(items: Sequence[Inputs]) -> Inputs:
    return {
        "input_features": torch.cat([one["input_features"] for one in items], dim=1),
        "feature_lens": torch.cat([one["feature_lens"] for one in items]),
    }


def chunked_mel(i: int) -> Inputs:
    """A spectrogram ``(1, 8, frames)`` padded to whole chunks of 100, as its extractor does, and its mask."""
    frames = (124, 250, 68, 200)[i % 4]
    padded = -(-frames // 100) * 100
    mask = (torch.arange(padded) < frames).long()
    return {"input_features": floats(i, 1, 8, padded) * mask, "input_features_mask": mask[None]}


def gemma3n_mel(i: int) -> Inputs:
    """A spectrogram whose mask says True where there is padding."""
    return mel(i, bins=16, name="audio_mel", mask="audio_mel_mask", dtype=torch.bool, fill=0)


def phi4_mel(i: int) -> Inputs:
    return mel(i, bins=16, name="hidden_states", mask="mask", dtype=torch.bool)


def clap_mel(i: int) -> Inputs:
    return {"input_features": floats(i, 1, 1, 256, 64), "is_longer": torch.zeros(1, 1, dtype=torch.bool)}


def spectrum(i: int) -> Inputs:
    return {"input_values": floats(i, 1, 32, 16)}


def coded_mel(i: int) -> Inputs:
    """A spectrogram ``(1, frames, bins)`` of integers."""
    return {"audio_input_ids": torch.randint(0, 16, (1, (7, 9)[i % 2], 8), generator=torch.Generator().manual_seed(i))}


def spelled(i: int) -> Inputs:
    """Token ids under the name that encoders of sound use."""
    found = ids(i, 80)
    return {"input_values": found["input_ids"], "attention_mask": found["attention_mask"]}


def queries(i: int) -> Inputs:
    """Queries and what they attend to."""
    return {"query_embeds": floats(i, 1, 4, 32), "encoder_hidden_states": floats(i + 50, 1, 7, 32)}


def stepped_wave(i: int) -> Inputs:
    """A waveform ``(1, samples)`` of whole steps of 8."""
    return {"input_values": floats(i, 1, (96, 120)[i % 2])}


def patched(i: int) -> Inputs:
    """A time series ``(1, channels, patches, length of a patch)``."""
    return {"past_values": floats(i, 1, 2, 4, 8)}


def lagged(i: int) -> Inputs:
    """A time series with its lags, ``(1, length, 4)``, as the encoder of a forecasting model takes it."""
    return {"inputs_embeds": floats(i, 1, 16, 4)}


def series(i: int, length: int = 32, channels: int = 2, mask: str | None = None) -> Inputs:
    """A time series ``(1, length, channels)``."""
    found = {"past_values": floats(i, 1, length, channels)}
    return found | ({mask: torch.ones(1, length, channels)} if mask else {})


def one_channel(i: int, frequency: bool = False) -> Inputs:
    """A time series ``(1, length)``, whole patches of 8; its encoder's own padding is in front."""
    length = 64 if i % 2 == 0 else 40
    found = {"past_values": floats(i, 1, length), "past_values_padding": torch.zeros(1, length, dtype=torch.long)}
    return found | ({"freq": torch.tensor([[i % 3]])} if frequency else {})


def semantic_wave(i: int) -> Inputs:
    """A waveform with its spectrogram, one row for each code."""
    codes = (12, 15)[i % 2]
    return {"input_values": floats(i, 1, 1, 40 * codes), "input_features": floats(i + 50, 1, codes, 8)}


def rows(i: int) -> Inputs:
    """Vectors ``(1, length, 32)`` and a mask."""
    length = LENGTHS[i % len(LENGTHS)]
    return {"inputs": floats(i, 1, length, 32), "attention_mask": torch.ones(1, length, dtype=torch.long)}


def text(items: Callable[[int], Inputs] = ids, pad: int = 0, **changes) -> Case:
    """A text encoder whose padding token is `pad`."""
    return Case(items, {"pad_token_id": pad, "bos_token_id": 2, "eos_token_id": 3} | changes, "pad", {"input_ids": pad})


def convolving(items: Callable[[int], Inputs] = wave, join: str = "pad", **changes) -> Case:
    """An audio encoder of wav2vec 2.0's kind: a stack of convolutions over the waveform, then transformer layers."""
    stack = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return Case(items, stack | positions | {"apply_spec_augment": False} | changes, join)


protein = partial(ids, vocabulary=30)
long_wave = partial(wave, least=1600, unit=160)
long_mel = partial(mel, frames=(60, 90, 45, 72))
even_mel = partial(mel, mask="input_features_mask", frames=(40, 56, 32, 48))
bare_mel = partial(mel, bins_first=True, mask=None, frames=(40, 56))
bare_states = partial(mel, name="hidden_states", mask=None, frames=(40, 56))

BINS = {"num_mel_bins": 8}
ONE_LENGTH = BINS | {"max_source_positions": 16}
DAC = {"encoder_hidden_size": 4, "downsampling_ratios": (2, 4), "decoder_hidden_size": 16, "n_codebooks": 2,
       "codebook_size": 16, "codebook_dim": 4}  # fmt: skip
SEANET = {
    "hidden_size": 32,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_dim": 16,
    "codebook_size": 16,
    "num_hidden_layers": 1,
}
MIMI = SEANET | {"codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_quantizers": 4, "upsample_groups": 32,
                 "head_dim": 8}  # fmt: skip
POCKET = {"hidden_size": 32, "num_filters": 4, "upsampling_ratios": [4, 2], "num_hidden_layers": 1, "upsample_groups": 32,
          "head_dim": 8, "latent_dim": 16, "latent_stride": 2}  # fmt: skip
HUBERT = {"model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
          "conv_dim": (8, 8), "conv_kernel": (8, 2), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
NEUCODEC = {
    "semantic_model_config": {"model_type": "wav2vec2-bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                              "intermediate_size": 48, "feature_projection_input_dim": 8, "apply_spec_augment": False},
    "encoder_hidden_size": 4, "downsampling_ratios": (2, 4, 5), "num_key_value_heads": 4, "quantization_dim": 64,
}  # fmt: skip
GEMMA2 = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "embedding_dim": 24}  # fmt: skip
CLAP = {"patch_embeds_hidden_size": 4, "hidden_size": 32, "depths": (1, 1, 1, 1), "num_attention_heads": (1, 2, 2, 2)}
FUN_ASR = BINS | {
    "num_stacked_frames": 3,
    "num_hidden_layers": 3,
    "num_timestamp_prediction_layers": 1,
    "fsmn_kernel_size": 3,
}
GEMMA3N = {"input_feat_size": 16, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "sscp_conv_channel_size": (8, 4),
           "conf_reduction_factor": 2, "conf_attention_chunk_size": 4, "conf_attention_context_left": 5}  # fmt: skip
GEMMA4 = {
    "subsampling_conv_channels": (16, 4),
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "output_proj_dims": 24,
}
GRANITE = {"input_dim": 8, "dim_head": 8, "context_size": 16, "max_pos_emb": 32, "conv_kernel_size": 5}
GRANITE5 = BINS | {"subsample_layers": [0], "num_key_value_heads": 4, "context_size": 16, "conv_kernel_size": 5}
STREAMING = BINS | {"subsampling_conv_channels": 8, "sliding_window": 8, "default_num_lookahead_tokens": 1}
PHI4 = {"input_size": 16, "num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8}  # fmt: skip
QWEN3 = BINS | {"n_window_infer": 200, "downsample_hidden_size": 4}
SPEECH_DECODER = BINS | {"speech_decoder_prenet_units": 8, "speaker_embedding_dim": 8,
                         "speech_decoder_prenet_dropout": 0.0}  # fmt: skip
UNIVNET = BINS | {"model_in_channels": 4, "model_hidden_channels": 4, "kernel_predictor_hidden_channels": 4}
WAVTOKENIZER = {
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_dim": 16,
    "upsampling_ratios": [4, 2],
    "codebook_size": 16,
    "num_lstm_layers": 1,
}
WAV2VEC2_BERT = {"feature_projection_input_dim": 8, "apply_spec_augment": False, "conv_depthwise_kernel_size": 3,
                 "vocab_size": 32}  # fmt: skip
XCODEC = {"acoustic_model_config": DAC | {"hidden_size": 16}, "semantic_model_config": HUBERT, "codebook_size": 16,
          "target_bandwidths": (8, 16)}  # fmt: skip
SERIES = {"context_length": 32, "num_input_channels": 2}
FORECAST = {"patch_length": 8, "context_length": 64, "horizon_length": 8}
SEAMLESS = {"speech_encoder_layers": 2, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 48,
            "feature_projection_input_dim": 8, "adaptor_kernel_size": 4, "adaptor_stride": 4, "conv_depthwise_kernel_size": 3,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
PARAKEET = {"model_type": "parakeet_encoder", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_mel_bins": 8, "subsampling_conv_channels": 8}  # fmt: skip
MUSE = {"patch_sizes": (4, 2), "hidden_sizes": (8, 16), "depths": (1, 1), "num_hidden_layers": 2, "out_hidden_size": 24,
        "conv_kernel_size": 3}  # fmt: skip
VIBEVOICE = {"hidden_size": 16, "num_filters": 4, "downsampling_ratios": (2, 4), "depths": (1, 1, 1)}
FASTCONFORMER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "num_mel_bins": 8}  # fmt: skip
DIARIZATION = {"audio_config": FASTCONFORMER, "head_config": {"hidden_size": 16, "audio_hidden_size": 32}}
NEMOTRON = {"asr_config": FASTCONFORMER, "diarization_config": {"model_type": "nemotron3_diarization"} | DIARIZATION}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5GEMMA2 = {"text_config": SMALL | {"vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "dropout_rate": 0.0},
            "vision_config": SMALL | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}}  # fmt: skip
TIME = {"prediction_length": 4, "context_length": 16, "d_model": 16, "input_size": 1}

CASES: dict[str, Case] = {
    # ---- text
    "BertModel": text(),
    "CanineModel": text(num_hash_buckets=64, num_hash_functions=4, local_transformer_stride=8),
    "CLIPTextModel": text(),
    "Data2VecTextModel": text(pad=1),
    "DebertaV2Model": text(),
    "EmbeddingGemma2TextModel": Case(ids, GEMMA2, "pad", whole=True),
    "EuroBertModel": text(),
    "GteModel": text(),
    "JinaEmbeddingsV3Model": text(pad=1),
    "LayoutLMv3Model": text(boxed, pad=1, coordinate_size=5, shape_size=6),
    "LiltModel": text(boxed, pad=1, hidden_size=48),
    "MarkupLMModel": text(in_markup, max_depth=4),
    "MPNetModel": text(pad=1),
    "ModernBertModel": text(),
    "NomicBertModel": text(),
    "RoFormerModel": text(),
    "SiglipTextModel": text(),
    "T5EncoderModel": text(d_kv=8, d_ff=48),
    "TapasModel": text(in_table, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4]),
    "XLMRobertaModel": text(pad=1),
    # ---- proteins
    "EsmModel": text(protein, pad=1, vocab_size=33, mask_token_id=32),
    "EsmcModel": text(protein, pad=1, vocab_size=33, num_key_value_heads=4),
    # ---- pixels as ids, and vectors
    "ImageGPTModel": Case(colours, {"n_positions": 16}, kind="image"),
    "PerceiverModel": Case(
        rows, {"num_latents": 6, "d_latents": 16, "d_model": 32, "num_self_attends_per_block": 1}, "pad"
    ),
    # ---- waveforms
    "Data2VecAudioModel": convolving(conv_pos_kernel_size=3),
    "HubertModel": convolving(),
    "MoonshineEncoder": Case(long_wave, {"encoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4}, "pad"),
    "MoonshineStreamingEncoder": Case(partial(long_wave, unit=80), {"sliding_windows": ((4, 2), (4, 0))}, "pad"),
    "OmniASRAudioModel": convolving(partial(wave, mask="padding_mask", channel=True)),
    "PeAudioEncoder": Case(codec, {"dac_config": DAC}, "pad"),
    "SEWModel": convolving(),
    "SEWDModel": convolving(),
    "SpeechT5EncoderWithSpeechPrenet": convolving(),
    "UniSpeechModel": convolving(),
    "UniSpeechSatModel": convolving(),
    "Wav2Vec2Model": convolving(),
    "Wav2Vec2ConformerModel": convolving(conv_depthwise_kernel_size=3),
    "WavLMModel": convolving(num_buckets=16, max_bucket_distance=32),
    # ---- spectrograms of one length
    "ASTModel": Case(spectrum, {"max_length": 32, "num_mel_bins": 16}, kind="audio"),
    "AudioFlamingo3Encoder": Case(partial(window, mask="input_features_mask"), ONE_LENGTH),
    "ClapAudioModel": Case(clap_mel, CLAP),
    "MossTranscribeDiarizeAudioModel": Case(window, ONE_LENGTH),
    "Qwen2AudioEncoder": Case(window, ONE_LENGTH),
    "VoxtralEncoder": Case(window, ONE_LENGTH),
    "WhisperEncoder": Case(window, ONE_LENGTH),
    # ---- spectrograms of any length
    "FunAsrNanoEncoder": Case(partial(mel, bins=24, mask="input_features_mask"), FUN_ASR, "pad"),
    "Gemma3nAudioEncoder": Case(gemma3n_mel, GEMMA3N, "pad", {"audio_mel_mask": True}, kind="audio"),
    "Gemma4AudioModel": Case(partial(mel, bins=16, dtype=torch.bool), GEMMA4, "pad"),
    "GlmAsrEncoder": Case(bare_mel, BINS),
    "GraniteSpeechCTCEncoder": Case(bare_states, GRANITE, kind="audio"),
    "GraniteSpeechPlusCTCEncoder": Case(bare_states, GRANITE, kind="audio"),
    "GraniteSpeech5Encoder": Case(partial(mel, bins=32), GRANITE5, "pad"),
    "LasrEncoder": Case(long_mel, BINS | {"subsampling_conv_channels": 8, "conv_kernel_size": 4}, "pad"),
    "Nemotron3DiarizationAudioModel": Case(mel, BINS | {"num_key_value_heads": 4}, "pad"),
    "Nemotron3_5TranscribeAsrAudioModel": Case(mel, BINS | {"num_key_value_heads": 4}, "pad"),
    "NemotronAsrStreamingEncoder": Case(mel, STREAMING, "pad"),
    "ParakeetEncoder": Case(mel, BINS | {"subsampling_conv_channels": 8}, "pad"),
    "Phi4MultimodalAudioModel": Case(phi4_mel, PHI4, "pad", kind="audio"),
    "Qwen2_5OmniAudioEncoder": Case(packed_mel, BINS | {"n_window": 20, "max_source_positions": 40}, join_packed_mel),
    "Qwen3ASREncoder": Case(chunked_mel, QWEN3, "pad"),
    "Qwen3OmniMoeAudioEncoder": Case(packed_mel, QWEN3 | {"max_source_positions": 50}, join_packed_mel),
    "Speech2TextEncoder": Case(mel, {"input_feat_per_channel": 8, "conv_channels": 16}, "pad"),
    "SpeechT5DecoderWithSpeechPrenet": Case(partial(mel, name="input_values"), SPEECH_DECODER, "pad"),
    "UnivNetModel": Case(partial(mel, mask=None, frames=(5, 6)), UNIVNET, kind="audio"),
    "VoxtralRealtimeEncoder": Case(bare_mel, BINS | {"sliding_window": 8}),
    "Wav2Vec2BertModel": Case(mel, WAV2VEC2_BERT, "pad"),
    # ---- codecs
    "DacModel": Case(even_codec, DAC),
    "EncodecModel": Case(even_codec, SEANET | {"codebook_dim": 16, "hidden_size": 16, "num_lstm_layers": 1}),
    "MimiEncoderModel": Case(codec, MIMI, "pad"),
    "MimiModel": Case(even_codec, MIMI),
    "NeuCodecModel": Case(semantic_wave, NEUCODEC),
    "PocketTTSAudioTokenizerEncoderModel": Case(codec, POCKET, "pad"),
    "PocketTTSAudioTokenizerModel": Case(even_codec, POCKET),
    "WavTokenizerEncoderModel": Case(codec, WAVTOKENIZER),
    "XcodecModel": Case(even_codec, XCODEC, whole=True),
    # ---- time series
    "PatchTSMixerModel": Case(partial(series, mask="observed_mask"), SERIES),
    "PatchTSTModel": Case(partial(series, mask="past_observed_mask"), SERIES | {"patch_length": 8, "patch_stride": 8}),
    "TimesFmModel": Case(partial(one_channel, frequency=True), FORECAST),
    "TimesFm2_5Model": Case(one_channel, FORECAST | {"output_quantile_len": 16}),
}

# Features of the items 0 and 1 alone, and their width: what a composition must see of each class.
FEATURES: dict[str, tuple[int, int, int]] = {
    name: shape
    for shape, names in {
        (4, 3, 32): "MoonshineEncoder",
        (5, 5, 32): "ASTModel",
        (5, 7, 32): """
            Gemma3nAudioEncoder Nemotron3DiarizationAudioModel Nemotron3_5TranscribeAsrAudioModel ParakeetEncoder
            Phi4MultimodalAudioModel
        """,
        (6, 6, 16): "PerceiverModel",
        (6, 6, 32): "MoonshineStreamingEncoder",
        (6, 8, 32): "NemotronAsrStreamingEncoder",
        (8, 5, 32): "TimesFmModel TimesFm2_5Model",
        (8, 8, 8): "PatchTSMixerModel",
        (8, 8, 32): "AudioFlamingo3Encoder Qwen2AudioEncoder PatchTSTModel",
        (9, 14, 24): "EmbeddingGemma2TextModel",
        (9, 14, 32): """
            BertModel CanineModel CLIPTextModel Data2VecTextModel DebertaV2Model EuroBertModel GteModel JinaEmbeddingsV3Model
            LayoutLMv3Model MarkupLMModel MPNetModel ModernBertModel NomicBertModel RoFormerModel SiglipTextModel
            T5EncoderModel TapasModel XLMRobertaModel EsmModel EsmcModel
        """,
        (9, 14, 48): "LiltModel",
        (10, 14, 24): "Gemma4AudioModel",
        (10, 14, 32): "Speech2TextEncoder",
        (12, 20, 32): "LasrEncoder",
        (16, 16, 32): "ImageGPTModel MossTranscribeDiarizeAudioModel VoxtralEncoder WhisperEncoder",
        (16, 33, 32): "Qwen3ASREncoder Qwen3OmniMoeAudioEncoder",
        (20, 28, 32): "GlmAsrEncoder GraniteSpeech5Encoder VoxtralRealtimeEncoder",
        (24, 29, 16): "PocketTTSAudioTokenizerEncoderModel PocketTTSAudioTokenizerModel",
        (24, 29, 32): "MimiEncoderModel",
        (31, 62, 32): "Qwen2_5OmniAudioEncoder",
        (33, 26, 32): """
            Data2VecAudioModel HubertModel SEWModel SEWDModel SpeechT5EncoderWithSpeechPrenet UniSpeechModel
            OmniASRAudioModel UniSpeechSatModel Wav2Vec2Model Wav2Vec2ConformerModel WavLMModel
        """,
        (40, 56, 32): """
            FunAsrNanoEncoder GraniteSpeechCTCEncoder GraniteSpeechPlusCTCEncoder SpeechT5DecoderWithSpeechPrenet
            Wav2Vec2BertModel
        """,
        (48, 58, 32): "PeAudioEncoder DacModel",
        (64, 64, 32): "ClapAudioModel",
    }.items()
    for name in names.split()
}

# Classes that give nothing to project, and what they give instead.
NO_FEATURES: dict[str, str] = {
    "EncodecModel": "integer codes and sound",
    "MimiModel": "integer codes and sound; its encoder, MimiEncoderModel, gives features",
    "NeuCodecModel": "integer codes and sound",
    "UnivNetModel": "sound: it is a vocoder",
    "WavTokenizerEncoderModel": "integer codes",
    "XcodecModel": "integer codes and sound",
}

# Classes that the facts' table holds without a measurement; whole models are here whose encoder is taken.
MORE: dict[str, Case] = {
    "AutoformerEncoder": Case(lagged, TIME | {"lags_sequence": [1, 2], "moving_average": 5}, kind="time"),
    "AutoformerModel": Case(lagged, TIME | {"lags_sequence": [1, 2], "moving_average": 5}, kind="time"),
    "Blip2QFormerModel": Case(queries, module_kwargs={"additional_args": ["encoder_hidden_states"]}),
    "CanaryModel": Case(mel, {"encoder_config": PARAKEET, "vocab_size": 320}, "pad"),
    "CohereAsrModel": Case(mel, {"encoder_config": PARAKEET, "num_key_value_heads": 4}, "pad"),
    "InformerEncoder": Case(
        lagged, TIME | {"lags_sequence": [1, 2], "sampling_factor": 2, "distil": False}, kind="time"
    ),
    "InformerModel": Case(lagged, TIME | {"lags_sequence": [1, 2], "sampling_factor": 2, "distil": False}, kind="time"),
    "InklingAudioModel": Case(coded_mel, {"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": 24}, kind="audio"),
    "MoonshineModel": Case(
        long_wave,
        {"encoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_hidden_layers": 1},
        "pad",
    ),
    "MoonshineStreamingModel": Case(partial(long_wave, unit=80), {"num_key_value_heads": 4}, "pad"),
    "MuseSparkAudioModel": Case(stepped_wave, MUSE),
    "Nemotron3DiarizationModel": Case(mel, DIARIZATION, "pad", whole=True),
    "Nemotron3_5TranscribeAudioModel": Case(even_mel, NEMOTRON, "pad", whole=True),
    "PatchTSMixerEncoder": Case(patched, SERIES),
    "PatchTSTEncoder": Case(
        lambda i: {"patch_input": floats(i, 1, 2, 4, 8)},
        SERIES | {"patch_length": 8, "patch_stride": 8},
        options={"num_patches": 4},
        kind="time",
    ),
    "SeamlessM4TSpeechEncoder": Case(mel, SEAMLESS, "pad"),
    "SeamlessM4Tv2SpeechEncoder": Case(mel, SEAMLESS, "pad"),
    "SpeechT5Encoder": Case(partial(mel, bins=32, name="hidden_states"), {}, "pad", kind="audio"),
    "SpeechT5EncoderWithoutPrenet": Case(partial(mel, bins=32, name="input_values"), {}, "pad"),
    "SpeechT5EncoderWithTextPrenet": Case(spelled, {}, "pad", {"input_values": 1}, kind="text"),
    "T5Gemma2Encoder": Case(ids, T5GEMMA2, "pad", kind="text", whole=True),
    "TimeSeriesTransformerEncoder": Case(lagged, TIME | {"lags_sequence": [1, 2]}, kind="time"),
    "TimeSeriesTransformerModel": Case(lagged, TIME | {"lags_sequence": [1, 2]}, kind="time"),
    "VibeVoiceAcousticTokenizerEncoderModel": Case(
        lambda i: {"hidden_states": even_codec(i)["input_values"]}, VIBEVOICE, kind="audio"
    ),
    "Xcodec2Model": Case(semantic_wave, NEUCODEC),
}
