"""What the public functions and the custom ops behind them share: a call's checks and plan, and its attention."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from flash_mla import contract
from flash_mla.contract import DecodeCall, Descales, MhaCall, MLAMetadata, PrefillCall
from flash_mla.launch import launch_prefill
from flash_mla.passed import Passed, spans
from flash_mla.plan import Plan, plan
from flash_mla.problem import AppendArgs, DecodeProblem, PrefillProblem


class Served(NamedTuple):
    """What a call that passed its checks leaves to one with the same facts.

    plan: a weak one, so that a backend that comes or goes is noticed: `plan` forgets it then. spans: of out, then of
    the call's tensors.
    """

    plan: ReferenceType[Plan]
    spans: tuple[int, ...]


# NOTE: a look-up takes 3 us, where the checks of a decode take 16, those of `out` 30 and the plan of a problem 3.
SERVED = Passed[Served]()

Call = TypeVar("Call", DecodeCall, PrefillCall, MhaCall)
Posed = TypeVar("Posed", DecodeProblem, PrefillProblem)


def plan_once(
    call: Call,
    rest: Hashable | None,
    check: Callable[[Call], Posed],
    backend: str | None,
    out: Tensor | None,
) -> Plan:
    """The plan of a call, checked but for values; where one like it passed before, only for what facts do not tell.

    Args:
        rest: what the checks look at beside the call's tensors and out; None: nothing is remembered.
        check: the call's checks, which give its problem.
    """
    found = SERVED.get((*call.tensors, out), rest)
    chosen = None if found is None else found.plan()
    if found is None or chosen is None:
        chosen = plan(contract.check_out(out, check(call), call), backend)
        if rest is not None:
            SERVED.keep((*call.tensors, out), rest, Served(ref(chosen), spans(out, *call.tensors)))
        return chosen
    if out is not None:
        contract.check_out_again(out, found.spans, call)
    if isinstance(call, MhaCall):
        contract.check_places_again(found.spans[1:], call)
    return chosen


# --- Decode -----------------------------------------------------------------------------------------------------------


def plan_decode(
    call: DecodeCall, metadata: MLAMetadata | None, backend: str | None, out: Tensor | None, check_values: bool = True
) -> Plan:
    """Every check of the call, and its plan. Values are checked where nobody has."""
    rest = contract.rest_of(call, call.k_cache, call.v_cache, call.options, backend)
    chosen = plan_once(call, rest, contract.decode, backend, out)
    problem = chosen.problem
    assert isinstance(problem, DecodeProblem)
    if call.softmax_scale is None and problem.alias:
        contract.warn_default_scale(problem.D, problem.Dv, stacklevel=4)
    if metadata is not None:
        if not (isinstance(metadata, MLAMetadata) and metadata.fits(problem)):
            contract.check_metadata(metadata, call.q, call.k_cache, call.v_cache, call.block_table)
    elif check_values:
        longest = contract.check_values(call.block_table, call.seq_lens, problem.Nblk)
        contract.check_mask_length("mask", None if call.options.tail else call.mask, longest)
    return chosen


# --- Prefill ----------------------------------------------------------------------------------------------------------


def plan_prefill(call: PrefillCall, backend: str | None, out: Tensor | None) -> Plan:
    """Every check of the call, and its plan."""
    rest = contract.rest_of(call, call.k, call.v, call.causal, backend)
    chosen = plan_once(call, rest, contract.prefill, backend, out)
    contract.check_prefill_lengths(call.seq_lens, call.q.shape[2])
    return chosen


def attend_prefill(
    chosen: Plan, call: PrefillCall, out: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of the call."""
    return launch_prefill(
        chosen, "flash_mla_prefill", q=call.q, k=call.k, v=call.v, block_table=None, seq_lens=call.seq_lens,
        mask=call.attn_mask, softmax_scale=call.softmax_scale, descales=call.descales, attn_sink=call.attn_sink,
        out=out, return_lse=return_lse, start_pos=None, block_mask=call.sparse_layout,
    )  # fmt: skip


# --- Prefill over the cache -------------------------------------------------------------------------------------------


def plan_mha(call: MhaCall, backend: str | None, out: Tensor | None) -> Plan:
    """Every check of the call, and its plan. Nothing is written yet."""
    rest = contract.rest_of(call, call.k_cache, call.v_cache, call.causal, backend)
    chosen = plan_once(call, rest, contract.mha, backend, out)
    problem = chosen.problem
    assert isinstance(problem, PrefillProblem)
    longest = contract.check_prompt_values(
        call.block_table, call.start_pos, problem, call.k_cache, writes=call.k is not None
    )
    contract.check_mask_length("attn_mask", call.attn_mask, longest)
    return chosen


def append_mha(chosen: Plan, call: MhaCall) -> None:
    """Write the call's k and v to the caches, if it has them; `plan_mha` has refused one without the other."""
    if call.k is not None:
        chosen.append(AppendArgs(call.k, call.v, call.k_cache, call.v_cache, call.block_table, call.start_pos, None))


def attend_mha(chosen: Plan, call: MhaCall, out: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of the call, after its rows are written. A gradient to k and v is refused."""
    start_pos = call.start_pos
    return launch_prefill(
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
