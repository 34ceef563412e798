"""What the library is measured against: other ways to the same result, only from what pip installed.

Gathers go into buffers made beforehand and are timed: whoever keeps KV in pages must gather before calling SDPA.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_mla.bench.cases import Arguments, Case
from flash_mla.problem import BLOCK
from flash_mla.testing import DecodeCase

__all__ = ["Peer", "peers"]


class Peer(NamedTuple):
    """A way to compute the case, or the reason why it cannot run here.

    run gives out in our shape. gated: its result must pass the same gate as ours; False only for a call of ours that
    computes something else on purpose (the dense result beside the block-sparse one).
    """

    run: Callable[[], Tensor] | None
    reason: str = ""
    gated: bool = True


def peers(case: Case, arguments: Arguments) -> dict[str, Peer]:
    """Name -> peer, in the order of the tables."""
    return decode_peers(case, arguments) if isinstance(case.spec, DecodeCase) else prefill_peers(case, arguments)


def decode_peers(case: Case, arguments: Arguments) -> dict[str, Peer]:
    """For S_q = 1 and requests of one length, which is a multiple of 64."""
    q, k_cache, v_cache = arguments["q"], arguments["k_cache"], arguments["v_cache"]
    if q.shape[2] > 1:
        return {}
    alias = k_cache.data_ptr() == v_cache.data_ptr()
    table = arguments["block_table"][:, : int(arguments["seq_lens"][0]) // BLOCK].contiguous()
    kv = gather([k_cache] if alias else [k_cache, v_cache], table)
    found = {"gather + SDPA": Peer(partial(sdpa_rows, kv, q, k_cache.shape[1], case.Dv))}
    if not alias:
        found["gather + SDPA GQA"] = Peer(partial(sdpa_gqa, kv, q))
    elif q.device.type == "cpu":
        found["gather + flash V=K"] = Peer(partial(flash_v_is_k, kv, q, case.Dv))
        found["vLLM CPU"] = vllm_cpu(q, k_cache, table, arguments["seq_lens"], case.Dv)
    if k_cache.stride(0) == 0 and len(k_cache) > 1:
        found["ours in a slab"] = Peer(case.function(arguments | slabs(k_cache, v_cache, table)))
    return found


def prefill_peers(case: Case, arguments: Arguments) -> dict[str, Peer]:
    """For Hq = Hk."""
    q, k, v, blocks = (arguments[name] for name in ("q", "k", "v", "sparse_layout"))
    if blocks is not None:
        mask = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        return {
            "SDPA + mask": Peer(partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)),
            "ours, dense": Peer(case.function(arguments | {"sparse_layout": None}), gated=False),
        }
    found = {"SDPA": Peer(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))}
    if q.device.type == "cuda":
        found["SDPA cuDNN"] = Peer(partial(sdpa_cudnn, q, k, v))
    return found


def gather(caches: list[Tensor], table: Tensor) -> Callable[[], list[Tensor]]:
    """A function that copies the blocks of table [B, used] in order into buffers [B, Hk, used * 64, D]."""
    B, used = table.shape
    buffers = [c.new_empty(B, c.shape[1], used, BLOCK, c.shape[-1]) for c in caches]

    def run() -> list[Tensor]:
        for cache, buffer in zip(caches, buffers, strict=True):
            for b in range(B):
                # NOTE: whole blocks a request: 8 GB/s on the development CPU, where one call for the batch makes 7.
                torch.index_select(cache[b], 1, table[b], out=buffer[b])
        return [buffer.flatten(2, 3) for buffer in buffers]

    return run


def sdpa_rows(kv: Callable[[], list[Tensor]], q: Tensor, Hk: int, Dv: int) -> Tensor:
    """Gather, then SDPA with the query heads of a group as the rows of its KV head."""
    k, *v = kv()
    rows = q.view(len(q), Hk, -1, q.shape[-1])
    out = F.scaled_dot_product_attention(rows, k, v[0] if v else k[..., :Dv])
    return out.reshape(*q.shape[:3], Dv)


def sdpa_gqa(kv: Callable[[], list[Tensor]], q: Tensor) -> Tensor:
    """Gather, then SDPA with enable_gqa=True."""
    k, v = kv()
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal SDPA, cuDNN's kernel or an error."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flash_v_is_k(kv: Callable[[], list[Tensor]], q: Tensor, Dv: int) -> Tensor:
    """Gather, then the CPU flash op with V = K and the last columns of its output dropped: the careful variant."""
    (k,) = kv()
    rows = q.transpose(1, 2)  # [B, 1, Hq, D]: the heads are rows of the one KV head
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k, k)
    return out[..., :Dv].transpose(1, 2)


def vllm_cpu(q: Tensor, k_cache: Tensor, table: Tensor, lengths: Tensor, Dv: int) -> Peer:
    """vLLM's CPU MLA decode on slabs; it reads pages of 16 rows: our blocks are four of them, where they lie."""
    if importlib.util.find_spec("vllm") is None:
        return Peer(None, "vllm is not installed")
    try:
        from vllm import _custom_ops
    except ImportError as error:
        return Peer(None, f"vllm does not import: {error}")
    if not hasattr(_custom_ops, "mla_decode_kvcache_cpu"):
        return Peer(None, "this vllm build has no mla_decode_kvcache_cpu")
    B, Hq, _, D = q.shape
    pages, per_block = k_cache.view(-1, 16, D), BLOCK // 16
    block = torch.arange(B)[:, None] * k_cache.shape[2] + table
    page_table = (block[:, :, None] * per_block + torch.arange(per_block)).flatten(1).int()
    out = q.new_empty(B, Hq, Dv)

    def run() -> Tensor:
        _custom_ops.mla_decode_kvcache_cpu(out, q[:, :, 0], pages, D**-0.5, page_table, lengths)
        return out[:, :, None]

    return Peer(run)


def slabs(k_cache: Tensor, v_cache: Tensor, table: Tensor) -> Arguments:
    """The same tokens in a slab a request that holds nothing else, in shuffled order."""
    B, used = table.shape
    order = torch.stack([torch.randperm(used, device=table.device) for _ in range(B)])
    blocks = table.long().gather(1, order)
    k, v = (torch.stack([cache[b].index_select(1, blocks[b]) for b in range(B)]) for cache in (k_cache, v_cache))
    return {"k_cache": k, "v_cache": v, "block_table": order.argsort(1).int()}
