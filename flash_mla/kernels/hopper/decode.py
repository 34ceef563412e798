"""The host's side of dense decode, the same for its kernels: arguments, the views that roles read, the two launches.

A kernel is an object with `config`, `kernel`, the device function, and

    loads(q, k, v) -> what `kernel` takes first: TMA descriptors and views of
        q [rows, D, Hk, B] and pages k [64, D, Hk, Nblk, requests], v [64, Dv, Hk, Nblk, requests], in global memory
    scalars(scale_log2, packing, has_sink, empty_lse, rows, tiles, heads) -> what it takes last; tiles of the rows of a
        KV head

with `Tensors` between them. A config says what is the kernel's: `latent`, whether K is all there is, of one KV head, V
its first columns; `descale`, whether there are descales; `rows`, query rows of a cluster; `token_major`, their order;
`piece`, the pairs of blocks that a batch-invariant call cuts requests at (0: it is none); `masked`, whether there is a
bool mask; `team`, whether a cluster merges an item of up to `reach` pairs of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.combine import combine_partials
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import launch_persistent
from flash_mla.kernels.hopper.limits import BLOCK, TMA_BYTES
from flash_mla.kernels.hopper.masks import Mask
from flash_mla.kernels.hopper.packing import Packing
from flash_mla.kernels.hopper.partials import Partials, piece_slots


class Tensors(NamedTuple):
    """Global memory, all but q, k and v.

    table [B, table_blocks] and seq_lens [B] int32; sink [Hq] FP32; descales [B, Hk] FP32, or None; out
    [B, Hq * S_q, Dv]; lse [B, Hq * S_q] FP32, natural log; counters: of teams; mask: None where keys are causal.
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
    counters: cute.Tensor
    mask: Mask | None


class Decode:
    """The launches of a kernel, `cute.compile` takes it with `arguments`; q, cache and out: dtypes by the names that
    configs use.

    What a call only has to point at goes in as an address, so that the host makes no view of it: its shape and strides
    are of the call's problem.
    """

    def __init__(self, kernel: Any, q: str, cache: str, out: str) -> None:
        self.kernel = kernel
        self.q, self.cache, self.out = DTYPES[q], DTYPES[cache], DTYPES[out]

    @cute.jit
    def __call__(
        self,
        q: Int64,  # of [B, Hq, S_q, D]
        k: Int64,  # of [B, Hk, Nblk, 64, D]
        v: Int64,  # of [B, Hk, Nblk, 64, Dv]; anything of a latent cache
        out: Int64,  # of [B, Hq, S_q, Dv], contiguous; token-major: as [B, S_q, Hq, Dv]
        lse: Int64,  # of [B, Hq, S_q] FP32, contiguous
        table: cute.Tensor,  # [B, table_blocks] int32
        seq_lens: cute.Tensor,  # [B] int32
        sink: Int64,  # of [Hq] FP32; anything if not has_sink
        q_descale: cute.Tensor,  # [B, Hk] FP32; None if not config.descale
        k_descale: cute.Tensor,
        v_descale: cute.Tensor,
        workspace: Int64,  # of [config.workspace_words(clusters, ...)] FP32
        counters: Int64,  # of [CTAs] int32, 0, and 0 again behind the call; anything if not config.team
        seen: cute.Tensor,  # [B, Hq, S_q, columns] uint8; None if not config.masked
        scale_log2: Float32,
        empty_lse: Float32,  # lse of a row without keys
        has_sink: Int32,
        ratio: Int32,  # Hq / Hk
        Hk: Int32,
        S_q: Int32,
        Nblk: Int32,
        q_request: Int64,  # elements between requests of q
        q_head: Int64,  # between KV heads
        q_row: Int64,  # between the packed rows of one
        k_request: Int64,  # elements between requests, heads, blocks, rows
        k_head: Int64,
        k_block: Int64,
        k_row: Int64,
        v_request: Int64,
        v_head: Int64,
        v_block: Int64,
        v_row: Int64,
        tail: Int32,  # whether `seen` is over the S_q newest tokens alone
        k_requests: Int32,  # with pages of their own: B, or 1 where they share them
        v_requests: Int32,
        splits: Int32,  # whether a request may be split at all
        clusters: Int32,
        stream,
    ):
        config = self.kernel.config
        B, heads = seq_lens.shape[0], 1 if const_expr(config.latent) else Hk
        packing = Packing(S_q, ratio if const_expr(config.token_major) else None)
        rows = ratio * S_q
        q_steps = evenly(self.q, q_row, q_head, q_request)
        # NOTE: with one KV head its stride may be any
        k_steps, v_steps = evenly(self.cache, k_row, k_block, k_request), evenly(self.cache, v_row, v_block, v_request)
        k_head, v_head = (k_head, v_head) if const_expr(config.latent) else evenly(self.cache, k_head, v_head)
        outs = cute.assume(Int64(heads) * rows * config.Dv, divby=config.Dv)
        tiles = (rows + (config.rows - 1)) // config.rows
        groups = tiles * heads
        tensors = Tensors(
            table=table,
            seq_lens=seq_lens,
            sink=tensor_at(sink, Float32, (Hk * ratio,), (1,), 4),
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            out=tensor_at(out, self.out, (B, heads * rows, config.Dv), (outs, config.Dv, 1)),
            lse=tensor_at(lse, Float32, (B, heads * rows), (heads * rows, 1), 4),
            partials=Partials.over(
                pointer_to(workspace, Float32),
                clusters,
                config.rows,
                config.Dv,
                piece_slots(table, groups, config.piece),
            ),
            counters=tensor_at(counters, Int32, (clusters * config.cluster,), (1,), 4),
            mask=Mask(seen, tail) if const_expr(config.masked) else None,
        )
        loads = self.kernel.loads(
            tensor_at(q, self.q, (rows, config.D, heads, B), (q_steps[0], 1, q_steps[1], q_steps[2])),
            pages(k, self.cache, (config.D, heads, Nblk, k_requests), k_head, k_steps),
            None
            if const_expr(config.latent)
            else pages(v, self.cache, (config.Dv, heads, Nblk, v_requests), v_head, v_steps),
        )
        scalars = self.kernel.scalars(scale_log2, packing, has_sink, empty_lse, rows, tiles, heads)
        launch_persistent(self.kernel.kernel(*loads, tensors, scalars), config, clusters, stream)
        if splits != 0:
            combine_partials(tensors, has_sink, packing, Int32(heads), groups, empty_lse, stream, config.piece)


def evenly(dtype, *strides) -> tuple:
    """Strides that are multiples of TMA's 16 bytes."""
    return tuple(cute.assume(stride, divby=8 * TMA_BYTES // dtype.width) for stride in strides)


def tensor_at(address, dtype, shape, strides, align: int = TMA_BYTES) -> cute.Tensor:
    """The tensor that begins there in global memory."""
    return cute.make_tensor(pointer_to(address, dtype, align), cute.make_layout(shape, stride=strides))


def pointer_to(address, dtype, align: int = TMA_BYTES) -> cute.Pointer:
    """The pointer to an address in global memory."""
    return cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


def pages(address, dtype, sizes, head, steps) -> cute.Tensor:
    """A cache [64, *sizes], sizes (width, Hk, Nblk, requests). head, steps (row, block, request): strides."""
    row, block, request = steps
    return tensor_at(address, dtype, (BLOCK, *sizes), (row, 1, head, block, request))


def arguments(config: Any) -> tuple:
    """Symbolic arguments of `Decode.__call__`."""
    B = symbolic.size()

    def factor() -> cute.Tensor | None:
        return symbolic.tensor(Float32, (B, None), strided=True) if config.descale else None

    return (
        *symbolic.numbers(Int64, Int64, Int64, Int64, Int64),
        symbolic.tensor(Int32, (B, None)),
        symbolic.tensor(Int32, (B,)),
        *symbolic.numbers(Int64),
        factor(),
        factor(),
        factor(),
        *symbolic.numbers(Int64, Int64),
        symbolic.tensor(Uint8, (B, None, None, None), strided=True) if config.masked else None,
        *symbolic.numbers(Float32, Float32, *[Int32] * 5, *[Int64] * 11, *[Int32] * 5),
    )


def build(kernel: Any, q: str, cache: str, out: str, options: str) -> Any:
    """Compile a kernel and its combine; the dtypes by the names that configs use."""
    return symbolic.compiled(Decode(kernel, q, cache, out), arguments(kernel.config), options)
