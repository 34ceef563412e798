"""dK and dV on Hopper, and dS for `queries_kernel.py`."""

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
from flash_mla.kernels.hopper.limits import CHUNK, STAGED, smem_bytes
import cutlass.utils as utils


class Tmas(NamedTuple):
    """TMA of Q, K, V and dout."""

    q: Tma
    k: Tma
    v: Tma
    d_out: Tma


def rows_first(x: cute.Tensor) -> cute.Tensor:
    """[B, H, rows, columns] as [rows, columns, H, B]."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[2, 3, 1, 0]))


class Keys:
    """The kernel for one Config; `cute.compile` takes it with the arguments of `__call__`."""

    def __init__(self, config: Config) -> None:
        self.config = config

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
        self.kernel(tmas, dk, dv, tensors, scalars).launch(
            grid=(ctas, 1, 1),
            block=(THREADS, 1, 1),
            smem=self.config.keys_bytes(),
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
            stream=stream,
        )

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

        assert smem_bytes(Storage.size_in_bytes()) == config.keys_bytes(), (Storage.size_in_bytes(), config.keys_bytes())
        shared = KeysShared.over(config, utils.SmemAllocator().allocate(Storage))
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
