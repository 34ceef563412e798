"""The backward of prefill on Hopper, first kernel: dK and dV, and dS for the second, `queries_kernel.py`.

With p = exp2(scale * log2(e) * q k - lse2), the rows' lse2, g (`shift`) and f (`left`, with a sink) from the Triton
backward's `prepare_kernel`:

    dV = (f p)^T dO      dS = p (f dO V^T - g)      dK = scale dS^T Q      dQ = scale dS K

Grid: one CTA a tile of 128 keys of a KV head, the first keys, which most queries see, first (`walk`); the CTAs of a few
heads run together, so that Q and dO come from L2. A CTA walks the 64-row tiles of queries that see its keys, of every
head of the group: nobody adds to what another CTA writes, and the bits are the same in every run.

Bound: FLOPs, of five products in the two kernels, 2 * P * S_kv * (3 D + 2 Dv) a head, half of that when causal. A tile
of 128 x 64 costs 2048 cycles at D = Dv = 128, in which exp2 takes 512, and shared memory gives wgmma 96 bytes a cycle
of 128. dS goes through global memory, 2 bytes a score, once each way: 2.1 GB for 32 heads of 8192 causal tokens. That
costs the second kernel 0.6 ms, where S and dP computed again would cost it two products.

Roles (168 registers at entry):
    consumer warpgroups 0, 1     64 keys each: S^T = K Q^T, dP^T = V dO^T, then dV += P^T dO and dK += dS^T Q with P and
                                 dS in registers; dS to the workspace; dK and dV   `keys_consumer.py`
    warp 0 of the last           TMA of K, V, Q, dO; the rows' numbers             `keys_producer.py`

Channels, producer -> consumers (full arrivals / empty arrivals):
    K, V   1 stage    1 + bytes / never freed
    Q      3 stages   1 + bytes, and 1 of the warp for lse2, g, f / consumer warps
    dout   3 stages   1 + bytes / consumer warps

Steady state of a consumer warpgroup: issue S^T and dP^T | P under dP^T | issue dV | dS under dV | issue dK | dS stored
under dK. The other warpgroup's products fill what is left.

dS of 128 keys and 64 queries is one piece of the workspace, 8 x 8 blocks, each of 8 keys with their 8 queries side by
side: a warp's registers are then whole blocks, stored 128 bytes at a time, and the piece is an operand of wgmma as it
lies.

Supports BF16 and FP16; D/Dv 128/128 and 192/128; any row and key counts; GQA; ragged lengths, 0 included; causal from
any start; sinks. Rows past a head's last gradient and keys past a request's length may hold NaN.

Measured: docs/design/backward.md.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from flash_mla.kernels.hopper import symbolic
from flash_mla.kernels.hopper.backward.config import REGISTERS, THREADS, TILE, TILE_N, TILE_Q, WARPS, Config
from flash_mla.kernels.hopper.backward.keys_consumer import Consumer
from flash_mla.kernels.hopper.backward.keys_producer import Producer
from flash_mla.kernels.hopper.backward.keys_shared import KeysShared
from flash_mla.kernels.hopper.backward.shared import Scalars, Tensors
from flash_mla.kernels.hopper.boxes import Tma, load_of
from flash_mla.kernels.hopper.channel import Channel, open_channels
from flash_mla.kernels.hopper.dtypes import DTYPES
from flash_mla.kernels.hopper.launch import Kernel, launch_ctas
from flash_mla.kernels.hopper.limits import CHUNK, STAGED
from flash_mla.kernels.hopper.memory import allocate


class Tmas(NamedTuple):
    """TMA of Q, K, V and dout."""

    q: Tma
    k: Tma
    v: Tma
    d_out: Tma


def rows_first(x: cute.Tensor) -> cute.Tensor:
    """[B, H, rows, columns] as [rows, columns, H, B]."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[2, 3, 1, 0]))


class Keys(Kernel[Config]):
    """dk and dv, a CTA a tile of keys; leaves dS in the workspace."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, Hq, P, D]
        k: cute.Tensor,  # [B, Hk, S_kv, D]
        v: cute.Tensor,  # [B, Hk, S_kv, Dv]
        d_out: cute.Tensor,  # [B, Hq, P, Dv]
        dk: cute.Tensor,  # [B, Hk, S_kv, D]
        dv: cute.Tensor,  # [B, Hk, S_kv, Dv]
        tensors: Tensors,
        scalars: Scalars,
        ctas: Int32,
        stream,
    ):
        tmas = Tmas(
            q=load_of(rows_first(q), TILE_Q, CHUNK),
            k=load_of(rows_first(k), TILE_N, CHUNK),
            v=load_of(rows_first(v), TILE_N, CHUNK),
            d_out=load_of(rows_first(d_out), TILE_Q, CHUNK),
        )
        launch_ctas(self.kernel(tmas, dk, dv, tensors, scalars), ctas, THREADS, self.config.keys_bytes(), stream)

    @cute.kernel
    def kernel(self, tmas: Tmas, dk: cute.Tensor, dv: cute.Tensor, tensors: Tensors, scalars: Scalars):
        config = self.config
        dtype, stages = DTYPES[config.dtype], config.sizes.query_stages

        @cute.struct
        class Storage:
            sK: cute.struct.Align[cute.struct.MemRange[dtype, TILE_N * config.D], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[dtype, TILE_N * config.Dv], 1024]
            sQ: cute.struct.Align[cute.struct.MemRange[dtype, stages * TILE_Q * config.D], 1024]
            sO: cute.struct.Align[cute.struct.MemRange[dtype, stages * TILE_Q * config.Dv], 1024]
            staged: cute.struct.Align[cute.struct.MemRange[dtype, WARPS * STAGED], 128]
            rows: cute.struct.Align[cute.struct.MemRange[Float32, stages * config.row_values * TILE_Q], 128]
            kv_barriers: cute.struct.MemRange[Int64, Channel.words(1)]
            q_barriers: cute.struct.MemRange[Int64, Channel.words(stages)]
            o_barriers: cute.struct.MemRange[Int64, Channel.words(stages)]

        shared = KeysShared.over(config, allocate(Storage, config, config.keys_bytes()))
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_id == 0:
            open_channels(shared.channels, tuple(tma.atom for tma in tmas))
        cute.arch.sync_threads()

        if warp_id >= WARPS:
            cute.arch.setmaxregister_decrease(REGISTERS[1])
            if warp_id == WARPS:
                Producer.over(shared, *tmas).run(tensors, scalars)
        else:
            cute.arch.setmaxregister_increase(REGISTERS[0])
            tid, _, _ = cute.arch.thread_idx()
            consumer = Consumer.over(shared, warp_id // 4, tid)
            consumer.run(tensors, scalars)
            consumer.write(dk, dv, scalars)
        for channel in shared.channels:
            channel.check()


def rows_of(config: Config, columns: int) -> cute.Tensor:
    """A symbolic [B, H, rows, columns] that TMA reads, or that is written 16 bytes at a time."""
    return symbolic.tensor(DTYPES[config.dtype], (None, None, None, columns), tma=range(3))


def shared_arguments() -> tuple[Tensors, Scalars]:
    """Symbolic arguments of both kernels."""

    def numbers() -> cute.Tensor:
        return symbolic.tensor(Float32, (None, None))

    def vector() -> cute.Tensor:
        return symbolic.tensor(Int32, (None,))

    ds = symbolic.tensor(Int32, (None, TILE // 2), tma=(0,))
    tensors = Tensors(numbers(), numbers(), numbers(), vector(), vector(), vector(), ds)
    scalars = Scalars(Float32(1.0), Float32(1.0), *(Int32(1) for _ in Scalars._fields[2:]))
    return tensors, scalars


def arguments(config: Config) -> tuple:
    """Symbolic arguments of `Keys.__call__`."""
    D, Dv = config.D, config.Dv
    return *(rows_of(config, columns) for columns in (D, D, Dv, Dv, D, Dv)), *shared_arguments(), Int32(1)


def build(config: Config, options: str = ""):
    """Compile the kernel."""
    return symbolic.compiled(Keys(config), arguments(config), options)
