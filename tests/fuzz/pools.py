"""Calls of decode_over_pages: the pools of serving engines, in every layout that they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_mla import BlockCountError, DTypeError, LayoutError, ShapeError

from . import oracle
from .attention import Fault, illegal, legal, magnitude
from .case import Case
from .draw import DTYPES, FP8, NEVER, Draw


def pools_of(
    draw: Draw, kind: str, layout: str, size: tuple[int, int, int], D: int, Dv: int, dtype: torch.dtype
) -> Any:
    """(k_pages, v_pages, k_rope_pages) of NaN, [num_blocks, page, Hk, ..] or [num_blocks, Hk, page, ..]."""
    num_blocks, page, Hk = size
    outer = (num_blocks, page, Hk) if layout == "NHD" else (num_blocks, Hk, page)
    if kind == "one tensor":
        both = draw.poison(num_blocks, 2, *outer[1:], max(D, Dv), dtype=dtype)
        return both[:, 0, ..., :D], both[:, 1, ..., :Dv], None
    if kind == "one row":
        row = draw.poison(*outer, D + Dv, dtype=dtype)
        return row[..., :D], row[..., D:], None
    if kind == "split latent":
        return draw.poison(*outer, Dv, dtype=dtype), None, draw.poison(*outer, D - Dv, dtype=dtype)
    k = draw.poison(*outer, D, dtype=dtype)
    return k, None if kind == "latent" else draw.poison(*outer, Dv, dtype=dtype), None


def pages(draw: Draw, backend: str | None) -> Case:
    """decode_over_pages."""
    kind = draw.pick(("apart", "one tensor", "one row", "latent", "split latent"))
    layout = draw.pick(("NHD", "HND"))
    page = draw.pick((16, 32, 64, 64, 128))
    dtype = draw.pick(DTYPES)
    over_fp8 = dtype in (torch.bfloat16, torch.float16) and draw.maybe(0.2)
    stored = FP8 if over_fp8 else dtype
    latent = "latent" in kind
    # Triton cuts 128 columns in no two, and a GPU then has nobody for a split latent
    latents = ((576, 512), (192, 128), *(((128, 64),) if kind == "latent" else ()))
    D, Dv = draw.pick(latents) if latent else draw.pick(((128, 128), (64, 64), (96, 32)))
    Hk = 1 if latent else draw.pick((1, 2, 3))
    Hq = Hk * draw.pick((1, 4, 16, 64) if latent else (1, 2, 8))
    B, S_q = draw.pick((1, 2, 3)), draw.pick((1, 1, 2, 4))
    lengths = [draw.between(0, draw.among((1, 100, 400))) for _ in range(B)]
    counts = [-(-n // page) for n in lengths]
    size = (sum(counts) + draw.between(0, 2), page, Hk)
    k_pages, v_pages, k_rope_pages = pools_of(draw, kind, layout, size, D, Dv, stored)
    table = torch.full((B, max(counts) + draw.between(0, 2)), draw.among((NEVER, -1)))
    free = torch.randperm(size[0], generator=draw.generator)
    strength = magnitude(draw)
    rows: list[tuple[Tensor, Tensor]] = []  # K and V of each request, [Hk, n, ..], as they are stored
    for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count], free = free[:count], free[count:]
        k = draw.normal(Hk, n, D, dtype=stored, scale=strength)
        v = k[..., :Dv] if latent else draw.normal(Hk, n, Dv, dtype=stored)
        rows.append((k, v))
        t = torch.arange(n)
        block, slot = (x.to(draw.device) for x in (table[b, t // page], t % page))
        parts = ((k_pages, k[..., :Dv]), (k_rope_pages, k[..., Dv:])) if k_rope_pages is not None else ((k_pages, k),)
        for pool, part in parts if latent else (*parts, (v_pages, v)):
            by_token = pool if layout == "NHD" else pool.transpose(1, 2)
            bytes_of(by_token)[block, slot] = bytes_of(part.transpose(0, 1).contiguous())
    q = draw.normal(B, Hq, S_q, D, dtype=dtype, scale=magnitude(draw))
    if draw.maybe(0.3):
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    causal = draw.pick((True, True, False))
    masks = {"none": None, "mask": None, "tail": None}
    given = draw.pick(("none", "none", "none", "mask", "tail"))
    if given == "mask":
        masks["mask"] = draw.mask(B, Hq, S_q, max(lengths) + draw.between(0, 3), lengths)
    if given == "tail":
        masks["tail"] = draw.bits(draw.pick((1, B)), draw.pick((1, Hq)), S_q, S_q).to(draw.device)
    out_dtype = torch.bfloat16 if dtype == FP8 else dtype
    x: dict[str, Any] = {
        "q": q,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_table": draw.index(table),
        "seq_lens": draw.index(lengths),
        "mask": masks["mask"],
        "tail_mask": masks["tail"],
        "layout": layout,
        "k_rope_pages": k_rope_pages,
        "v_head_dim": Dv if kind == "latent" else None,
        "causal": causal,
        "check_values": draw.chance(0.5),
        "softmax_scale": draw.scale(D),
        "attn_sink": draw.normal(Hq) if draw.maybe(0.2) else None,
        "batch_invariant": draw.maybe(0.15),
        "return_lse": True,
        "backend": backend,
    }
    if over_fp8 or draw.maybe(0.15):
        x |= {name: draw.descale(B, Hk) for name in ("q_descale", "k_descale", "v_descale")}
        if latent:
            x["v_descale"] = x["k_descale"]
    if draw.chance(0.3):
        x["out"] = draw.poison(B, S_q, Hq, Dv, dtype=out_dtype).transpose(1, 2)
    if draw.chance(0.2):
        return illegal(draw, "decode_over_pages", x, faults(draw, x))

    def verify(result: Any) -> list[str]:
        out, lse = result
        scale = D**-0.5 if x["softmax_scale"] is None else x["softmax_scale"]
        truth = []
        for b, n in enumerate(lengths):
            keep, bias = oracle.split_mask(masks["mask"], b, B, n)
            position = torch.arange(n)
            if masks["tail"] is not None:
                tail = masks["tail"].cpu().expand(B, -1, -1, -1)[b]
                # [Hq|1, S_q, n]: the last S_q keys by the mask, all before them
                new = (position - (n - S_q)).clamp_min(0)
                keep = tail[:, :, new] | (position < n - S_q)
            elif masks["mask"] is None and causal:
                keep = position <= n - S_q + torch.arange(S_q)[:, None]
            factors = [oracle.factor(x.get(f"{name}_descale"), b, B, Hk) for name in "qkv"]
            truth.append(
                oracle.attention(
                    oracle.float64(q[b]) * factors[0].repeat_interleave(Hq // Hk, 0),
                    oracle.float64(rows[b][0]) * factors[1], oracle.float64(rows[b][1]) * factors[2],
                    scale, keep, bias, x["attn_sink"],
                )
            )  # fmt: skip
        return oracle.judge(out, lse, truth, dtype, stored=stored)

    return legal(draw, "decode_over_pages", x, verify, [x["out"]] if "out" in x else [])


def bytes_of(tensor: Tensor) -> Tensor:
    """FP8 as bytes, which torch can index; anything else as it is."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def faults(draw: Draw, x: dict[str, Any]) -> list[Fault]:
    """What decode_over_pages refuses."""
    k_pages, table, q = x["k_pages"], x["block_table"], x["q"]
    B, Hq, S_q, D = q.shape
    odd = k_pages[:, :8] if x["layout"] == "NHD" else k_pages[:, :, :8]
    other = torch.float16 if q.dtype != torch.float16 else torch.bfloat16
    return [
        ("a layout of another name", (ShapeError,), lambda x: x.update(layout="BSHD")),
        ("pages of 8 tokens", (BlockCountError, ShapeError), lambda x: x.update(k_pages=odd)),
        ("q of another D", (ShapeError,), lambda x: x.update(q=torch.cat([q, q], -1))),
        ("a cache of another dtype", (DTypeError,), lambda x: x.update(k_pages=k_pages.to(other))),
        ("a table of another batch", (ShapeError,), lambda x: x.update(block_table=torch.cat([table, table]))),
        ("v_head_dim past the columns", (ShapeError,), lambda x: x.update(v_head_dim=D + 8)),
        (
            "out whose rows are not contiguous",
            (LayoutError, DTypeError, ShapeError),
            lambda x: x.update(out=draw.poison(B, Hq, S_q, 2 * D, dtype=q.dtype)[..., ::2]),
        ),
        ("pages that are a list", (ShapeError,), lambda x: x.update(k_pages=[1])),
    ]
