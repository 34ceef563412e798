"""Merge: parts of a decode, as ranks exchanged them, to `kernels/triton/merge.py`."""

from __future__ import annotations

from torch import Tensor

from flash_mla.backends.triton.device import device_of
from flash_mla.kernels.triton import merge


def launch(outs: Tensor, lses: Tensor, attn_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S_q, Dv] of outs' dtype and lse [B, Hq, S_q].

    Args:
        outs: [n, B, Hq, S_q, Dv]; lses: [n, B, Hq, S_q] FP32. The rows of a part lie evenly in memory.
    """
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    if lse.numel():
        flat = outs.flatten(1, 3), lses.flatten(1, 3)
        with device_of(outs.device):
            merge.merge_kernel[lse.numel(), 1, 1](**merge.arguments(*flat, attn_sink, out, lse))
    return out, lse
