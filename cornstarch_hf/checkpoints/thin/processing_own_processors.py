"""Processors of the package for items of other kinds, of which this checkpoint has none."""

from transformers import FeatureExtractionMixin


class ItemProcessor(FeatureExtractionMixin):
    """Base of these processors."""


ITEM_PROCESSORS: dict[str, type[ItemProcessor]] = {}
