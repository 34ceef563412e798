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

from flash_mla.bench.cases import DecodeCase, DecodeInputs, PrefillCase, PrefillInputs
from flash_mla.problem import BLOCK

__all__ = ["Peer", "decode_peers", "prefill_peers"]


class Peer(NamedTuple):
    """A way to compute the case, or the reason why it cannot run here.

    run gives out in our shape. gated: its result must pass the same gate as ours; False only for a call of ours that
    computes something else on purpose (the dense result beside the block-sparse one).
    """

    run: Callable[[], Tensor] | None
    reason: str = ""
    gated: bool = True


def decode_peers(case: DecodeCase, inputs: DecodeInputs) -> dict[str, Peer]:
    """Name -> peer, for S_q = 1 and requests that are used to the full."""
    if case.S_q > 1:
        return {}
    kv = gather(inputs)
    peers = {"gather + SDPA": Peer(partial(sdpa_rows, kv, inputs.q, case))}
    if not case.alias:
        peers["gather + SDPA enable_gqa"] = Peer(partial(sdpa_gqa, kv, inputs.q))
    elif inputs.q.device.type == "cpu":
        peers["gather + flash op, V = K"] = Peer(partial(flash_v_is_k, kv, inputs.q, case.Dv))
        peers["vLLM CPU"] = vllm_cpu(case, inputs)
    if case.pool != "slab":
        peers["ours, slab cache"] = Peer(case.call(slabs(inputs)))
    return peers


def prefill_peers(case: PrefillCase, inputs: PrefillInputs) -> dict[str, Peer]:
    """Name -> peer, for Hq = Hk."""
    q, k, v, blocks = inputs
    if blocks is not None:
        mask = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        return {
            "SDPA + mask": Peer(partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)),
            "ours, dense": Peer(case.call(inputs._replace(blocks=None)), gated=False),
        }
    peers = {"SDPA": Peer(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))}
    if q.device.type == "cuda":
        peers["SDPA cuDNN"] = Peer(partial(sdpa_cudnn, q, k, v))
    return peers


def gather(inputs: DecodeInputs) -> Callable[[], list[Tensor]]:
    """A function that copies K and V (K alone where V lies in it) in order into buffers [B, Hk, S, D]."""
    _, k_cache, v_cache, table, _ = inputs
    caches = [k_cache] if k_cache.data_ptr() == v_cache.data_ptr() else [k_cache, v_cache]
    B, used = table.shape
    buffers = [c.new_empty(B, c.shape[1], used, BLOCK, c.shape[-1]) for c in caches]

    def run() -> list[Tensor]:
        for cache, buffer in zip(caches, buffers, strict=True):
            for b in range(B):
                # NOTE: whole blocks a request: 8 GB/s on the development CPU, where one call for the batch makes 7.
                torch.index_select(cache[b], 1, table[b], out=buffer[b])
        return [buffer.flatten(2, 3) for buffer in buffers]

    return run


def sdpa_rows(kv: Callable[[], list[Tensor]], q: Tensor, case: DecodeCase) -> Tensor:
    """Gather, then SDPA with the query heads of a group as the rows of its KV head."""
    k, *v = kv()
    rows = q.view(case.B, case.Hk, -1, case.D)
    out = F.scaled_dot_product_attention(rows, k, v[0] if v else k[..., : case.Dv])
    return out.reshape(case.B, case.Hq, 1, case.Dv)


def sdpa_gqa(kv: Callable[[], list[Tensor]], q: Tensor) -> Tensor:
    """Gather, then SDPA as it documents grouped heads."""
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


def vllm_cpu(case: DecodeCase, inputs: DecodeInputs) -> Peer:
    """vLLM's CPU MLA decode, which reads pages of 16 rows: our blocks are four of them, where they lie."""
    if importlib.util.find_spec("vllm") is None:
        return Peer(None, "vllm is not installed")
    try:
        from vllm import _custom_ops
    except ImportError as error:
        return Peer(None, f"vllm does not import: {error}")
    q, k_cache, _, table, lengths = inputs
    if not hasattr(_custom_ops, "mla_decode_kvcache_cpu"):
        return Peer(None, "this vllm build has no mla_decode_kvcache_cpu")
    pages = k_cache.view(-1, 16, case.D)
    per_block = BLOCK // 16
    first = torch.arange(case.B, dtype=torch.int32)[:, None] * table.shape[1] + table
    page_table = (first[:, :, None] * per_block + torch.arange(per_block, dtype=torch.int32)).flatten(1).contiguous()
    out = q.new_empty(case.B, case.Hq, case.Dv)

    def run() -> Tensor:
        _custom_ops.mla_decode_kvcache_cpu(out, q[:, :, 0], pages, case.D**-0.5, page_table, lengths)
        return out[:, :, None]

    return Peer(run)


def slabs(inputs: DecodeInputs) -> DecodeInputs:
    """The same blocks in a slab a request that holds no others, in shuffled order."""
    q, k_cache, v_cache, table, lengths = inputs
    B, used = table.shape
    order = torch.stack([torch.randperm(used, device=table.device) for _ in range(B)])
    k, v = (torch.stack([c[b, :, table[b].long()[order[b]]] for b in range(B)]) for c in (k_cache, v_cache))
    return DecodeInputs(q, k, v, order.argsort(1).int(), lengths)
