"""The truth in float64: obvious and slow, one request and one head at a time. It shares no code with a backend.

Each function takes the tensors of a public function and returns (out, lse) in float64. Nothing is validated. torch
differentiates them: the gradients of a row without keys, and of what nobody sees, are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "decode_reference",
    "format_rows",
    "index_reference",
    "mha_reference",
    "prefill_reference",
    "sparse_reference",
    "topk_reference",
]

BLOCK = 64


def attend_head(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None, scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [M, D], k [S, D], v [S, Dv], keep [M, S] bool, bias [M, S], sink [M] or [] -> out [M, Dv], lse [M]."""
    scores = scale * (q @ k.T)
    if bias is not None:
        keep = keep & (bias != -math.inf)
        scores = scores + bias.double().masked_fill(~keep, 0.0)
    scores = scores.masked_fill(~keep, -math.inf)
    empty = ~keep.any(-1)
    lse = torch.logsumexp(scores, dim=-1)
    seen_lse = lse.masked_fill(empty, 0.0)  # -inf minus -inf has no gradient, and no value
    out = torch.exp(scores - seen_lse[:, None]) @ v
    if sink is not None:
        out = out * torch.sigmoid(seen_lse - sink)[:, None]
    return out, lse


def gather(cache: Tensor, table_row: Tensor, b: int, h: int, length: int) -> Tensor:
    """The first `length` rows of request b, head h of a page view, in order, in float64: [length, D]."""
    blocks = [cache[b, h, int(block)] for block in table_row[: -(-length // BLOCK)]]
    if not blocks:
        return torch.zeros(0, cache.shape[-1], dtype=torch.float64, device=cache.device)
    return torch.cat(blocks)[:length].double()


def descale(value: float | Tensor | None, b: int, h: int, shape: tuple[int, int]) -> float:
    """The factor of request b and KV head h."""
    if value is None:
        return 1.0
    return float(torch.as_tensor(value, dtype=torch.float64).expand(shape)[b, h])


def split_mask(mask: Tensor | None, b: int, h: int, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """(keep, bias) of request b and head h; either is None where the mask is not of that kind."""
    if mask is None:
        return None, None
    part = mask.expand(shape + mask.shape[-1:])[b, h]
    return (part, None) if part.dtype == torch.bool else (None, part)


def decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    attn_sink: Tensor | None = None,
    tail_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_mla_with_kvcache` in float64: out [B, Hq, S_q, Dv], lse [B, Hq, S_q]."""
    B, Hq, S_q, D = q.shape
    Hk, Dv = k_cache.shape[1], v_cache.shape[-1]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(B, Hq, S_q, Dv, dtype=torch.float64, device=q.device)
    lse = torch.full((B, Hq, S_q), -math.inf, dtype=torch.float64, device=q.device)
    for b in range(B):
        length = int(seq_lens[b])
        t = torch.arange(length, device=q.device)
        for h in range(Hq):
            hk = h // (Hq // Hk)
            k = gather(k_cache, block_table[b], b, hk, length) * descale(k_descale, b, hk, (B, Hk))
            v = gather(v_cache, block_table[b], b, hk, length) * descale(v_descale, b, hk, (B, Hk))
            rows = q[b, h].double() * descale(q_descale, b, hk, (B, Hk))
            whole = mask
            if tail_mask is not None:
                tail = tail_mask[min(b, tail_mask.shape[0] - 1), min(h, tail_mask.shape[1] - 1)]  # [S_q, S_q]
                seen = tail.new_full((S_q, max(length - S_q, 0)), tail.dtype == torch.bool)
                whole = torch.cat([seen, tail[:, max(S_q - length, 0) :]], 1).expand(B, Hq, -1, -1)
            keep, bias = split_mask(whole, b, h, (B, Hq, S_q))
            if whole is None:
                keep = t[None] <= length - S_q + torch.arange(S_q, device=q.device)[:, None]
            keep = torch.ones(S_q, length, dtype=torch.bool, device=q.device) if keep is None else keep[:, :length]
            bias = None if bias is None else bias[:, :length]
            sink = None if attn_sink is None else attn_sink[h].double()
            out[b, h], lse[b, h] = attend_head(rows, k, v, keep, bias, scale, sink)
    return out, lse


def prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    seq_lens: Tensor | None = None,
    q_descale: float | Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    attn_sink: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`flash_mla_prefill` in float64; block_mask is bool [B|1, Hq|1, ceil(P/64), ceil(S/64)].

    `start` is the position of the first query among the keys.
    """
    B, Hq, P, D = q.shape
    Hk, S, Dv = k.shape[1], k.shape[2], v.shape[-1]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(B, Hq, P, Dv, dtype=torch.float64, device=q.device)
    lse = torch.full((B, Hq, P), -math.inf, dtype=torch.float64, device=q.device)
    for b in range(B):
        length = S if seq_lens is None else int(seq_lens[b])
        i = start + torch.arange(P, device=q.device)[:, None]
        t = torch.arange(length, device=q.device)[None]
        for h in range(Hq):
            hk = h // (Hq // Hk)
            keep = (t <= i) if causal else torch.ones(P, length, dtype=torch.bool, device=q.device)
            mask_keep, bias = split_mask(attn_mask, b, h, (B, Hq, P))
            if mask_keep is not None:
                keep = keep & mask_keep[:, :length]
            if block_mask is not None:
                blocks = block_mask.expand(B, Hq, -1, -1)[b, h]
                keep = keep & blocks.repeat_interleave(BLOCK, 0)[:P].repeat_interleave(BLOCK, 1)[:, :length]
            out[b, h], lse[b, h] = attend_head(
                q[b, h].double() * descale(q_descale, b, hk, (B, Hk)),
                k[b, hk, :length].double() * descale(k_descale, b, hk, (B, Hk)),
                v[b, hk, :length].double() * descale(v_descale, b, hk, (B, Hk)),
                keep,
                None if bias is None else bias[:, :length],
                scale,
                None if attn_sink is None else attn_sink[h].double(),
            )
    return out, lse


def mha_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    attn_mask: Tensor | None = None,
    *,
    start_pos: Tensor | None = None,
    causal: bool,
    softmax_scale: float | None = None,
    **descales: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`mha_fwd_kvcache` in float64, on a cache that already holds the prompt."""
    B, _, P, _ = q.shape
    results = []
    for b in range(B):
        start = 0 if start_pos is None else int(start_pos[b])
        k, v = (
            torch.stack([gather(cache, block_table[b], b, h, start + P) for h in range(cache.shape[1])])[None]
            for cache in (k_cache, v_cache)
        )
        mask = None if attn_mask is None else attn_mask.expand(B, -1, -1, -1)[b : b + 1]
        factors = {
            name: None if value is None else torch.as_tensor(value).expand(B, k.shape[1])[b : b + 1]
            for name, value in descales.items()
        }
        results.append(
            prefill_reference(
                q[b : b + 1], k, v, None, mask, causal=causal, softmax_scale=softmax_scale, start=start, **factors
            )
        )
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


# --- What flash_mla.deepseek computes ---------------------------------------------------------------------------------


def format_rows(cache: Tensor, name: str | None) -> Tensor:
    """The rows of a pool [num_blocks, page, 1, D, or the bytes of a row format], in float64: [num_blocks * page, D].

    A dequantised value is rounded to BF16, as every format says.
    """
    if name is None:
        return cache.flatten(0, 2).double()
    pages, page, _, size = cache.shape
    bits = cache.view(torch.uint8).squeeze(2)  # [pages, page, size]
    if name == "flat":
        return to_e4m3(bits).flatten(0, 1)
    if name == "fp8_ds_mla":
        latent, scales = to_e4m3(bits[..., :512]), bits[..., 512:528].contiguous().view(torch.float32).double()
        rope = bits[..., 528:]
    elif name == "v4.1":
        latent, scales, rope = to_e4m3(bits[..., :512]), 2.0 ** (bits[..., 512:].double() - 127), bits[..., :0]
    elif name == "fp8_token":
        page_bytes = bits.as_strided((pages, page * size), (bits.stride(0), 1))
        rows = page_bytes[:, : page * 640].unflatten(1, (page, 640))
        scales = page_bytes[:, page * 640 :].contiguous().view(torch.float32).double().unsqueeze(-1)
        latent, rope = to_e4m3(rows[..., :512]), rows[..., 512:]
    else:
        assert name == "model1"
        page_bytes = bits.as_strided((pages, page * size), (bits.stride(0), 1))
        rows = page_bytes[:, : page * 576].unflatten(1, (page, 576))
        exponents = page_bytes[:, page * 576 :].unflatten(1, (page, 8))[..., :7]
        latent, scales, rope = to_e4m3(rows[..., :448]), 2.0 ** (exponents.double() - 127), rows[..., 448:]
    latent = latent * scales.repeat_interleave(latent.shape[-1] // scales.shape[-1], -1)
    both = [latent.bfloat16().double(), rope.contiguous().view(torch.bfloat16).double()]
    return torch.cat(both, -1).flatten(0, 1)


def to_e4m3(bits: Tensor) -> Tensor:
    """e4m3 bytes in float64."""
    return bits.contiguous().view(torch.float8_e4m3fn).double()


def sparse_reference(
    q: Tensor,
    pools: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    Dv: int,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query token to the rows that it names, in float64.

    Args:
        q: [B, S_q, Hq, D].
        pools: (rows [n, D] float64, indices [B, S_q, topk], lengths [B] or None: how many of them count), each.
        Dv: columns of a row that are V.

    Returns:
        out [B, Hq, S_q, Dv], lse and greatest scaled score [B, Hq, S_q].
    """
    B, S_q, Hq, _ = q.shape
    out = torch.zeros(B, Hq, S_q, Dv, dtype=torch.float64, device=q.device)
    lse = torch.full((B, Hq, S_q), -math.inf, dtype=torch.float64, device=q.device)
    top = lse.clone()
    for b in range(B):
        for i in range(S_q):
            named = []
            for rows, indices, lengths in pools:
                row = indices[b, i] if lengths is None else indices[b, i, : max(int(lengths[b]), 0)]
                named.append(rows[row[(row >= 0) & (row < len(rows))].long()])
            k = torch.cat(named)
            if not len(k):
                continue
            query, sink = q[b, i].double(), None if attn_sink is None else attn_sink.double()
            keep = torch.ones(Hq, len(k), dtype=torch.bool, device=q.device)
            out[b, :, i], lse[b, :, i] = attend_head(query, k, k[:, :Dv], keep, None, softmax_scale, sink)
            top[b, :, i] = (softmax_scale * (query @ k.T)).amax(-1)
    return out, lse, top


# --- What flash_mla.indexer computes ----------------------------------------------------------------------------------


def index_reference(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The scores of keys laid end to end, `mqa_logits` in float64: [S_q, S_kv], -inf where a query sees no key."""
    products = torch.einsum("ihd,td->iht", q.double(), k.double() * k_scale.double()[:, None])
    scores = torch.einsum("iht,ih->it", products.relu(), weights.double())
    t = torch.arange(len(k), device=k.device)
    return scores.masked_fill((t < starts[:, None]) | (t >= ends[:, None]), -math.inf)


def topk_reference(scores: Tensor, topk: int) -> Tensor:
    """The columns of each row's topk greatest scores, equal ones from the left, in order; then -1: [rows, topk]."""
    columns = torch.full((len(scores), topk), -1, dtype=torch.int32, device=scores.device)
    for row, kept in zip(scores, columns, strict=True):
        row = torch.where(row.isnan(), -math.inf, row)
        best = torch.sort(row, descending=True, stable=True).indices[: min(topk, int((row > -math.inf).sum()))]
        kept[: len(best)] = best.sort().values
    return columns
