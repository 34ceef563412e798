"""Merge: attention over parts of the keys, put together (merge.py is the spec), as ranks exchanged them.

    out = sum_i exp(lse_i - max) out_i / sum_i exp(lse_i - max)      lse = max + log(sum_i exp(lse_i - max))

in the order of the parts, so that all ranks hold the same bits. Grid: rows. Bound: bytes of the parts; for two parts of
1024 rows of 512 BF16 these are 2 MB, less than the launch takes, which is why it is one kernel and not twenty of torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.attend import LN2, sink_factor
from flash_mla.kernels.triton.tiles import power_of_2


@triton.jit
def merge_kernel(
    outs_ptr,  # [PARTS, rows, DV], last dim contiguous
    lses_ptr,  # [PARTS, rows] FP32
    sink_ptr,  # [Hq]
    out_ptr,  # [rows, DV] contiguous; rows are [B, Hq, S_q]
    lse_ptr,  # [rows] contiguous
    Hq,
    S_q,
    stride_on, stride_or,
    stride_ln, stride_lr,
    PARTS: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DV_TILE)
    row_max = float("-inf")
    for i in tl.static_range(PARTS):
        row_max = tl.maximum(row_max, tl.load(lses_ptr + i * stride_ln + row * stride_lr))
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = 0.0
    acc = tl.zeros([DV_TILE], tl.float32)
    for i in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lses_ptr + i * stride_ln + row * stride_lr) - shift)
        part = tl.load(outs_ptr + i * stride_on + row * stride_or + columns, mask=columns < DV, other=0.0)
        row_sum += weight
        acc += weight * part.to(tl.float32)
    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), shift + tl.log(tl.where(empty, 1.0, row_sum)))
    if sink_ptr is not None:
        out *= sink_factor(lse / LN2, tl.load(sink_ptr + row // S_q % Hq))
    tl.store(out_ptr + row * DV + columns, out.to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + row, lse)


# --- Launch ---


def arguments(
    outs: Tensor, lses: Tensor, attn_sink: Tensor | None, out: Tensor, lse: Tensor
) -> dict[str, Tensor | int | None]:
    """merge_kernel's arguments: outs [n, rows, Dv] and lses [n, rows], strided; out [B, Hq, S_q, Dv]."""
    _, Hq, S_q, Dv = out.shape
    return dict(
        outs_ptr=outs,
        lses_ptr=lses,
        sink_ptr=attn_sink,
        out_ptr=out,
        lse_ptr=lse,
        Hq=Hq,
        S_q=S_q,
        stride_on=outs.stride(0),
        stride_or=outs.stride(1),
        stride_ln=lses.stride(0),
        stride_lr=lses.stride(1),
        PARTS=len(outs),
        DV=Dv,
        DV_TILE=power_of_2(Dv),
    )
