"""Append: copy new rows of K and V into their cache pages; row i of request b goes to position start_pos[b] + i.

Grid: (tiles of tokens * Hk * B). Bound: bytes, each row read once and written once.

NOTE: a row is dropped, not clamped, where its position lies past the table or its block id outside the cache: a write
to any other place would destroy another request's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_mla.kernels.triton.share import BLOCK
from flash_mla.kernels.triton.strides import strides
from flash_mla.kernels.triton.tiles import power_of_2

TILE_T = 16
"""Tokens a program: 16 rows of 128 BF16 are 4 KiB, one 16-byte access for each of two warps' threads, four times."""


@triton.jit
def append_kernel(
    k_ptr,  # [B, Hk, P, D]
    v_ptr,  # [B, Hk, P, Dv]; None where the cache is latent and has no V
    k_cache_ptr,  # [B, Hk, Nblk, 64, D]
    v_cache_ptr,  # [B, Hk, Nblk, 64, Dv]
    table_ptr,  # [B, table_blocks]
    start_pos_ptr,  # [B]
    num_tokens_ptr,  # [B]
    P,
    Hk,
    Nblk,
    table_blocks,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_kcb, stride_kch, stride_kcn, stride_kct,
    stride_vcb, stride_vch, stride_vcn, stride_vct,
    stride_tb,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE_T: tl.constexpr,
    D_TILE: tl.constexpr,
    DV_TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P, TILE_T)
    token = tl.program_id(0) % tiles * TILE_T + tl.arange(0, TILE_T)  # [TILE_T]
    kv_head = (tl.program_id(0) // tiles % Hk).to(tl.int64)
    b = (tl.program_id(0) // tiles // Hk).to(tl.int64)
    position = token.to(tl.int64)
    if start_pos_ptr is not None:
        position += tl.load(start_pos_ptr + b)
    live = (token < P) & (position >= 0) & (position < table_blocks * BLOCK)
    if num_tokens_ptr is not None:
        live = live & (token < tl.load(num_tokens_ptr + b))
    block = tl.load(table_ptr + b * stride_tb + position // BLOCK, mask=live, other=-1).to(tl.int64)
    live = live & (block >= 0) & (block < Nblk)
    slot = position % BLOCK

    columns = tl.arange(0, D_TILE)
    inside = live[:, None] & (columns < D)[None, :]
    row = k_ptr + (b * stride_kb + kv_head * stride_kh) + token.to(tl.int64) * stride_ks
    k = tl.load(row[:, None] + columns[None, :] * stride_kd, mask=inside)
    cached = k_cache_ptr + (b * stride_kcb + kv_head * stride_kch) + block * stride_kcn + slot * stride_kct
    tl.store(cached[:, None] + columns[None, :], k, mask=inside)

    if v_ptr is not None:
        columns_v = tl.arange(0, DV_TILE)
        inside_v = live[:, None] & (columns_v < DV)[None, :]
        row_v = v_ptr + (b * stride_vb + kv_head * stride_vh) + token.to(tl.int64) * stride_vs
        v = tl.load(row_v[:, None] + columns_v[None, :] * stride_vd, mask=inside_v)
        cached_v = v_cache_ptr + (b * stride_vcb + kv_head * stride_vch) + block * stride_vcn + slot * stride_vct
        tl.store(cached_v[:, None] + columns_v[None, :], v, mask=inside_v)


# --- Launch ---


def grid(B: int, Hk: int, P: int) -> tuple[int, int, int]:
    """(tiles of tokens * Hk * B, 1, 1): no other dim of a grid reaches beyond 65535."""
    return -(-P // TILE_T) * Hk * B, 1, 1


def constants(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, block_table: Tensor
) -> dict[str, int | bool | str]:
    """append_kernel's arguments after its tensors."""
    D = k.shape[3]
    Dv = 0 if v is None else v.shape[3]
    return dict(
        P=k.shape[2],
        Hk=k.shape[1],
        Nblk=k_cache.shape[2],
        table_blocks=block_table.shape[1],
        **strides("k", "bhsd", k),
        **strides("v", "bhsd", v),
        **strides("kc", "bhnt", k_cache),
        **strides("vc", "bhnt", v_cache),
        **strides("t", "b", block_table),
        D=D,
        DV=Dv,
        TILE_T=TILE_T,
        D_TILE=power_of_2(D),
        DV_TILE=power_of_2(max(Dv, 1)),
    )
