"""What the roles of a prefill CTA share: the global tensors, the views of shared memory, a tile to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from flash_mla.kernels.hopper.boxes import row_layout
from flash_mla.kernels.hopper.channel import Channel
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.prefill.config import TASK, TASK_STAGES, TRANSPOSERS, Config


class Tensors(NamedTuple):
    """Global memory, all but q, k and v, which only TMA touches, and out.

    table [B, table_blocks], seq_lens [B] and start_pos [B] int32; sink [Hq] FP32; score_scale and value_scale [B, Hk]
    FP32: factors of Q K^T and of V; lse [B * Hq, P] FP32, natural log; counter [1] int32, zero before the launch: tiles
    handed out beyond the first of each CTA, or team where blocks are listed. Read there alone: block_map [B or 1, Hq or
    1, ceil(P / 64), ceil(S_kv / 64)] uint8: 0 skip the block, 1 take it, 2 take it with mask_bits [B or 1, Hq or 1, P,
    2 * ceil(S_kv / 64)] int32, a bit a key.
    """

    table: cute.Tensor
    seq_lens: cute.Tensor
    start_pos: cute.Tensor
    sink: cute.Tensor
    score_scale: cute.Tensor
    value_scale: cute.Tensor
    lse: cute.Tensor
    counter: cute.Tensor
    block_map: cute.Tensor
    mask_bits: cute.Tensor


class Scalars(NamedTuple):
    """scale * log2(e); dims; the order of tiles (`schedule.Order`); 0 or 1: is it causal, and which inputs count."""

    scale_log2: Float32
    Hq: Int32
    Hk: Int32
    S_kv: Int32
    section: Int32
    late: Int32
    tail: Int32
    causal: Int32
    has_lens: Int32
    has_start: Int32
    has_sink: Int32
    has_descale: Int32


@dataclass(frozen=True)
class Shared:
    """Views of a CTA's shared memory (frozen, like every group of trace-time objects: branches may then use it).

    sQ [TILE_M, D, q_stages]; sO [TILE_M, Dv, q_stages], over it; sK [TILE_N, D, stages]; sV [TILE_N, Dv, v_stages];
    staged: STAGED elements of out for each consumer warp, where out does not go over Q. sVt [Dv, TILE_N, stages]: V in
    FP8, transposed, the keys in the order of `transposer.py`, and zeros: of a piece of its columns.
    """

    config: Config
    sQ: cute.Tensor
    sO: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sVt: cute.Tensor | None
    zeros: cute.Pointer
    staged: cute.Pointer
    sTask: cute.Tensor
    sNumbers: cute.Pointer
    numbers: Channel
    tasks: Channel
    q: Channel
    k: Channel
    v: Channel
    turned: Channel
    out: Channel

    @staticmethod
    def over(config: Config, storage) -> Shared:
        dtype, warps, cluster = DTYPES[config.dtype], 4 * config.consumers, config.cluster
        readers = warps * cluster

        def rows(memory, count: int, columns: int, stages: int) -> cute.Tensor:
            layout = row_layout(dtype, count, columns, stages, config.row_bytes(columns))
            return memory.get_tensor(layout.outer, swizzle=layout.inner)

        def channel(name: str, barriers, stages: int, **counts: int) -> Channel:
            return Channel.over(name, barriers.data_ptr(), stages, **counts)

        sQ = rows(storage.sQ, config.tile_m, config.D, config.q_stages)
        # NOTE: chunk after chunk, so that a warpgroup's rows of out lie where its own rows of Q lay
        stages = cute.make_layout(config.q_stages, stride=config.tile_m * config.D)
        out_rows = row_layout(dtype, config.tile_m, config.Dv, row_bytes=config.row_bytes(config.Dv))
        sO = cute.make_tensor(sQ.iterator, cute.append(out_rows.outer, stages))
        return Shared(
            config=config,
            sQ=sQ,
            sO=sO,
            sK=rows(storage.sK, config.tile_n, config.D, config.stages),
            sV=rows(storage.sV, config.tile_n, config.Dv, config.v_stages),
            sVt=rows(storage.sVt, config.Dv, config.tile_n, config.stages) if config.fp8 else None,
            zeros=storage.zeros.data_ptr(),
            staged=storage.staged.data_ptr(),
            sTask=storage.sTask.get_tensor(cute.make_layout((TASK, TASK_STAGES))),
            sNumbers=storage.sNumbers.data_ptr(),
            numbers=channel("numbers", storage.number_barriers, config.number_stages, readers=0),
            tasks=channel("tasks", storage.task_barriers, TASK_STAGES, readers=warps + config.helpers),
            q=channel("Q", storage.q_barriers, config.q_stages, readers=warps if config.staged else 1),
            k=channel("K", storage.k_barriers, config.stages, readers=readers, cluster=cluster),
            v=channel("V", storage.v_barriers, config.v_stages, readers=config.transposers or readers, cluster=cluster),
            turned=channel(
                "V transposed", storage.turned_barriers, config.turned_stages, writers=TRANSPOSERS, readers=warps
            ),
            # refilling Q empties it
            out=channel("out", storage.out_barriers, config.q_stages, writers=warps, readers=0),
        )

    @property
    def channels(self) -> tuple[Channel, ...]:
        all_configs = (self.numbers, self.tasks, self.q, self.k, self.v, self.turned)
        return all_configs if self.config.staged else (*all_configs, self.out)

    @property
    def values(self) -> Channel:
        """V as the consumers take it."""
        return self.turned if self.config.fp8 else self.v


class Task(NamedTuple):
    """A tile to compute: its first row, head (request * Hq + head), request and KV head; the request's keys, and the
    position of its first query.

    blocks: key blocks to compute; 0 marks the end, there is no tile then. whole: how many of them, at the beginning,
    need no mask. more: blocks behind them that come for the other tile of the cluster.
    """

    row0: Int32
    head: Int32
    request: Int32
    kv_head: Int32
    length: Int32
    start: Int32
    blocks: Int32
    whole: Int32
    more: Int32


@cute.jit
def receive(shared: Shared, count) -> Task:
    """Wait for the description of the CTA's tile number `count`."""
    stage = count % TASK_STAGES
    shared.tasks.wait(stage, count // TASK_STAGES)
    words = [shared.sTask[i, stage] for i in range(len(Task._fields))]
    cute.arch.sync_warp()
    shared.tasks.release(stage)
    return Task(*words)
