"""Tensors in; a problem, or one precise error.

Every public function calls one function of this package first: `metadata`, `decode`, `prefill` or `mha`; doors of their
own call the single checks. Nothing here writes memory, and only `values.py` reads what a tensor holds.
"""

from __future__ import annotations

from flash_mla.contract.caches import (
    UNABSORBED,
    check_decode_dtypes,
    check_grouping,
    check_head_dims,
    check_seq_lens_shape,
    check_table,
    is_alias,
)
from flash_mla.contract.decode_call import decode, decode_problem
from flash_mla.contract.facts import rest_of
from flash_mla.contract.given import NO_DESCALES, DecodeCall, Descales, MhaCall, PrefillCall, inputs_of
from flash_mla.contract.masks import (
    check_decode_mask,
    check_mask_length,
    one_mask,
    settle_causal,
    sparse_blocks,
)
from flash_mla.contract.memory import OTHER_OUT, check_apart, check_out, check_out_again, refuse_learning_out
from flash_mla.contract.mla_metadata import MLAMetadata, check_metadata, check_shape, metadata
from flash_mla.contract.order import DEEPSEEK_NAMES, deepseek_order, refuse_deepseek_order
from flash_mla.contract.prefill_call import check_places_again, mha, prefill, prefill_problem
from flash_mla.contract.scales import check_descales, check_scale, check_sink, warn_default_scale
from flash_mla.contract.tensors import (
    check_dtypes,
    check_index,
    check_last_dim,
    check_monotonic,
    check_on,
    check_rank,
    check_tensor,
    is_aligned,
    named,
    out_dtype,
)
from flash_mla.contract.values import check_prefill_lengths, check_prompt_values, check_values

__all__ = [
    "DEEPSEEK_NAMES",
    "NO_DESCALES",
    "OTHER_OUT",
    "UNABSORBED",
    "DecodeCall",
    "Descales",
    "MLAMetadata",
    "MhaCall",
    "PrefillCall",
    "check_apart",
    "check_decode_dtypes",
    "check_decode_mask",
    "check_descales",
    "check_dtypes",
    "check_grouping",
    "check_head_dims",
    "check_index",
    "check_last_dim",
    "check_mask_length",
    "check_metadata",
    "check_monotonic",
    "check_on",
    "check_out",
    "check_out_again",
    "check_places_again",
    "check_prefill_lengths",
    "check_prompt_values",
    "check_rank",
    "check_scale",
    "check_seq_lens_shape",
    "check_shape",
    "check_sink",
    "check_table",
    "check_tensor",
    "check_values",
    "decode",
    "decode_problem",
    "deepseek_order",
    "inputs_of",
    "is_alias",
    "is_aligned",
    "metadata",
    "mha",
    "named",
    "one_mask",
    "out_dtype",
    "prefill",
    "prefill_problem",
    "refuse_deepseek_order",
    "refuse_learning_out",
    "rest_of",
    "settle_causal",
    "sparse_blocks",
    "warn_default_scale",
]
