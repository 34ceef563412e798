"""Calls of the drop-in for DeepSeek's package, and the list of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_mla import deepseek
from flash_mla.problem import FP8
from flash_mla.quant import FORMATS
from flash_mla.reference import format_rows, sparse_reference
from flash_mla.testing.cases import DTYPES
from flash_mla.testing.hostile import UNUSED_ENTRY, Call, Source, nan_filled

NO_TOKEN = (-(2**31), -123456, -1, 1919810, 2147480000, 2**31 - 1)
"""Indices that name no token, whatever the pool's size here."""


def sparse_pool(
    B: int, S_q: int, topk: int, pages: int, page: int, D: int, format_name: str | None, dtype: torch.dtype,
    lengths: bool, source: Source, apart: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(pool, indices [B, S_q, topk] int32, topk_length [B] or None).

    A fifth of the indices name no token, all of the very first query token's do; rows that no query names hold NaN, and
    so do the `apart` bytes between one page and the next.
    """
    slots, generator = pages * page, source.generator
    indices = torch.randint(0, slots, (B, S_q, topk), generator=generator)
    stray = torch.rand(B, S_q, topk, generator=generator) < 0.2
    stray[:1, :1] = True
    indices[stray] = torch.tensor(NO_TOKEN)[torch.randint(0, len(NO_TOKEN), (int(stray.sum()),), generator=generator)]
    counts = torch.randint(0, topk + 1, (B,), generator=generator) if lengths else torch.full((B,), topk)
    seen = (indices >= 0) & (indices < slots) & (torch.arange(topk) < counts.view(B, 1, 1))
    rows = torch.full((slots, D), math.nan)
    named = indices[seen].unique()
    rows[named] = torch.randn(len(named), D, generator=generator)
    pool = rows.view(pages, page, 1, D)
    pool = pool.to(dtype) if format_name is None else FORMATS[format_name].quantise(pool.bfloat16())
    topk_length = counts.int().to(source.device) if lengths else None
    pool = move_apart(pool, apart) if apart else pool
    return to_device(pool, source.device), indices.int().to(source.device), topk_length


def move_apart(pool: Tensor, num_bytes: int) -> Tensor:
    """The pool with so many more bytes from one page to the next, all ones."""
    pages, size = pool.shape[0], pool.element_size()
    pitch = pool.stride(0) * size + num_bytes
    memory = torch.full((pages * pitch,), 255, dtype=torch.uint8).view(pool.dtype)
    moved = memory.as_strided(pool.shape, (pitch // size, *pool.stride()[1:]))
    moved.copy_(pool)
    return moved


def to_device(pool: Tensor, device: str) -> Tensor:
    """The pool on a device with the strides that it has: a row format's pages may lie further apart than their rows."""
    memory = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage()).to(device)
    return memory.view(pool.dtype).as_strided(pool.shape, pool.stride(), pool.storage_offset())


def make_sink(Hq: int, source: Source) -> Tensor:
    """[Hq] FP32, of which some are -inf and some +inf."""
    sink = torch.randn(Hq, generator=source.generator)
    sink[::3], sink[1::4] = -math.inf, math.inf
    return sink.to(source.device)


def library_lse(lse: Tensor) -> Tensor:
    """A drop-in's lse, +inf without keys, by the library's convention, -inf; a -inf there becomes NaN."""
    return lse.masked_fill(lse == -math.inf, math.nan).masked_fill(lse == math.inf, -math.inf)


@dataclass(frozen=True)
class SparseDecodeCase:
    """A call of deepseek.flash_mla_with_kvcache with indices, over one pool or, with extra_topk, two."""

    name: str
    B: int = 3
    S_q: int = 2
    Hq: int = 16
    topk: int = 70
    page: int = 64
    format: str | None = "fp8_ds_mla"
    """A row format's name; None: the pool is in `dtype`."""
    D: int = 576
    Dv: int = 512
    dtype: torch.dtype = torch.bfloat16
    extra_topk: int | None = None
    extra_page: int = 53
    apart: int = 0
    """Bytes between a page and the next beyond what the rows, or the row format, take."""
    lengths: bool = False
    """Pass topk_length, and extra_topk_length."""
    sink: bool = False
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_with_kvcache"
    more = ()

    def call(self) -> Call:
        """The tensors; the reference takes rows in float64."""
        source = Source(self.seed, self.device)
        shape = (self.B, self.S_q)

        def pool(topk: int, pages: int, page: int) -> tuple[Tensor, Tensor, Tensor | None]:
            return sparse_pool(
                *shape, topk, pages, page, self.D, self.format, self.dtype, self.lengths, source, self.apart
            )

        pools = [pool(self.topk, 7, self.page)]
        if self.extra_topk is not None:
            pools.append(pool(self.extra_topk, 5, self.extra_page))
        (k_cache, indices, length), (extra, extra_indices, extra_length) = (*pools, (None, None, None))[:2]
        q = source.normal((*shape, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        return Call(
            {
                "q": q,
                "k_cache": k_cache,
                "block_table": None,
                "cache_seqlens": None,
                "head_dim_v": self.Dv,
                "softmax_scale": self.softmax_scale,
                "is_fp8_kvcache": self.format is not None,
                "indices": indices,
                "attn_sink": sink,
                "extra_k_cache": extra,
                "extra_indices_in_kvcache": extra_indices,
                "topk_length": length,
                "extra_topk_length": extra_length,
            },
            {
                "q": q,
                "pools": [(format_rows(pool, self.format), *rest) for pool, *rest in pools],
                "Dv": self.Dv,
                "softmax_scale": self.D**-0.5 if self.softmax_scale is None else self.softmax_scale,
                "attn_sink": sink,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        out, lse = deepseek.flash_mla_with_kvcache(**call.arguments, backend=self.backend)
        return out.transpose(1, 2), library_lse(lse)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        return sparse_reference(**call.reference)[:2]


@dataclass(frozen=True)
class SparsePrefillCase:
    """A call of deepseek.flash_mla_sparse_fwd."""

    name: str
    S_q: int = 5
    S_kv: int = 150
    Hq: int = 16
    topk: int = 70
    D: int = 576
    Dv: int = 512
    dtype: torch.dtype = torch.bfloat16
    lengths: bool = False
    """Pass topk_length."""
    sink: bool = False
    softmax_scale: float = 0.05
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_sparse_fwd"

    @property
    def more(self) -> tuple[str, ...]:
        """What is judged beside out and lse."""
        return ("max_logits",)

    def call(self) -> Call:
        source = Source(self.seed, self.device)
        kv, indices, length = sparse_pool(
            self.S_q, 1, self.topk, 1, self.S_kv, self.D, None, self.dtype, self.lengths, source
        )
        q = source.normal((self.S_q, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        return Call(
            {
                "q": q,
                "kv": kv[0],
                "indices": indices,
                "sm_scale": self.softmax_scale,
                "d_v": self.Dv,
                "attn_sink": sink,
                "topk_length": length,
            },
            {
                "q": q.unsqueeze(1),
                "pools": [(format_rows(kv, None), indices, length)],
                "Dv": self.Dv,
                "softmax_scale": self.softmax_scale,
                "attn_sink": sink,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        out, max_logits, lse = deepseek.flash_mla_sparse_fwd(**call.arguments, backend=self.backend)
        return tuple(x.transpose(0, 1).unsqueeze(0) for x in (out, library_lse(lse), max_logits))

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        out, lse, top = sparse_reference(**call.reference)
        return tuple(x.squeeze(2).transpose(0, 1).unsqueeze(0) for x in (out, lse, top))


@dataclass(frozen=True)
class DenseDecodeCase:
    """A call of deepseek.flash_mla_with_kvcache with a block table, or, in FP8, of flash_mla_with_kvcache_fp8.

    format: a row format's name, of a pool of one KV head; None: the pool is in `dtype`.
    """

    name: str
    lengths: tuple[int, ...] = (140, 0, 1, 64, 3)
    S_q: int = 2
    Hq: int = 16
    Hk: int = 1
    D: int = 576
    Dv: int = 512
    page: int = 64
    dtype: torch.dtype = torch.bfloat16
    format: str | None = None
    causal: bool = True
    sink: bool = False
    softmax_scale: float | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_mla_with_kvcache"
    more = ()

    def call(self) -> Call:
        """The tensors; the reference names the keys of each query one by one."""
        source = Source(self.seed, self.device)
        B, width = len(self.lengths), -(-max(*self.lengths, 1) // self.page) + 1
        table = torch.full((B, width), UNUSED_ENTRY, dtype=torch.int32)
        pool = nan_filled((B * width, self.page, self.Hk, self.D), self.dtype, self.device)
        free = source.permutation(B * width).int()
        indices = torch.full((B, self.S_q, max(*self.lengths, 1)), -1)
        for b, length in enumerate(self.lengths):
            pages = -(-length // self.page)
            table[b, :pages] = free[b * width : b * width + pages]
            t = torch.arange(length)
            slots = table[b, t // self.page].long() * self.page + t % self.page
            pool.flatten(0, 1)[slots.to(self.device)] = source.normal((length, self.Hk, self.D), self.dtype)
            for i in range(self.S_q):
                limit = max(length - self.S_q + i + 1, 0) if self.causal else length
                indices[b, i, :limit] = slots[:limit]
        q = source.normal((B, self.S_q, self.Hq, self.D), self.dtype)
        sink = make_sink(self.Hq, source) if self.sink else None
        factors = {}
        if self.dtype == FP8:
            factors = {
                name: torch.tensor([x], device=self.device) for name, x in (("descale_q", 0.5), ("descale_k", 0.25))
            }
        rows = pool.double().flatten(0, 1) * (0.25 if factors else 1.0)
        if self.format is not None:
            pool = FORMATS[self.format].quantise(pool)
            rows = format_rows(pool, self.format).view_as(rows)
        arguments = {
            "q": q,
            "k_cache": pool,
            "block_table": table.to(self.device),
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            "head_dim_v": self.Dv,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            **(factors if self.dtype == FP8 else {"attn_sink": sink, "is_fp8_kvcache": self.format is not None}),
        }
        reference = {
            "q": q.double() * (0.5 if factors else 1.0),
            "rows": rows,  # [slots, Hk, D]
            "indices": indices.to(self.device),
            "softmax_scale": self.D**-0.5 if self.softmax_scale is None else self.softmax_scale,
            "sink": sink,
        }
        return Call(arguments, reference)

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        function = deepseek.flash_mla_with_kvcache_fp8 if self.dtype == FP8 else deepseek.flash_mla_with_kvcache
        out, lse = function(**call.arguments, backend=self.backend)
        return out.transpose(1, 2), library_lse(lse)

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        x = call.reference
        parts = []
        for hk, q in enumerate(x["q"].chunk(self.Hk, 2)):
            sink = None if x["sink"] is None else x["sink"].chunk(self.Hk)[hk]
            pools = [(x["rows"][:, hk], x["indices"], None)]
            parts.append(sparse_reference(q, pools, self.Dv, x["softmax_scale"], sink))
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


@dataclass(frozen=True)
class VarlenCase:
    """A call of deepseek.flash_attn_varlen_func and its backward, through out and lse."""

    name: str
    lengths_q: tuple[int, ...] = (3, 65, 1, 20)
    lengths_kv: tuple[int, ...] = (9, 130, 1, 20)
    Hq: int = 4
    Hk: int = 2
    D: int = 192
    Dv: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    function = "deepseek.flash_attn_varlen_func"
    more = ("dq", "dk", "dv")

    def call(self) -> Call:
        source = Source(self.seed, self.device)
        starts = [[0, *torch.tensor(x).cumsum(0).tolist()] for x in (self.lengths_q, self.lengths_kv)]
        rows = ((starts[0][-1], self.Hq, self.D), (starts[1][-1], self.Hk, self.D), (starts[1][-1], self.Hk, self.Dv))
        q, k, v = (source.normal(shape, self.dtype) for shape in rows)
        cu_seqlens = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in starts]
        return Call(
            {
                "q": q,
                "k": k,
                "v": v,
                "cu_seqlens_qo": cu_seqlens[0],
                "cu_seqlens_kv": cu_seqlens[1],
                "max_seqlen_qo": max(self.lengths_q),
                "max_seqlen_kv": max(self.lengths_kv),
                "causal": self.causal,
            },
            {
                "d_out": source.normal((starts[0][-1], self.Hq, self.Dv), self.dtype),
                "d_lse": source.normal((starts[0][-1], self.Hq), torch.float32),
                "starts": starts,
            },
        )

    def invoke(self, call: Call) -> tuple[Tensor, ...]:
        leaves = {name: call.arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
        out, lse = deepseek.flash_attn_varlen_func(**{**call.arguments, **leaves}, backend=self.backend)
        return as_batch(out.detach(), lse.detach(), *self.gradients(call, out, lse, leaves))

    def gradients(self, call: Call, out: Tensor, lse: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Of (out d_out).sum() + (lse d_lse).sum() over the rows that see a key."""
        d_lse = call.reference["d_lse"].masked_fill(lse.detach() == -math.inf, 0.0)
        return torch.autograd.grad(
            (out, lse), tuple(leaves.values()), (call.reference["d_out"].to(out.dtype), d_lse.to(lse.dtype))
        )

    def truth(self, call: Call) -> tuple[Tensor, ...]:
        """By autograd in float64."""
        leaves = {name: call.arguments[name].double().requires_grad_() for name in ("q", "k", "v")}
        outs, lses = [], []
        starts_q, starts_kv = call.reference["starts"]
        for n in range(len(self.lengths_q)):
            own_q, own_kv = slice(*starts_q[n : n + 2]), slice(*starts_kv[n : n + 2])
            q, k, v = (
                leaves[name][own].transpose(0, 1)[None] for name, own in (("q", own_q), ("k", own_kv), ("v", own_kv))
            )
            out, lse = differentiable_attention(q, k, v, self.causal)
            outs.append(out)
            lses.append(lse)
        out, lse = torch.cat(outs), torch.cat(lses)
        return as_batch(out.detach(), lse.detach(), *self.gradients(call, out, lse, leaves))


def differentiable_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q [1, Hq, S_q, D], k and v [1, Hk, S_kv, ..] float64 -> out [S_q, Hq, Dv], lse [S_q, Hq], of plain operators.

    The last query sees all keys. A row without keys: 0 and -inf, and no gradient.
    """
    S_q, S_kv = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    hidden = torch.ones(S_q, S_kv, dtype=torch.bool, device=q.device).triu(S_kv - S_q + 1)
    if not causal:
        hidden = torch.zeros_like(hidden)
    empty = hidden.all(-1)[:, None]
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(hidden & ~empty, -math.inf)
    out = (scores.softmax(-1) @ v).masked_fill(empty, 0.0) if S_kv else q.new_zeros(*q.shape[:3], v.shape[3])
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    return out[0].transpose(0, 1), lse[0, ..., 0].transpose(0, 1)


def as_batch(out: Tensor, lse: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """out [S, Hq, Dv] and lse [S, Hq] as [1, Hq, S, ..]."""
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None], *gradients


DropInCase = SparseDecodeCase | SparsePrefillCase | DenseDecodeCase | VarlenCase


# --- The list ---------------------------------------------------------------------------------------------------------


def drop_in_cases() -> list[DropInCase]:
    cases: list[DropInCase] = []
    widths = {"fp8_ds_mla": 576, "model1": 512, "v4.1": 512, "flat": 576, "fp8_token": 576}
    for format_name, D in widths.items():
        base = SparseDecodeCase(f"deepseek/sparse-{format_name}", format=format_name, D=D)
        cases += [
            base,
            replace(base, name=f"{base.name}-all", sink=True, lengths=True, extra_topk=33, page=61),
            replace(base, name=f"{base.name}-many", Hq=128, S_q=1, B=5, topk=300, page=2),
        ]
    for name, dtype in DTYPES.items():
        if dtype != FP8:
            base = SparseDecodeCase(f"deepseek/sparse-{name}", format=None, dtype=dtype)
            cases += [
                base,
                replace(base, name=f"{base.name}-all", D=512, sink=True, lengths=True, extra_topk=33, page=7),
            ]
            prefill = SparsePrefillCase(f"deepseek/sparse-prefill-{name}", dtype=dtype)
            cases += [prefill, replace(prefill, name=f"{prefill.name}-all", sink=True, lengths=True)]
    decode, prefill, dense, varlen = (
        SparseDecodeCase(""), SparsePrefillCase(""), DenseDecodeCase(""), VarlenCase(""),
    )  # fmt: skip
    cases += [
        replace(decode, name="deepseek/sparse-one-index", topk=1, S_q=1),
        replace(decode, name="deepseek/sparse-long", topk=2048, B=1, page=576),
        replace(decode, name="deepseek/sparse-sink", sink=True),
        replace(decode, name="deepseek/sparse-lengths", lengths=True),
        replace(decode, name="deepseek/sparse-extra", extra_topk=33),
        replace(decode, name="deepseek/sparse-apart", apart=1152, extra_topk=33),
        replace(decode, name="deepseek/sparse-heads-3", Hq=3, softmax_scale=0.03),
        replace(decode, name="deepseek/sparse-narrow", format=None, D=128, Dv=64),
        replace(prefill, name="deepseek/sparse-prefill-512", D=512, Hq=64, topk=300),
        replace(prefill, name="deepseek/sparse-prefill-heads-128", Hq=128, topk=128, S_kv=95),
        replace(prefill, name="deepseek/sparse-prefill-heads-3", Hq=3),
        replace(prefill, name="deepseek/sparse-prefill-128", D=128, Dv=128),
    ]
    for format_name, D in widths.items():
        cases.append(replace(dense, name=f"deepseek/dense-rows-{format_name}", format=format_name, D=D))
    rows = replace(dense, format="fp8_token", S_q=1, sink=True)
    cases.append(replace(rows, name="deepseek/dense-rows-full", Hq=64, causal=False, lengths=(70, 0, 3)))
    for name, dtype in DTYPES.items():
        cases.append(replace(dense, name=f"deepseek/dense-{name}", dtype=dtype))
        if dtype != FP8:
            cases.append(replace(varlen, name=f"deepseek/varlen-{name}", dtype=dtype))
    cases += [
        replace(dense, name="deepseek/dense-full", causal=False),
        replace(dense, name="deepseek/dense-fp8-full", causal=False, dtype=FP8),
        replace(dense, name="deepseek/dense-128-heads", Hq=128, S_q=1),
        replace(dense, name="deepseek/dense-gqa", Hq=63, Hk=3, S_q=3),
        replace(dense, name="deepseek/dense-gqa-full", Hq=16, Hk=8, S_q=4, causal=False),
        replace(dense, name="deepseek/dense-512", D=512),
        replace(dense, name="deepseek/dense-pages-256", lengths=(300, 1000), page=256),
        replace(dense, name="deepseek/dense-sink", sink=True),
        replace(dense, name="deepseek/dense-sink-full", sink=True, causal=False, Hk=2),
        replace(varlen, name="deepseek/varlen-full", causal=False),
        replace(varlen, name="deepseek/varlen-alike", lengths_q=(70, 70), lengths_kv=(70, 70), Hk=4),
        replace(varlen, name="deepseek/varlen-empty", lengths_q=(5, 0, 7), lengths_kv=(2, 4, 0), D=64, Dv=32),
        replace(
            varlen, name="deepseek/varlen-empty-full", lengths_q=(5, 0, 7), lengths_kv=(2, 4, 0), causal=False, D=128
        ),
    ]
    return cases
