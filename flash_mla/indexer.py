"""The index of DeepSeek sparse attention (DSA): scores of all keys for a query token, and the keys of the greatest.

A small attention beside the real one decides which tokens that one reads. Index keys have 128 dims and one head; a
query token has a few dozen index heads, and a weight for each:

    score[i, t] = scale[t] * sum_h weights[i, h] * max(q[i, h] . k[t], 0)

`prefill_indices` and `decode_indices` go from queries to the `indices` that `flash_mla.deepseek`'s sparse functions
take; `mqa_logits`, `paged_mqa_logits` and `topk_indices` are their two steps. The scores and their names are those of
DeepGEMM's `fp8_mqa_logits` and `fp8_paged_mqa_logits` (DeepSeek-V3.2-Exp, 2025): same operands, same order, no schedule
to make beforehand. Nothing here waits for the GPU, and every call can be captured in a CUDA graph.

What stands for the scale of q, 1/sqrt(D) and 1/sqrt(H), the model multiplies into `weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla.contract import check_index, check_last_dim, check_on, check_rank, check_table, check_tensor, named
from flash_mla.entry import entry
from flash_mla.errors import BlockCountError, DTypeError, ShapeError
from flash_mla.plan import plan
from flash_mla.problem import BLOCK, FP8, IndexArgs, IndexProblem, TopkArgs, TopkProblem
from flash_mla.quant import RowFormat

__all__ = ["INDEX_ROWS", "decode_indices", "mqa_logits", "paged_mqa_logits", "prefill_indices", "topk_indices"]

INDEX_ROWS = RowFormat("index", quantised=128, rope=0, tile=128, scale_bytes=4, page_split=True, page_multiple=4)
"""The row of an index cache, DeepGEMM's and vLLM's: 132 bytes; 128 e4m3 of all rows of a page, then their FP32 scales.

Pages are [num_blocks, page, 1, 132]. Written by `INDEX_ROWS.quantise` or `append`, scales are powers of two.
"""

SCORE_BYTES = 256 << 20
"""Scores that prefill_indices holds at a time; more queries come in slices."""
ALIGNMENT = 64
"""Scores from one row to the next are a multiple of it, so that every row begins on 256 bytes."""
MAX_D = 256
MAX_H = 128


@entry("flash_mla.indexer")
def prefill_indices(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    topk: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """The rows of kv that each query token attends to, for `flash_mla_sparse_fwd` over sequences laid end to end.

    Args:
        q, kv, weights, starts, ends: as in `mqa_logits`.
        topk: rows a query, 1 to 4096; models have 512 to 2048.
        backend: as in `mqa_logits`.

    Returns:
        indices [S_q, 1, topk] int32, ascending, -1 past the last; ties as in `topk_indices`. Beside them the call takes
        memory for 256 MiB of scores.

    Raises:
        FlashMLAError: as `mqa_logits` and `topk_indices`.
    """
    check_ragged(q, kv, weights, starts, ends)
    check_topk(topk)
    S_q, S_kv = q.shape[0], kv[0].shape[0]
    out = torch.empty(S_q, 1, topk, dtype=torch.int32, device=q.device)
    step = max(1, SCORE_BYTES // (4 * max(S_kv, 1)))
    for i in range(0, S_q, step):
        rows = slice(i, i + step)
        scores = ragged_scores(q[rows], kv, weights[rows], starts[rows], ends[rows], False, backend)
        select(scores, S_kv, starts[rows], ends[rows], None, 0, out[rows, 0], backend)
    return out


@entry("flash_mla.indexer")
def decode_indices(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    topk: int,
    *,
    max_context_len: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The rows of the pool that each query token attends to, for sparse `flash_mla_with_kvcache`.

    Args:
        q, k_cache, weights, context_lens, block_table, max_context_len, backend: as in `paged_mqa_logits`. The cache
            that is attended to has the same pages: a token's latent lies where its index key does.
        topk: rows a query, 1 to 4096; models have 512 to 2048.

    Returns:
        indices [B, S_q, topk] int32, block * page + slot, in the order of the tokens, -1 past the last; ties as in
        `topk_indices`.

    Raises:
        FlashMLAError: as `paged_mqa_logits` and `topk_indices`.
    """
    limits, width = check_paged(q, k_cache, weights, context_lens, block_table, max_context_len)
    check_topk(topk)
    B, S_q = q.shape[:2]
    scores = paged_scores(q, k_cache, weights, limits, block_table, width, False, backend)
    out = torch.empty(B, S_q, topk, dtype=torch.int32, device=q.device)
    page = k_cache.shape[1]
    select(scores.flatten(0, 1), width, None, limits.flatten(), block_table, page, out.flatten(0, 1), backend)
    return out


@entry("flash_mla.indexer")
def mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    clean_logits: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Index scores of keys that lie end to end, as DeepGEMM's fp8_mqa_logits.

    Args:
        q: [S_q, H, D] e4m3; H up to 128, D a multiple of 16 up to 256; last dim contiguous.
        kv: (k [S_kv, D] e4m3, last dim contiguous; its scales [S_kv] FP32, not negative).
        weights: [S_q, H] FP32, of either sign.
        starts, ends: [S_q] int32 or int64 (DeepGEMM's cu_seq_len_k_start and _end): query i sees keys
            starts[i] <= t < ends[i], of those that are there.
        clean_logits: write -inf where a query does not see a key; otherwise anything may stand there.
        backend: run this backend or raise; None takes the first that can.

    Returns:
        scores [S_q, S_kv] FP32; rows begin on 256 bytes, so they may lie further apart than S_kv.

    Raises:
        FlashMLAError: a subclass that names what does not fit. Values are not checked.
    """
    check_ragged(q, kv, weights, starts, ends)
    return ragged_scores(q, kv, weights, starts, ends, clean_logits, backend)[:, : kv[0].shape[0]]


@entry("flash_mla.indexer")
def paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int | None = None,
    clean_logits: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Index scores of keys in pages, as DeepGEMM's fp8_paged_mqa_logits.

    Args:
        q: [B, S_q, H, 128] e4m3; H up to 128; last dim contiguous.
        k_cache: [num_blocks, page, 1, 132] bytes of INDEX_ROWS; page a multiple of 64.
        weights: [B, S_q, H] FP32, or [B * S_q, H] as DeepGEMM has them.
        context_lens: [B] int32 or int64, tokens of each request, the S_q new ones included: query i sees keys
            t <= context_lens[b] - S_q + i. Or [B, S_q]: query i sees keys t < context_lens[b, i].
        block_table: [B, blocks] int32 or int64, contiguous; entries past a request's last page may hold anything.
        max_context_len: columns of the result; None: all that a row of block_table covers.
        clean_logits, backend: as in `mqa_logits`.

    Returns:
        scores [B, S_q, max_context_len] FP32, column t for token t; rows begin on 256 bytes.

    Raises:
        FlashMLAError: a subclass that names what does not fit. Values are not checked.
    """
    limits, width = check_paged(q, k_cache, weights, context_lens, block_table, max_context_len)
    return paged_scores(q, k_cache, weights, limits, block_table, width, clean_logits, backend)[..., :width]


@entry("flash_mla.indexer")
def topk_indices(
    scores: Tensor,
    topk: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    page: int = BLOCK,
    backend: str | None = None,
) -> Tensor:
    """The columns of each row's topk greatest scores, in ascending order.

    Where more columns share the least score that is kept than there is room for, those furthest left are taken. A score
    of -inf or NaN is never taken. A row with fewer scores than topk ends with -1.

    Args:
        scores: [rows, N] FP32, last dim contiguous; fastest where N is a multiple of 16.
        topk: 1 to 4096 (any on the CPU).
        starts, ends: [rows] int32 or int64, only columns starts[i] <= t < ends[i] count; None: all.
        block_table: [B, blocks] int32 or int64, contiguous: rows are S_q = rows / B queries of each request, and column
            t becomes the index of its row in the pool, block_table[b, t // page] * page + t % page.
        page: tokens a page.
        backend: as in `mqa_logits`.

    Returns:
        [rows, topk] int32.

    Raises:
        FlashMLAError: a subclass that names what does not fit. Values are not checked.
    """
    check_tensor("scores", scores)
    check_rank("scores", scores.shape, 2, "[rows, N]")
    check_last_dim("scores", scores)
    check_float("scores", scores)
    check_topk(topk)
    check_on(scores.device, starts=starts, ends=ends, block_table=block_table)
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None:
            check_index(name, bound, scores.shape[:1], "[rows]")
    rows, N = scores.shape
    if block_table is not None:
        check_table(block_table, -1)
        B = block_table.shape[0]
        if not 1 <= page < 2**31 or (rows and (not B or rows % B)):
            raise ShapeError(
                f"{named(scores=scores, block_table=block_table)}, page = {page}",
                "rows a multiple of block_table's B, page from 1 to 2^31 - 1",
                "Each request has the same number of query rows",
            )
    out = torch.empty(rows, topk, dtype=torch.int32, device=scores.device)
    select(scores, N, starts, ends, block_table, page, out, backend)
    return out


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise DTypeError(
            f"{name} {tensor.dtype}", f"{name} float32", f"`{name}` is not FP32", f"Call {name}.float() before the call"
        )


def check_heads(q: Tensor, weights: Tensor) -> None:
    """e4m3 q with a head count and dim that the kernels take, and one weight a head."""
    if q.dtype != FP8:
        raise DTypeError(
            f"q {q.dtype}",
            "q float8_e4m3fn",
            "Index scores are products of e4m3",
            "Quantise q, and multiply its scale into weights",
        )
    check_last_dim("q", q)
    H, D = q.shape[-2:]
    if not 1 <= H <= MAX_H or not 16 <= D <= MAX_D or D % 16:
        raise ShapeError(
            named(q=q),
            f"1 to {MAX_H} index heads of D = a multiple of 16, at most {MAX_D}",
            f"No kernel has a tile for H = {H}, D = {D}",
            "Pad heads with weights of 0, and D with zeros",
        )
    check_float("weights", weights)
    if weights.shape != q.shape[:-1]:
        raise ShapeError(
            named(q=q, weights=weights), f"weights {list(q.shape[:-1])}", "There is not one weight for each query head"
        )


def check_ragged(q: Tensor, kv: tuple[Tensor, Tensor], weights: Tensor, starts: Tensor, ends: Tensor) -> None:
    """The arguments of `mqa_logits`."""
    check_tensor("q", q)
    check_rank("q", q.shape, 3, "[S_q, H, D]")
    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        raise ShapeError(
            f"kv is a {type(kv).__name__}", "kv = (k [S_kv, D], scales [S_kv])", "Keys need their scales", "Pass both"
        )
    k, k_scale = kv
    check_on(q.device, k=k, k_scale=k_scale, weights=weights, starts=starts, ends=ends)
    check_heads(q, weights)
    check_rank("k", k.shape, 2, "[S_kv, D]")
    check_last_dim("k", k)
    if k.dtype != FP8:
        raise DTypeError(f"k {k.dtype}", "k float8_e4m3fn", "Index scores are products of e4m3", "Quantise k")
    check_float("k_scale", k_scale)
    if k.shape[1] != q.shape[2] or k_scale.shape != k.shape[:1]:
        raise ShapeError(
            named(q=q, k=k, k_scale=k_scale), "k [S_kv, D] with q's D, k_scale [S_kv]", "Keys, scales and q do not fit"
        )
    check_index("starts", starts, q.shape[:1], "[S_q]")
    check_index("ends", ends, q.shape[:1], "[S_q]")


def check_paged(
    q: Tensor, k_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_context_len: int | None
) -> tuple[Tensor, int]:
    """The arguments of `paged_mqa_logits`: ([B, S_q], query i sees keys t < that; columns of the result)."""
    check_tensor("q", q)
    check_rank("q", q.shape, 4, "[B, S_q, H, D]")
    check_on(q.device, k_cache=k_cache, weights=weights, context_lens=context_lens, block_table=block_table)
    B, S_q, H, D = q.shape
    check_heads(q, weights.view(B, S_q, H) if weights.shape == (B * S_q, H) else weights)
    INDEX_ROWS.check(k_cache)
    if D != INDEX_ROWS.head_dim:
        raise ShapeError(
            named(q=q, k_cache=k_cache), f"q's D = {INDEX_ROWS.head_dim}", "Rows of an index cache hold 128 dims"
        )
    page = k_cache.shape[1]
    if page % BLOCK or not page:
        raise BlockCountError(
            f"{named(k_cache=k_cache)}: pages of {page} tokens",
            f"pages of a multiple of {BLOCK} tokens",
            f"A tile of keys is {BLOCK} rows of one page",
            f"Use pages of {BLOCK} tokens",
        )
    check_table(block_table, B)
    check_tensor("context_lens", context_lens)
    if context_lens.dim() == 2:
        check_index("context_lens", context_lens, (B, S_q), "[B, S_q]")
        limits = context_lens
    else:
        check_index("context_lens", context_lens, (B,), "[B] or [B, S_q]")
        limits = context_lens[:, None]
        if S_q > 1:
            limits = limits + torch.arange(1 - S_q, 1, device=q.device)
    width = block_table.shape[1] * page if max_context_len is None else max_context_len
    if isinstance(width, bool) or width < 0:
        raise ShapeError(
            f"max_context_len = {width}", "max_context_len >= 0", "A row cannot have fewer than 0 scores", "Pass None"
        )
    return limits, width


def check_topk(topk: int) -> None:
    if type(topk) is not int or topk < 1:
        raise ShapeError(
            f"topk = {topk}",
            "an integer topk >= 1",
            "A selection of no key leaves nothing to attend to",
            "Pass 2048, say",
        )


# --- Launches ---------------------------------------------------------------------------------------------------------


def ragged_scores(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    clean: bool,
    backend: str | None,
) -> Tensor:
    """[S_q, S_kv rounded up], of which columns past S_kv are never written."""
    S_q, H, D = q.shape
    S_kv = kv[0].shape[0]
    out = aligned((1, S_q), S_kv, q.device)
    problem = IndexProblem(q.device, 1, S_q, H, D, 1, S_kv, S_kv, None, clean)
    k, k_scale = kv[0].unsqueeze(0), kv[1].unsqueeze(0)
    args = IndexArgs(q[None], k, k_scale, weights[None], None, starts[None], ends[None], out)
    plan(problem, backend).launch(args)
    return out[0]


def paged_scores(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    limits: Tensor,
    block_table: Tensor,
    width: int,
    clean: bool,
    backend: str | None,
) -> Tensor:
    """[B, S_q, width rounded up], of which columns past width are never written."""
    B, S_q, H, D = q.shape
    out = aligned((B, S_q), width, q.device)
    pages, page = k_cache.shape[:2]
    problem = IndexProblem(q.device, B, S_q, H, D, pages, page, width, block_table.shape[1], clean)
    parts = INDEX_ROWS.parts(k_cache)
    k, k_scale = parts.codes.view(FP8), parts.scales.view(torch.float32).squeeze(-1)
    args = IndexArgs(q, k, k_scale, weights.view(B, S_q, H), block_table, None, limits, out)
    plan(problem, backend).launch(args)
    return out


def aligned(rows: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """FP32 [*rows, width rounded up to ALIGNMENT]."""
    return torch.empty(*rows, -(-width // ALIGNMENT) * ALIGNMENT, dtype=torch.float32, device=device)


def select(
    scores: Tensor,
    N: int,
    starts: Tensor | None,
    ends: Tensor | None,
    block_table: Tensor | None,
    page: int,
    out: Tensor,
    backend: str | None,
) -> None:
    """Fill out [rows, topk] from the first N of each row's scores, of those that block_table covers."""
    rows, topk = out.shape
    queries = 1
    if block_table is None:
        page = 0
    else:
        N = min(N, block_table.shape[1] * page)
        queries = max(1, rows // max(1, block_table.shape[0]))
    problem = TopkProblem(scores.device, rows, N, scores.shape[1], topk, page, queries)
    starts, ends = (None if x is None else x.contiguous() for x in (starts, ends))
    plan(problem, backend).launch(TopkArgs(scores, starts, ends, block_table, out))
