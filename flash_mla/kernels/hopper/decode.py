"""The host's side of dense decode, the same for its kernels: arguments, the views that roles read, the two launches.

A kernel is an object with `config`, `kernel`, the device function, and

    loads(q, k, v) -> what `kernel` takes first: TMA descriptors and views of
        q [rows, D, Hk, B] and pages k [64, D, Hk, Nblk, requests], v [64, Dv, Hk, Nblk, requests], in global memory
    scalars(scale_log2, packing, has_sink, empty_lse, rows, tiles, heads) -> what it takes last; tiles of the rows of a
        KV head

with `Tensors` between them. A config says what is the kernel's: `latent`, whether K is all there is, of one KV head, V
its first columns; `descale`, whether there are descales; `rows`, query rows of a cluster; `token_major`, their order;
`q_unit`, elements of q in the 16 bytes of which TMA's strides are multiples; `piece`, the pairs of blocks that a
batch-invariant call cuts requests at (0: it is none); `masked`, whether there is a bool mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.combine import combine_partials
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import launch_persistent
from flash_mla.kernels.hopper.limits import BLOCK
from flash_mla.kernels.hopper.masks import Mask
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.partials import Partials, packed_rows, piece_slots


class Tensors(NamedTuple):
    """Global memory, all but q, k and v.

    table [B, table_blocks] and seq_lens [B] int32; sink [Hq] FP32; descales [B, Hk] FP32, or None; out
    [B, Hq * S_q, Dv]; lse [B, Hq * S_q] FP32, natural log; mask: None where keys are causal.
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    sink: cute.Tensor
    q_descale: cute.Tensor | None
    k_descale: cute.Tensor | None
    v_descale: cute.Tensor | None
    out: cute.Tensor
    lse: cute.Tensor
    partials: Partials
    mask: Mask | None


class Decode:
    """The launches of a kernel; `cute.compile` takes it with `arguments`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, S_q, D]
        k: cute.Tensor,  # [B, Hk, Nblk, 64, D]
        v: cute.Tensor,  # [B, Hk, Nblk, 64, Dv]; None of a latent cache
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: cute.Tensor,  # [Hq] FP32; anything if not has_sink
        q_descale: cute.Tensor,  # [B, Hk] FP32; None if not config.descale
        k_descale: cute.Tensor,
        v_descale: cute.Tensor,
        out: cute.Tensor,  # [B, Hq, S_q, Dv], contiguous; token-major: as [B, S_q, Hq, Dv]
        lse: cute.Tensor,  # [B, Hq, S_q] FP32, contiguous
        workspace: cute.Tensor,  # [config.workspace_words(clusters, ...)] FP32
        seen: cute.Tensor,  # [B, Hq, S_q, columns] uint8; None if not config.masked
        scale_log2: Float32,
        empty_lse: Float32,  # lse of a row without keys
        has_sink: Int32,
        q_row: Int64,  # elements between the packed query rows of a KV head
        tail: Int32,  # whether `seen` is over the S_q newest tokens alone
        k_requests: Int32,  # with pages of their own: B, or 1 where they share them
        v_requests: Int32,
        splits: Int32,  # whether a request may be split at all
        clusters: Int32,
        stream,
    ):
        config = self.kernel.config
        B, heads, S_q = q.shape[0], k.shape[1], q.shape[2]
        ratio = q.shape[1] // heads
        packing = Packing(S_q, ratio if const_expr(config.token_major) else None)
        rows, q_row = ratio * S_q, cute.assume(q_row, divby=config.q_unit)
        q_head = cute.assume(ratio * q.stride[1], divby=config.q_unit)
        layout = cute.make_layout((rows, config.D, heads, B), stride=(q_row, 1, q_head, q.stride[0]))
        packed_out, packed_lse = packed_rows(out, lse)
        tiles = (rows + (config.rows - 1)) // config.rows
        groups = tiles * heads
        tensors = Tensors(
            table=table,
            seq_lens=seq_lens,
            sink=sink,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            out=packed_out,
            lse=packed_lse,
            partials=Partials.over(
                workspace, clusters, config.rows, config.Dv, piece_slots(table, groups, config.piece)
            ),
            mask=Mask(seen, tail) if const_expr(config.masked) else None,
        )
        loads = self.kernel.loads(
            cute.make_tensor(q.iterator, layout),
            pages(k, k_requests),
            None if const_expr(config.latent) else pages(v, v_requests),
        )
        scalars = self.kernel.scalars(scale_log2, packing, has_sink, empty_lse, rows, tiles, heads)
        launch_persistent(self.kernel.kernel(*loads, tensors, scalars), config, clusters, stream)
        if splits != 0:
            combine_partials(tensors, has_sink, packing, Int32(heads), groups, empty_lse, stream, config.piece)


def pages(cache: cute.Tensor, requests) -> cute.Tensor:
    """A cache [B, Hk, Nblk, 64, width] as [64, width, Hk, Nblk, requests]."""
    request, head, block, row, _ = cache.stride
    shape = (BLOCK, cache.shape[4], cache.shape[1], cache.shape[2], requests)
    return cute.make_tensor(cache.iterator, cute.make_layout(shape, stride=(row, 1, head, block, request)))


def arguments(config: Any, q: str, cache: str, out: str) -> tuple:
    """Symbolic arguments of `Decode.__call__`; the dtypes by the names that configs use."""
    B, Hq, S_q = symbolic.size(), symbolic.size(), symbolic.size()
    Hk, blocks = 1 if config.latent else symbolic.size(), symbolic.size()

    def keys(width: int) -> cute.Tensor:
        # NOTE: with one KV head its stride may be any
        tma = (0, 2, 3) if config.latent else range(4)
        return symbolic.tensor(DTYPES[cache], (B, Hk, blocks, BLOCK, width), tma=tma)

    def factor() -> cute.Tensor | None:
        return symbolic.tensor(Float32, (B, Hk), strided=True) if config.descale else None

    return (
        symbolic.tensor(DTYPES[q], (B, Hq, S_q, config.D), tma=(0,)),
        keys(config.D),
        None if config.latent else keys(config.Dv),
        symbolic.tensor(Int32, (B, None)),
        symbolic.tensor(Int32, (B,)),
        symbolic.tensor(Float32, (None,)),
        factor(),
        factor(),
        factor(),
        symbolic.tensor(DTYPES[out], (B, Hq, S_q, config.Dv), align=16),
        symbolic.tensor(Float32, (B, Hq, S_q), strided=True),
        symbolic.tensor(Float32, (None,), align=16),
        symbolic.tensor(Uint8, (B, Hq, S_q, None), strided=True) if config.masked else None,
        *symbolic.numbers(Float32, Float32, Int32, Int64, Int32, Int32, Int32, Int32, Int32),
    )


def build(kernel: Any, q: str, cache: str, out: str, options: str) -> Any:
    """Compile a kernel and its combine."""
    return symbolic.compiled(Decode(kernel), arguments(kernel.config, q, cache, out), options)
