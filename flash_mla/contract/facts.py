"""What the checks of an attention call look at beside its tensors' facts: a key with these."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from flash_mla.contract.given import Given
from flash_mla.contract.scales import check_scale
from flash_mla.problem import FP8
from flash_mla.quant import needs_descale


def rest_of(call: Given, k: Tensor, v: Tensor, *others: Any) -> Hashable | None:
    """All that the checks of a call look at but for its tensors' facts, for values and for where tensors lie; None
    where they have to look themselves.

    Args:
        call: its softmax_scale is checked here, since its value counts.
        k, v: the caches, or keys and values: whether they are one.
        others: all that the call has beside tensors and softmax_scale.
    """
    scale_sign = check_scale(call.softmax_scale)
    try:
        k_start, v_start = k.data_ptr(), v.data_ptr()
    except AttributeError:  # something that should be a tensor
        return None
    if not k_start:  # without memory, addresses do not tell what is an alias
        return None
    marked = k.dtype is FP8 and (needs_descale(k), needs_descale(v))
    return type(call), k_start == v_start, marked, scale_sign, others
