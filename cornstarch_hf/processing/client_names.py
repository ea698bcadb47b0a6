"""What clients of transformers' processors look for: attributes of single kinds, token types, numbers of tokens by sizes."""

from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from ..configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from .call import media_options


class ClientNames(ProcessorMixin):
    """Attributes of transformers' processors that clients look for, by kind, where there is one modality of that."""

    config: MultimodalConfig
    processors: dict[Any, Any]
    placeholder_ids: Any
    _count_of_size: Any

    def _attribute(self, kind: str, what: str) -> Any:
        names = self.config.modalities_of_kind(kind)
        if len(names) == 1:
            value = self.processors.get(names[0]) if what == "processor" else self.config.modality(names[0])[what]
            if value is not None:
                return value
        raise AttributeError(f"this processor has not exactly one modality of the kind {kind!r} with a {what}")

    image_processor = property(lambda self: self._attribute("image", "processor"))
    video_processor = property(lambda self: self._attribute("video", "processor"))
    feature_extractor = property(lambda self: self._attribute("audio", "processor"))
    image_token = property(lambda self: self._attribute("image", "token"))
    video_token = property(lambda self: self._attribute("video", "token"))
    audio_token = property(lambda self: self._attribute("audio", "token"))
    image_token_id = property(lambda self: self._attribute("image", "token_id"))
    video_token_id = property(lambda self: self._attribute("video", "token_id"))
    audio_token_id = property(lambda self: self._attribute("audio", "token_id"))

    def create_mm_token_type_ids(self, input_ids) -> list[list[int]]:
        """As in transformers, for ids ``(batch, length)``: 1 on placeholders of images, 2 of videos, 3 of sounds, 0 elsewhere.

        ValueError for placeholders of another kind, which have no number.
        """
        rows = [row if isinstance(row, list) else row.tolist() for row in input_ids]
        for name, number in self.placeholder_ids.items():
            kind = self.config.modality(name)["kind"]
            if kind not in MEDIA_KINDS and any(number in row for row in rows):
                raise ValueError(f"{name}: mm_token_type_ids have no number for the kind {kind!r}: leave them out.")
        return super().create_mm_token_type_ids(rows)

    def _ids_of_kind(self, kind: str) -> list[int]:
        return [self.placeholder_ids[name] for name in self.config.modalities_of_kind(kind)]

    image_token_ids = property(lambda self: self._ids_of_kind("image"))
    video_token_ids = property(lambda self: self._ids_of_kind("video"))
    audio_token_ids = property(lambda self: self._ids_of_kind("audio"))

    def _get_num_multimodal_tokens(
        self, image_sizes=None, video_sizes=None, audio_lengths=None, **kwargs: Any
    ) -> MultiModalData:
        """As in transformers: how many placeholder tokens items of these sizes will give, by arithmetic or on shapes alone.

        Args:
            image_sizes, video_sizes: ``(height, width)`` of each image, ``(frames, height, width)`` of each video.
            audio_lengths: samples of each sound, at the rate that its feature extractor expects.
            **kwargs: options of single processors, as in a call.

        ValueError where there is not one modality of that kind.
        """
        options, found = media_options(self.config, self.processors, {}, kwargs), dict[str, list[int]]()
        if kwargs:
            raise TypeError(f"Unknown arguments {sorted(kwargs)}: expected options of single processors, as in a call.")
        for kind, sizes in {"image": image_sizes, "video": video_sizes, "audio": audio_lengths}.items():
            if sizes is None:
                continue
            if len(names := self.config.modalities_of_kind(kind)) != 1:
                raise ValueError(f"Sizes of the kind {kind!r} need one encoder of that kind, the model has {names}.")
            each = [self._count_of_size(names[0], kind, i, size, options[names[0]]) for i, size in enumerate(sizes)]
            found[f"num_{kind}_tokens"] = [count for count, _ in each]
            if kind == "image":
                found["num_image_patches"] = [patches for _, patches in each]
        return MultiModalData(**found)
