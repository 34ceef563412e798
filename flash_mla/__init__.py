"""Attention kernels for multi-head latent attention and grouped-query attention over paged KV caches."""

from flash_mla import ops as ops  # its custom ops must exist before a graph is traced
from flash_mla.api import MLAMetadata, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata, mha_fwd_kvcache
from flash_mla.cache import PagedKVCache
from flash_mla.errors import (
    BlockCountError,
    BlockTableError,
    CacheFullError,
    DeviceError,
    DTypeError,
    FlashMLAError,
    GradientError,
    HeadGroupingError,
    LayoutError,
    MaskShapeError,
    ModelError,
    RankError,
    ScaleWarning,
    SequenceLengthError,
    ShapeError,
)
from flash_mla.explanation import Explanation, explain
from flash_mla.layout import BlockSparseLayout
from flash_mla.pages import decode_over_pages
from flash_mla.version import __version__ as __version__

__all__ = [
    "BlockCountError",
    "BlockSparseLayout",
    "BlockTableError",
    "CacheFullError",
    "DTypeError",
    "DeviceError",
    "Explanation",
    "FlashMLAError",
    "GradientError",
    "HeadGroupingError",
    "LayoutError",
    "MLAMetadata",
    "MaskShapeError",
    "ModelError",
    "PagedKVCache",
    "RankError",
    "ScaleWarning",
    "SequenceLengthError",
    "ShapeError",
    "decode_over_pages",
    "explain",
    "flash_mla_prefill",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "mha_fwd_kvcache",
]
