"""What the public functions and the custom ops behind them have in common: a call's checks and plan, and its attention.

A call is what the user gave, with `causal` settled and blocks as a tensor, but for out and backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.contract import Descales, MLAMetadata
from flash_mla.launch import launch
from flash_mla.plan import Plan, plan
from flash_mla.problem import PLAIN, AppendArgs, Options

# --- Decode -----------------------------------------------------------------------------------------------------------


def plan_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor | None,
    metadata: MLAMetadata | None,
    softmax_scale: float | None,
    descales: Descales,
    attn_sink: Tensor | None,
    backend: str | None,
    out: Tensor | None,
    check_values: bool = True,
    options: Options = PLAIN,
) -> Plan:
    """Every check of a `flash_mla_with_kvcache` call, and its plan. Values are checked where nobody has."""
    problem = contract.decode(
        q, k_cache, v_cache, block_table, seq_lens, mask, descales, attn_sink, softmax_scale, options
    )
    if softmax_scale is None and problem.alias:
        contract.warn_default_scale(problem.D, problem.Dv, stacklevel=4)
    if out is not None:
        q_descale, k_descale, v_descale = descales
        problem = contract.check_out(
            out, problem, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens, mask=mask,
            q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attn_sink=attn_sink,
        )  # fmt: skip
    chosen = plan(problem, backend)
    if metadata is not None:
        if not (isinstance(metadata, MLAMetadata) and metadata.fits(problem)):
            contract.check_metadata(metadata, q, k_cache, v_cache, block_table)
    elif check_values:
        longest = contract.check_values(block_table, seq_lens, problem.Nblk)
        contract.check_mask_length("mask", None if options.tail else mask, longest)
    return chosen


# --- Prefill ----------------------------------------------------------------------------------------------------------


class PrefillCall(NamedTuple):
    """A `flash_mla_prefill` call; blocks: bool [B, Hq, ceil(P/64), ceil(P/64)]."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor | None
    attn_mask: Tensor | None
    causal: bool
    softmax_scale: float | None
    seq_lens: Tensor | None
    descales: Descales
    attn_sink: Tensor | None


def plan_prefill(call: PrefillCall, backend: str | None, out: Tensor | None) -> Plan:
    """Every check of the call, and its plan."""
    q, k, v, blocks, attn_mask, causal, softmax_scale, seq_lens, descales, attn_sink = call
    problem = contract.prefill(
        q, k, v, seq_lens, attn_mask, descales, attn_sink, softmax_scale, causal=causal, block_mask=blocks is not None
    )
    contract.check_mask_length("attn_mask", attn_mask, problem.P)
    q_descale, k_descale, v_descale = descales
    problem = contract.check_out(
        out, problem, q=q, k=k, v=v, sparse_layout=blocks, attn_mask=attn_mask, seq_lens=seq_lens, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, attn_sink=attn_sink,
    )  # fmt: skip
    return plan(problem, backend)


def attend_prefill(
    chosen: Plan, call: PrefillCall, out: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of the call."""
    return launch(
        chosen, "flash_mla_prefill", q=call.q, k=call.k, v=call.v, block_table=None, seq_lens=call.seq_lens,
        mask=call.attn_mask, softmax_scale=call.softmax_scale, descales=call.descales, attn_sink=call.attn_sink,
        out=out, return_lse=return_lse, start_pos=None, block_mask=call.blocks,
    )  # fmt: skip


# --- Prefill over the cache -------------------------------------------------------------------------------------------


class MhaCall(NamedTuple):
    """A `mha_fwd_kvcache` call."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    attn_mask: Tensor | None
    k: Tensor | None
    v: Tensor | None
    start_pos: Tensor | None
    causal: bool
    softmax_scale: float | None
    descales: Descales


def plan_mha(call: MhaCall, backend: str | None, out: Tensor | None) -> Plan:
    """Every check of the call, and its plan. Nothing is written yet."""
    q, k_cache, v_cache, block_table, attn_mask, k, v, start_pos, causal, softmax_scale, descales = call
    problem = contract.mha(
        q, k_cache, v_cache, block_table, start_pos, k, v, attn_mask, descales, softmax_scale, causal=causal
    )
    q_descale, k_descale, v_descale = descales
    problem = contract.check_out(
        out, problem, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, attn_mask=attn_mask, k=k, v=v,
        start_pos=start_pos, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    chosen = plan(problem, backend)
    longest = contract.check_prompt_values(block_table, start_pos, problem, k_cache, writes=k is not None)
    contract.check_mask_length("attn_mask", attn_mask, longest)
    return chosen


def append_mha(chosen: Plan, call: MhaCall) -> None:
    """Write the call's k and v to the caches, if it has them; `plan_mha` has refused one without the other."""
    if call.k is not None:
        chosen.append(AppendArgs(call.k, call.v, call.k_cache, call.v_cache, call.block_table, call.start_pos, None))


def attend_mha(chosen: Plan, call: MhaCall, out: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of the call, after its rows are written. A gradient to k and v is refused."""
    start_pos = call.start_pos
    return launch(
        chosen, "mha_fwd_kvcache", q=call.q, k=call.k_cache, v=call.v_cache, block_table=call.block_table,
        seq_lens=None if start_pos is None else start_pos + call.q.shape[2], mask=call.attn_mask,
        softmax_scale=call.softmax_scale, descales=call.descales, attn_sink=None, out=out, return_lse=return_lse,
        also=(call.k, call.v), start_pos=None if start_pos is None else start_pos.contiguous(), block_mask=None,
    )  # fmt: skip


# --- Custom ops -------------------------------------------------------------------------------------------------------


def as_tensors(descales: Descales, q: Tensor) -> list[Tensor | None]:
    """The descales as a custom op takes them; it checks them."""
    return [
        x if x is None or isinstance(x, Tensor) else torch.full((), float(x), dtype=torch.float32, device=q.device)
        for x in descales
    ]


def give_back(result: tuple[Tensor, Tensor], return_lse: bool, out: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """What a public function returns, from what its op returned."""
    first = result[0] if out is None else out.copy_(result[0])
    return (first, result[1]) if return_lse else first
