"""Calls of the library's own functions, and the list of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_mla.layout import BlockSparseLayout
from flash_mla.problem import BLOCK, FP8
from flash_mla.testing.hostile import (
    CacheLayout,
    Call,
    Descale,
    MaskShape,
    Order,
    Source,
    Sparse,
    block_table,
    fill,
    make_mask,
    nan_cache,
    nan_filled,
)


@dataclass(frozen=True)
class DecodeCase:
    """A call of flash_mla_with_kvcache. lengths: seq_lens in tokens, one a request; the others as in the contract."""

    name: str
    lengths: tuple[int, ...]
    Hq: int = 4
    Hk: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    S_q: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    """Of the caches; None: dtype, as q."""
    layout: CacheLayout = "slab"
    order: Order = "shuffled"
    alias: bool = False
    mask: MaskShape | None = None
    tail: MaskShape | None = None
    """Of a tail_mask, in place of mask."""
    sink: bool = False
    descale: Descale | None = None
    spare: int = 1
    shared: int = 0
    index_dtype: torch.dtype = torch.int32
    softmax_scale: float | None = None
    batch_invariant: bool = False
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "flash_mla_with_kvcache"

    @property
    def budget(self) -> torch.dtype:
        """The dtype whose error budget holds: the coarser one's."""
        return self.kv_dtype or self.dtype

    def call(self) -> Call:
        """The tensors; `reference` is the same dict, as decode_reference takes the same names."""
        source = Source(self.seed, self.device)
        B, Dv, kv_dtype = len(self.lengths), self.Dv or self.D, self.kv_dtype or self.dtype
        table, Nblk = block_table(self.lengths, self.layout, self.order, self.spare, self.shared, source)
        k_cache = nan_cache(self.layout, B, self.Hk, Nblk, self.D, kv_dtype, self.device)
        v_cache = (
            k_cache[..., :Dv] if self.alias else nan_cache(self.layout, B, self.Hk, Nblk, Dv, kv_dtype, self.device)
        )
        for b, length in enumerate(self.lengths):
            fill(k_cache, table, b, source.normal((self.Hk, length, self.D), kv_dtype))
            if not self.alias:
                fill(v_cache, table, b, source.normal((self.Hk, length, Dv), kv_dtype))
        L = max(self.lengths, default=0) + 3
        tail = make_mask(self.tail, (self.S_q,) * B, self.Hq, self.S_q, self.S_q, source)
        mask_rows = 1 if self.mask in ("bool", "float") else self.S_q
        arguments = {
            "q": source.normal((B, self.Hq, self.S_q, self.D), self.dtype),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": table.to(self.index_dtype).to(self.device),
            "seq_lens": torch.tensor(self.lengths, dtype=self.index_dtype, device=self.device),
            "mask": make_mask(self.mask, self.lengths, self.Hq, mask_rows, L, source),
            "tail_mask": tail,
            "softmax_scale": self.softmax_scale,
            "q_descale": source.descale(self.descale, B, self.Hk),
            "k_descale": source.descale(self.descale, B, self.Hk),
            "v_descale": source.descale(self.descale, B, self.Hk),
            "attn_sink": source.normal((self.Hq,), torch.float32) if self.sink else None,
        }
        return Call({**arguments, "batch_invariant": True} if self.batch_invariant else arguments, arguments)


@dataclass(frozen=True)
class PrefillCase:
    """A call of flash_mla_prefill. lengths: keys a request, NaN past them; None: P everywhere, no seq_lens given."""

    name: str
    P: int
    B: int = 2
    lengths: tuple[int, ...] | None = None
    Hq: int = 4
    Hk: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    dtype: torch.dtype = torch.bfloat16
    sliced: bool = False
    """q, k and v are monotonic slices of larger tensors."""
    causal: bool | None = None
    mask: MaskShape | None = None
    sparse: Sparse | None = None
    sink: bool = False
    descale: Descale | None = None
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "flash_mla_prefill"

    def rows(self, source: Source, heads: int, width: int) -> Tensor:
        """[B, heads, P, width], dense or a slice."""
        values = source.normal((self.B, heads, self.P, width), self.dtype)
        if not self.sliced:
            return values
        view = nan_filled((self.B, heads + 1, self.P + 3, width + 8), self.dtype, self.device)
        view = view[:, 1:, 2:-1, :width]
        return view.copy_(values)

    def call(self) -> Call:
        """The tensors; the reference takes the blocks as a bool tensor and causal settled."""
        source = Source(self.seed, self.device)
        Dv = self.Dv or self.D
        q, k, v = (self.rows(source, *x) for x in ((self.Hq, self.D), (self.Hk, self.D), (self.Hk, Dv)))
        keys = (self.P,) * self.B if self.lengths is None else self.lengths
        for b, length in enumerate(keys):
            for rows in (k, v):
                rows[b, :, length:].copy_(nan_filled((1,), self.dtype, self.device))
        sparse, blocks = self.block_mask(source)
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "attn_mask": make_mask(self.mask, keys, self.Hq, self.P, self.P, source),
            "softmax_scale": self.softmax_scale,
            "seq_lens": None
            if self.lengths is None
            else torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            "q_descale": source.descale(self.descale, self.B, self.Hk),
            "k_descale": source.descale(self.descale, self.B, self.Hk),
            "v_descale": source.descale(self.descale, self.B, self.Hk),
            "attn_sink": source.normal((self.Hq,), torch.float32) if self.sink else None,
        }
        causal = self.mask is None if self.causal is None else self.causal
        return Call(
            {**arguments, "sparse_layout": sparse, "causal": self.causal},
            {**arguments, "block_mask": blocks, "causal": causal},
        )

    def block_mask(self, source: Source) -> tuple[Any, Tensor | None]:
        """(sparse_layout, the same as a bool tensor); its first block row is empty where it is random."""
        n = -(-self.P // BLOCK)
        if self.sparse is None:
            return None, None
        if self.sparse == "layout":
            layout = BlockSparseLayout.local_global(self.P, BLOCK + 7, 5, device=self.device)
            return layout, layout.blocks
        if self.sparse == "block-mask":
            # imported here: FlexAttention loads inductor's front, a second that nobody else should pay
            from torch.nn.attention.flex_attention import create_block_mask

            window = create_block_mask(
                lambda b, h, i, j: (i - j).abs() <= 100, None, None, self.P, self.P, self.device, 2 * BLOCK
            )
            coarse = window.to_dense().bool()
            fine = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)
            return window, fine[..., :n, :n]
        blocks = source.chance((self.B, self.Hq, n, n) if self.sparse == "heads" else (1, 1, n, n), 0.5)
        blocks[:, :, :1] = False
        return blocks, blocks


@dataclass(frozen=True)
class MhaCase:
    """A call of mha_fwd_kvcache. starts: start_pos, one a request; None: 0 everywhere, no start_pos given."""

    name: str
    P: int
    B: int = 2
    starts: tuple[int, ...] | None = None
    H: int = 2
    D: int = 64
    Dv: int | None = None
    """None: D."""
    dtype: torch.dtype = torch.bfloat16
    layout: CacheLayout = "slab"
    order: Order = "shuffled"
    alias: bool = False
    write: bool = True
    """Pass k and v; False: the cache already holds the prompt."""
    causal: bool | None = None
    mask: MaskShape | None = None
    descale: Descale | None = None
    spare: int = 1
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "mha_fwd_kvcache"

    def call(self) -> Call:
        """The tensors; `reference` has caches that hold the whole prompt, and nothing else but NaN."""
        source = Source(self.seed, self.device)
        starts, Dv = self.starts or (0,) * self.B, self.Dv or self.D
        ends = tuple(start + self.P for start in starts)
        table, Nblk = block_table(ends, self.layout, self.order, self.spare, 0, source)
        caches, full_caches, new_rows = [], [], []
        for width in (self.D,) if self.alias else (self.D, Dv):
            cache, full = (
                nan_cache(self.layout, self.B, self.H, Nblk, width, self.dtype, self.device) for _ in range(2)
            )
            rows = source.normal((self.B, self.H, max(ends, default=0), width), self.dtype)
            for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
                fill(full, table, b, rows[b, :, :end])
                fill(cache, table, b, rows[b, :, : start if self.write else end])
            caches.append(cache)
            full_caches.append(full)
            chunks = nan_filled((self.B, self.H, self.P, width), self.dtype, self.device)
            for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
                chunks[b].copy_(rows[b, :, start:end])
            new_rows.append(chunks)
        if self.alias:
            caches.append(caches[0][..., :Dv])
            full_caches.append(full_caches[0][..., :Dv])
        arguments = {
            "q": source.normal((self.B, self.H, self.P, self.D), self.dtype),
            "block_table": table.to(self.device),
            "attn_mask": make_mask(self.mask, ends, self.H, self.P, max(ends, default=0), source),
            "start_pos": None
            if self.starts is None
            else torch.tensor(self.starts, dtype=torch.int32, device=self.device),
            "softmax_scale": self.softmax_scale,
            "q_descale": source.descale(self.descale, self.B, self.H),
            "k_descale": source.descale(self.descale, self.B, self.H),
            "v_descale": source.descale(self.descale, self.B, self.H),
        }
        causal = self.mask is None if self.causal is None else self.causal
        written = {"k": new_rows[0], "v": new_rows[1]} if self.write else {}
        return Call(
            {**arguments, **written, "k_cache": caches[0], "v_cache": caches[1], "causal": self.causal},
            {**arguments, "k_cache": full_caches[0], "v_cache": full_caches[1], "causal": causal},
        )


# --- The list ---------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}
RAGGED = (1, 0, 64, 65, 300)
DESCALES: tuple[Descale, ...] = ("scalar", "head", "request")
"""Shapes of a descale beside the number and the whole tensor, which most cases have."""
LONG = (700, 513, 1)
"""Long enough for runs of eight consecutive blocks, which the CPU backend reads in place."""


def decode_cases() -> list[DecodeCase]:
    mla = DecodeCase("decode/mla", LONG, Hq=16, Hk=1, D=576, Dv=512, alias=True)
    gqa = DecodeCase("decode/gqa", RAGGED, Hq=8, Hk=2, D=128)
    many = replace(gqa, S_q=130, lengths=(300, 7, 0, 130))
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        cases += [
            replace(mla, name=f"decode/mla-{name}", dtype=dtype, descale=descale),
            replace(gqa, name=f"decode/gqa-{name}", dtype=dtype, descale=descale),
            replace(
                gqa, name=f"decode/speculative-{name}", dtype=dtype, descale=descale, S_q=4, lengths=(7, 600, 0, 3)
            ),
        ]
    for ratio in (1, 2, 8, 64, 128):
        cases.append(DecodeCase(f"decode/ratio-{ratio}", (65, 3, 0), Hq=ratio * 2, Hk=2, D=64))
    for D in (16, 40, 80, 96, 192, 256, 512, 576):
        cases.append(DecodeCase(f"decode/head-dim-{D}", (130, 64), D=D))
    for D, Dv in ((192, 128), (64, 128), (72, 8), (576, 512)):
        cases.append(DecodeCase(f"decode/head-dim-{D}-{Dv}", (130, 64), D=D, Dv=Dv))
    for S_q in range(2, 9):
        # the second request is shorter than S_q: its first queries see no key
        cases.append(replace(gqa, name=f"decode/queries-{S_q}", lengths=(600, S_q - 1, 64, 129, 0), S_q=S_q))
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-rows", "float-rows", "bool-heads", "float-heads")
    for mask in masks:
        S_q = 1 if mask in ("bool", "float") else 3
        cases.append(replace(gqa, name=f"decode/mask-{mask}", mask=mask, S_q=S_q))
    cases += [
        replace(
            gqa, name="decode/mask-mla", lengths=LONG, mask="bool-rows", S_q=2, Hq=16, Hk=1, D=576, Dv=512, alias=True
        ),
        replace(gqa, name="decode/mask-fp8", mask="float", dtype=FP8, descale="float"),
    ]
    tails: tuple[MaskShape, ...] = ("bool", "float", "bool-heads", "float-heads")
    for tail in tails:
        cases.append(replace(gqa, name=f"decode/tail-{tail}", tail=tail, S_q=5, lengths=(300, 5, 69, 64)))
    cases += [
        replace(mla, name="decode/tail-mla", tail="bool", S_q=8, lengths=(700, 8, 129)),
        replace(mla, name="decode/tail-mla-128", tail="bool-heads", S_q=33, lengths=(200, 33)),
        replace(gqa, name="decode/queries-128", S_q=128, lengths=(300, 127, 0, 128)),
        replace(gqa, name="decode/queries-128-mask", S_q=128, lengths=(300, 7, 128), mask="bool-rows"),
        replace(mla, name="decode/queries-100-mla", S_q=100, lengths=(300, 7)),
        replace(mla, name="decode/queries-40-mla-mask", S_q=40, lengths=(300, 7), mask="bool-rows"),
        replace(gqa, name="decode/invariant", batch_invariant=True, lengths=(2100, 0, 4500, 65)),
        replace(
            gqa, name="decode/invariant-mask", batch_invariant=True, lengths=(2100, 4, 65), S_q=4, mask="bool-heads"
        ),
        replace(gqa, name="decode/invariant-sink", batch_invariant=True, lengths=(2049, 300), sink=True, layout="pool"),
        replace(mla, name="decode/invariant-mla", Hq=4, batch_invariant=True, lengths=(8300, 700, 0)),
    ]
    layouts: tuple[CacheLayout, ...] = ("sliced", "pool", "serving")
    for layout in layouts:
        cases += [
            replace(gqa, name=f"decode/{layout}", layout=layout, lengths=LONG),
            replace(gqa, name=f"decode/{layout}-ordered", layout=layout, lengths=LONG, order="ordered"),
            replace(mla, name=f"decode/{layout}-mla", layout=layout),
            replace(gqa, name=f"decode/{layout}-fp8", layout=layout, dtype=FP8, descale="tensor"),
        ]
    cases += [
        replace(gqa, name="decode/shared-prefix", layout="pool", order="ordered", lengths=(640, 700, 650), shared=9),
        replace(mla, name="decode/shared-prefix-mla", layout="pool", lengths=(640, 700, 650), shared=9, S_q=2),
        replace(gqa, name="decode/pool-barely-used", layout="pool", lengths=(200, 65), spare=100),
        replace(gqa, name="decode/ordered", order="ordered", lengths=LONG),
        replace(gqa, name="decode/sink", sink=True),
        replace(mla, name="decode/sink-mla", sink=True, S_q=2),
        replace(gqa, name="decode/sink-mask", sink=True, mask="bool"),
        replace(gqa, name="decode/scale", softmax_scale=0.31),
        replace(gqa, name="decode/int64", index_dtype=torch.int64),
        replace(gqa, name="decode/exact-blocks", lengths=(64, 128, 192), spare=0),
        replace(gqa, name="decode/all-empty", lengths=(0, 0)),
        replace(gqa, name="decode/one-token", lengths=(1,)),
        replace(gqa, name="decode/descale", descale="tensor"),
        replace(mla, name="decode/descale-mla", descale="float"),
        replace(gqa, name="decode/fp8-no-descale", dtype=FP8),
        replace(gqa, name="decode/fp8-float", dtype=FP8, descale="float"),
        replace(many, name="decode/queries-130", sink=True),
        replace(many, name="decode/fp8-queries-130", dtype=FP8, descale="tensor"),
        replace(mla, name="decode/fp8-mla-sink", dtype=FP8, descale="tensor", sink=True, S_q=2),
        replace(mla, name="decode/fp8-mla-queries-8", dtype=FP8, descale="tensor", S_q=8, lengths=(700, 7, 0)),
        replace(mla, name="decode/fp8-mla-no-rope", dtype=FP8, descale="float", D=512),
        replace(mla, name="decode/fp8-mla-pool", dtype=FP8, layout="pool"),
    ]
    fp8 = replace(mla, dtype=FP8, descale="tensor")
    cases += [
        replace(fp8, name="decode/fp8-mla-queries-2", S_q=2, lengths=(300, 1)),
        replace(fp8, name="decode/fp8-mla-mask", S_q=2, mask="bool-rows", lengths=(130, 3)),
        replace(fp8, name="decode/fp8-mla-tail", S_q=4, tail="float", lengths=(130, 4)),
        replace(fp8, name="decode/fp8-mla-invariant", batch_invariant=True, lengths=(2200, 0)),
        *(replace(fp8, name=f"decode/fp8-mla-heads-{heads}", Hq=heads) for heads in (1, 64, 128)),
    ]
    for shape in DESCALES:
        cases += [
            replace(fp8, name=f"decode/fp8-mla-descale-{shape}", descale=shape, lengths=(70, 3)),
            replace(gqa, name=f"decode/fp8-gqa-descale-{shape}", dtype=FP8, descale=shape, lengths=(70, 3)),
        ]
    for name in ("bf16", "fp16"):
        over = replace(mla, dtype=DTYPES[name], kv_dtype=FP8)
        cases += [
            replace(over, name=f"decode/{name}-over-fp8-mla", descale="tensor"),
            replace(over, name=f"decode/{name}-over-fp8-mla-heads-128", descale="float", Hq=128),
            replace(over, name=f"decode/{name}-over-fp8-mla-sink", Hq=40, S_q=2, sink=True, layout="pool"),
            replace(over, name=f"decode/{name}-over-fp8-mla-no-rope", descale="head", D=512, lengths=(130, 3)),
            replace(over, name=f"decode/{name}-over-fp8-mla-queries-8", descale="request", S_q=8, lengths=(130, 7)),
            replace(gqa, name=f"decode/{name}-over-fp8-gqa", dtype=DTYPES[name], kv_dtype=FP8, descale="tensor"),
        ]
    return cases


def prefill_cases() -> list[PrefillCase]:
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        base = PrefillCase("", 150, dtype=dtype, descale=descale)
        cases += [
            replace(base, name=f"prefill/causal-{name}"),
            replace(base, name=f"prefill/full-{name}", causal=False),
            replace(base, name=f"prefill/mask-{name}", mask="float"),
            replace(base, name=f"prefill/sparse-{name}", sparse="tensor", causal=False),
            replace(base, name=f"prefill/mla-{name}", D=192, Dv=128),
        ]
    base = PrefillCase("", 200)
    for ratio in (1, 8, 128):
        cases.append(PrefillCase(f"prefill/ratio-{ratio}", 70, B=1, Hq=ratio, Hk=1))
    for D, Dv in ((16, 16), (40, 40), (256, 256), (576, 512), (64, 128), (72, 8)):
        cases.append(PrefillCase(f"prefill/head-dim-{D}-{Dv}", 100, D=D, Dv=Dv))
    for P in (1, 63, 64, 65, 129):
        cases.append(replace(base, name=f"prefill/tokens-{P}", P=P))
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-heads", "float-heads")
    for mask in masks:
        cases += [
            replace(base, name=f"prefill/mask-{mask}", mask=mask),
            replace(base, name=f"prefill/mask-{mask}-causal", mask=mask, causal=True),
        ]
    patterns: tuple[Sparse, ...] = ("tensor", "heads", "layout", "block-mask")
    for sparse in patterns:
        cases += [
            replace(base, name=f"prefill/sparse-{sparse}", sparse=sparse),
            replace(base, name=f"prefill/sparse-{sparse}-mask", sparse=sparse, mask="bool", causal=True),
        ]
    for D, Dv in ((64, 64), (128, 128), (192, 128), (256, 256)):
        # several tiles of every kernel
        long = PrefillCase("", 700, Hq=4, Hk=2, D=D, Dv=Dv)
        fp8 = replace(long, dtype=FP8, descale="tensor")
        cases += [
            replace(long, name=f"prefill/long-{D}-{Dv}"),
            replace(long, name=f"prefill/long-{D}-{Dv}-ragged", lengths=(700, 333), causal=False),
            replace(long, name=f"prefill/long-{D}-{Dv}-sparse", sparse="heads", causal=False),
            replace(long, name=f"prefill/long-{D}-{Dv}-sparse-causal", sparse="heads", causal=True),
            replace(long, name=f"prefill/long-{D}-{Dv}-mask", mask="bool"),
            replace(fp8, name=f"prefill/long-{D}-{Dv}-fp8", sink=True),
            replace(fp8, name=f"prefill/long-{D}-{Dv}-fp8-ragged", lengths=(700, 333), causal=False),
        ]
    cases += [
        replace(base, name="prefill/mask-float-128", mask="float", D=128),
        replace(base, name="prefill/mask-bool-192-128", mask="bool", causal=True, D=192, Dv=128),
        replace(base, name="prefill/ragged", lengths=(200, 77)),
        replace(base, name="prefill/ragged-empty", lengths=(0, 64)),
        replace(base, name="prefill/ragged-full", lengths=(130, 1), causal=False),
        replace(base, name="prefill/ragged-mask", lengths=(130, 65), mask="float"),
        replace(base, name="prefill/ragged-sparse", lengths=(130, 65), sparse="heads", mask="bool-heads", causal=True),
        replace(base, name="prefill/sliced", sliced=True),
        replace(base, name="prefill/sliced-sparse", sliced=True, sparse="heads"),
        replace(base, name="prefill/sliced-ragged", sliced=True, lengths=(130, 65), D=192, Dv=128),
        replace(base, name="prefill/sink", sink=True),
        replace(base, name="prefill/sink-sparse", sink=True, sparse="tensor", mask="bool"),
        replace(base, name="prefill/scale", softmax_scale=0.31),
        replace(base, name="prefill/descale", descale="tensor"),
        *(replace(base, name=f"prefill/fp8-descale-{x}", dtype=FP8, descale=x, P=70, D=128) for x in DESCALES),
        replace(base, name="prefill/fp8-ragged", dtype=FP8, descale="float", lengths=(130, 65)),
        replace(base, name="prefill/fp8-sparse-heads", dtype=FP8, sparse="heads", mask="float-heads"),
    ]
    return cases


def mha_cases() -> list[MhaCase]:
    cases = []
    for name, dtype in DTYPES.items():
        descale: Descale | None = "tensor" if dtype == FP8 else None
        base = MhaCase("", 130, dtype=dtype, descale=descale)
        cases += [
            replace(base, name=f"mha/write-{name}"),
            replace(base, name=f"mha/chunk-{name}", P=70, starts=(65, 0)),
            replace(base, name=f"mha/read-{name}", write=False),
        ]
    base = MhaCase("", 130)
    chunk = replace(base, P=70, starts=(100, 64))
    fp8 = replace(base, dtype=FP8, descale="tensor", D=192, Dv=128)
    masks: tuple[MaskShape, ...] = ("bool", "float", "bool-heads", "float-heads")
    for mask in masks:
        cases += [
            replace(base, name=f"mha/mask-{mask}", mask=mask),
            replace(chunk, name=f"mha/chunk-mask-{mask}", mask=mask, causal=True),
        ]
    layouts: tuple[CacheLayout, ...] = ("sliced", "pool")
    for layout in layouts:
        cases += [
            replace(base, name=f"mha/{layout}", layout=layout),
            replace(chunk, name=f"mha/{layout}-chunk", layout=layout),
        ]
    cases += [
        replace(base, name="mha/one-token", P=1),
        replace(base, name="mha/exact-blocks", P=128, spare=0),
        replace(base, name="mha/full", causal=False),
        replace(chunk, name="mha/chunk-full", causal=False),
        replace(chunk, name="mha/chunk-one-token", P=1, starts=(63, 64)),
        replace(base, name="mha/ordered", order="ordered", P=600, B=1),
        replace(base, name="mha/head-dims", D=192, Dv=128),
        replace(base, name="mha/long", P=700, D=128),
        replace(base, name="mha/long-chunk", P=300, starts=(450, 64), D=128, layout="pool"),
        replace(base, name="mha/scale", softmax_scale=0.31),
        replace(base, name="mha/latent", D=576, Dv=512, alias=True, write=False),
        replace(chunk, name="mha/latent-chunk", D=576, Dv=512, alias=True, write=False, layout="pool"),
        replace(chunk, name="mha/fp8-pool", dtype=FP8, descale="float", layout="pool"),
        *(replace(fp8, name=f"mha/fp8-descale-{x}", descale=x, P=70) for x in DESCALES),
        replace(fp8, name="mha/fp8-long", P=700),
        replace(fp8, name="mha/fp8-long-chunk", P=300, starts=(450, 64), layout="pool"),
    ]
    return cases
