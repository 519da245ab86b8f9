"""Training data: images and image-caption pairs from folders, lists, parquet, WebDataset shards and data sets."""

from .captions import CAPTION_LINES
from .collators import Stage1Collator, Stage2Collator, readable_items
from .lists import ListDataset
from .loading import describe_sources, load_images, load_pairs, parse_sources
from .mixture import EpochSampler, TrainingDataset
from .shards import TarSource
from .source import Source
from .streaming import StreamCollator, StreamingDataset, StreamSource
from .tables import ColumnDataset, ParquetSource

__all__ = [
    "CAPTION_LINES",
    "ColumnDataset",
    "EpochSampler",
    "ListDataset",
    "ParquetSource",
    "Source",
    "Stage1Collator",
    "Stage2Collator",
    "StreamCollator",
    "StreamSource",
    "StreamingDataset",
    "TarSource",
    "TrainingDataset",
    "describe_sources",
    "load_images",
    "load_pairs",
    "parse_sources",
    "readable_items",
]
