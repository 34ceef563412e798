"""What a call asks for, without its data: the key of a plan.

A problem holds everything that selects a kernel and its config (dims, dtypes, strides, which optional inputs are
there) and nothing that lives in device memory. Beside it stand the arguments: the tensors of one call, already
normalised by `contract`, in the form that every backend's `launch` takes.

A paged cache is always a strided page view, a tensor `[B, Hk, Nblk, page, D]`: token t of request b and KV head h is
at `view[b, h, block_table[b, t // page], t % page]`. The reference's per-request slabs, a pool that all requests share
(batch stride 0) and a serving engine's `[num_blocks, page, Hk, D]` pool differ only in its strides. `page` is 64 but
for `pages.decode_over_pages`.

What `refuse` must decide on is here too: the sign of the scale, and whether the addresses are aligned. A launch then
never raises an error of the contract.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Tokens in a block (cache page). Fixed by the reference."""

FP8 = torch.float8_e4m3fn
DTYPES = (FP8, torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that q, k, v and caches may have: all the same in one call, but that decode takes 16-bit q over FP8."""

ALIGNMENT = 16
"""Bytes: what TMA and vector loads want the first element of a tensor to lie on."""

MaskKind = Literal["none", "bool", "float"]


class Options(NamedTuple):
    """What a decode call asks for beside its tensors: fields of DecodeProblem."""

    tail: bool = False
    batch_invariant: bool = False


PLAIN = Options()


class Result(NamedTuple):
    """A tensor that a launch fills; strides None: contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    def beside(self, x: Tensor) -> Tensor:
        """A new one on x's device, fake if x is."""
        if self.strides is None:
            return x.new_empty(self.shape, dtype=self.dtype)
        return x.new_empty_strided(self.shape, self.strides, dtype=self.dtype)


class DecodeProblem(NamedTuple):
    """A decode call: S_q query tokens a request against its paged cache.

    Strides are in elements. `dtype` is q's; `kv_dtype` differs where 16-bit queries meet an FP8 cache. `alias` says
    that V is the first Dv columns of K's memory (MLA), so that a backend reads each row once. Without a mask, query i
    of S_q sees keys `t <= seq_lens[b] - S_q + i`; with one (`mask`), the mask and `t < seq_lens[b]` decide. `descale`
    says that there is a descale of q, k or v. `scale_sign` is the sign of softmax_scale: -1, 0 or 1. `aligned`: q, K, V
    and out all begin on ALIGNMENT bytes. `rope_strides` is given for a split latent: K's last D - Dv columns then lie
    in a page view of their own, and K's view holds the first Dv. `out_strides` is given where out is not contiguous.
    `batch_invariant`: a request's rows must be the same bits whatever else is in the call, the other requests and their
    number, the width of the table, where pages lie. `tail`: the mask is over the S_q newest tokens alone, earlier keys
    are all seen.
    """

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    out_dtype: torch.dtype
    B: int
    Hq: int
    Hk: int
    S_q: int
    D: int
    Dv: int
    Nblk: int
    table_blocks: int
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    alias: bool
    mask: MaskKind = "none"
    descale: bool = False
    sink: bool = False
    scale_sign: int = 1
    aligned: bool = True
    page: int = BLOCK
    rope_strides: tuple[int, ...] | None = None
    out_strides: tuple[int, ...] | None = None
    batch_invariant: bool = False
    tail: bool = False

    @property
    def ratio(self) -> int:
        """Query heads that share one KV head."""
        return self.Hq // self.Hk

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, S_q, Dv]."""
        return (self.B, self.Hq, self.S_q, self.Dv)

    @property
    def results(self) -> tuple[Result, Result]:
        """Out and lse."""
        return Result(self.out_shape, self.out_dtype, self.out_strides), Result(self.out_shape[:3], torch.float32)

    @property
    def empty(self) -> bool:
        """Whether there is no output row, or no row of K that one could see."""
        return not (self.B and self.S_q and self.Nblk and self.table_blocks)


class DecodeArgs(NamedTuple):
    """The tensors of one decode call, normalised.

    q [B, Hq, S_q, D]; k [B, Hk, Nblk, page, D] and v [B, Hk, Nblk, page, Dv] page views; block_table [B, table_blocks]
    and seq_lens [B], int32 or int64, of any value: a launch clamps both before it narrows them; mask [B, Hq, S_q, L]
    bool or floating, expanded (stride 0 on broadcast dims), keys past its end are hidden; of a tail mask L is S_q, and
    its first key is seq_lens[b] - S_q; q_descale, k_descale,
    v_descale [B, Hk] FP32, expanded; attn_sink [Hq] FP32; out [B, Hq, S_q, Dv], contiguous but for out_strides; lse
    [B, Hq, S_q] FP32 contiguous, natural log, `empty_lse` on a row without keys; k_rope [B, Hk, Nblk, page, D - Dv] of
    a split latent, whose k has Dv columns, or None. Of an `alias` with one KV head v may be k, of which it is the first
    Dv columns. For a launch by address q, k, v and out are any tensors that begin where these do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor
    seq_lens: Tensor
    mask: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor | None
    k_rope: Tensor | None = None
    empty_lse: float = -math.inf

    def mark_empty(self) -> None:
        """Write `empty_lse`, for kernels that leave -inf; one kernel."""
        mark_empty(self.lse, self.empty_lse)

    def whole_mask(self, keys: int) -> Tensor:
        """A tail mask [B, Hq, S_q, S_q] as the mask [B, Hq, S_q, keys] over all keys."""
        assert self.mask is not None
        S_q = self.mask.shape[-1]
        tail = self.mask[:, :1] if self.mask.stride(1) == 0 else self.mask
        column = torch.arange(keys, device=tail.device) - (self.seq_lens.long() - S_q)[:, None]  # [B, keys]
        column = column[:, None, None].expand(-1, *tail.shape[1:3], -1)
        seen = tail.gather(-1, column.clamp(0, S_q - 1))
        return seen.masked_fill(column < 0, tail.dtype == torch.bool).expand(-1, self.mask.shape[1], -1, -1)


class PrefillProblem(NamedTuple):
    """A prefill call: P query tokens a request against S_kv keys, contiguous or paged.

    `paged` tells whether k and v are page views or `[B, Hk, S_kv, D]`. `causal` keeps, for the query at position p,
    the keys `t <= p`, where p is its row plus `start_pos[b]`. The mask, the block mask, causality and the key length
    combine by AND. `descale`, `scale_sign` and `aligned` are as in DecodeProblem.
    """

    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    B: int
    Hq: int
    Hk: int
    P: int
    S_kv: int
    D: int
    Dv: int
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    paged: bool
    alias: bool
    causal: bool = False
    mask: MaskKind = "none"
    block_mask: bool = False
    seq_lens: bool = False
    start_pos: bool = False
    descale: bool = False
    sink: bool = False
    scale_sign: int = 1
    aligned: bool = True

    @property
    def ratio(self) -> int:
        """Query heads that share one KV head."""
        return self.Hq // self.Hk

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, P, Dv]."""
        return (self.B, self.Hq, self.P, self.Dv)

    @property
    def results(self) -> tuple[Result, Result]:
        """Out and lse."""
        return Result(self.out_shape, self.out_dtype), Result(self.out_shape[:3], torch.float32)

    @property
    def empty(self) -> bool:
        """Whether there is no output row, or no key."""
        return not (self.B and self.P and self.S_kv)


class PrefillArgs(NamedTuple):
    """The tensors of one prefill call, normalised.

    q [B, Hq, P, D], last dim contiguous; k [B, Hk, S_kv, D] and v [B, Hk, S_kv, Dv], or page views beside block_table
    [B, table_blocks]; seq_lens [B] keys a request (None: S_kv); start_pos [B] position of the first query (None: 0);
    mask [B, Hq, P, S_kv] bool or floating, expanded; block_mask [B, Hq, ceil(P/64), ceil(S_kv/64)] bool, expanded;
    descales, sink, out [B, Hq, P, Dv] and lse [B, Hq, P] as in DecodeArgs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor | None
    seq_lens: Tensor | None
    start_pos: Tensor | None
    mask: Tensor | None
    block_mask: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor | None


class BackwardProblem(NamedTuple):
    """The gradients of a prefill call: `forward` is its problem, never paged. `dq` and `dkv` say what is wanted.

    The sink's gradient comes along.
    """

    forward: PrefillProblem
    dq: bool = True
    dkv: bool = True

    @property
    def device(self) -> torch.device:
        """The forward's."""
        return self.forward.device

    @property
    def empty(self) -> bool:
        """Whether every gradient is 0: no output row, or no key."""
        return self.forward.empty


class BackwardArgs(NamedTuple):
    """The tensors of one backward call, normalised.

    q to attn_sink as in PrefillArgs; out [B, Hq, P, Dv] and lse [B, Hq, P] that the forward gave, and their gradients
    d_out, last dim contiguous, and d_lse FP32, or None of 0. Written, each of any strides but with its last dim
    contiguous: dq
    [B, Hq, P, D] or None; dk [B, Hk, S_kv, D] and dv [B, Hk, S_kv, Dv], or None both; d_sink [Hq] FP32, or None without
    a sink. They are the sums over what the forward computed: a row without keys gives none, and keys that no row sees
    get 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seq_lens: Tensor | None
    start_pos: Tensor | None
    mask: Tensor | None
    block_mask: Tensor | None
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    d_sink: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """What is written."""
        return self.dq, self.dk, self.dv, self.d_sink


class SparseSet(NamedTuple):
    """The keys of a sparse call that lie in one cache: what selects a kernel.

    `pages` pages of `page` rows; cache_strides (page, row) in elements of the cache; index_strides (request, query).
    """

    topk: int
    pages: int
    page: int
    cache_strides: tuple[int, int]
    index_strides: tuple[int, int]
    lengths: bool


class SparseProblem(NamedTuple):
    """Token-sparse attention with one KV head: each query names the rows it attends to, in one cache or in two.

    `format` names the row format (`quant.FORMATS`) of the caches; None: rows of D in q's dtype. V is the first Dv
    columns of a row. Prefill is the case S_q = 1 with one page, B the number of query tokens. `scale_sign` is as in
    DecodeProblem; `aligned`: q and the caches begin on ALIGNMENT bytes.
    """

    device: torch.device
    dtype: torch.dtype
    B: int
    S_q: int
    Hq: int
    D: int
    Dv: int
    format: str | None
    sets: tuple[SparseSet, ...]
    q_strides: tuple[int, ...]
    sink: bool
    max_logits: bool
    scale_sign: int = 1
    aligned: bool = True

    @property
    def results(self) -> tuple[Result, Result]:
        """Out, and lse or max_logits."""
        B, S_q, Hq, Dv = self.B, self.S_q, self.Hq, self.Dv
        if self.max_logits:
            return Result((B, Hq, Dv), self.dtype), Result((B, Hq), torch.float32)
        return Result((B, S_q, Hq, Dv), self.dtype), Result((B, Hq, S_q), torch.float32, (S_q * Hq, 1, Hq))

    @property
    def empty(self) -> bool:
        """Whether there is no output row, or no row of a cache that one could name."""
        return not (self.B and self.S_q and any(keys.topk and keys.pages and keys.page for keys in self.sets))


class SparseKeys(NamedTuple):
    """One cache of a sparse call and what is read of it.

    cache [pages, page, 1, D] in q's dtype, or [pages, page, 1, row_bytes] uint8 of a row format; indices [B, S_q, topk]
    int32 or int64, page * page_size + row, where a negative one or one past the last row names no key; lengths [B]
    int32 or int64: only the leftmost so many indices count (None: all).
    """

    cache: Tensor
    indices: Tensor
    lengths: Tensor | None


class SparseArgs(NamedTuple):
    """The tensors of one sparse call, as the call has them: a view costs the host a microsecond.

    q [B, S_q, Hq, D], last dim contiguous; keys of one cache or two; attn_sink [Hq] FP32; out [B, S_q, Hq, Dv] in q's
    dtype, contiguous; lse [B, Hq, S_q] FP32, natural log, `empty_lse` on a row without keys, its memory [B, S_q, Hq].
    In prefill, which alone has max_logits, the greatest scaled score of a row, q [B, Hq, D], the cache [rows, 1, D],
    out [B, Hq, Dv], lse and max_logits [B, Hq].
    """

    q: Tensor
    keys: tuple[SparseKeys, ...]
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor
    max_logits: Tensor | None
    empty_lse: float = -math.inf

    def mark_empty(self) -> None:
        """Write `empty_lse`, for kernels that leave -inf; one kernel."""
        mark_empty(self.lse, self.empty_lse)

    def normalised(self) -> SparseArgs:
        """The same with q [B, S_q, Hq, D], caches [pages, page, D], out [B, S_q, Hq, Dv], the others [B, S_q, Hq]."""
        if self.max_logits is None:
            keys = tuple(x._replace(cache=x.cache.squeeze(2)) for x in self.keys)
            return self._replace(keys=keys, lse=self.lse.transpose(1, 2))
        keys = tuple(x._replace(cache=x.cache.transpose(0, 1)) for x in self.keys)
        q, out, lse, most = (x.unsqueeze(1) for x in (self.q, self.out, self.lse, self.max_logits))
        return self._replace(q=q, keys=keys, out=out, lse=lse, max_logits=most)


def mark_empty(lse: Tensor | None, empty_lse: float) -> None:
    """-inf to `empty_lse` in place, in one kernel."""
    if lse is not None and empty_lse != -math.inf:
        torch.nan_to_num_(lse, nan=math.nan, posinf=math.inf, neginf=empty_lse)


class SparseBackwardProblem(NamedTuple):
    """The gradients of a sparse prefill: `forward` is its problem, of one cache without a row format, S_q 1."""

    forward: SparseProblem

    @property
    def device(self) -> torch.device:
        """The forward's."""
        return self.forward.device

    @property
    def empty(self) -> bool:
        """Whether every gradient is 0."""
        return self.forward.empty


class SparseBackwardArgs(NamedTuple):
    """The tensors of one backward call, normalised.

    q to softmax_scale as in SparseArgs, normalised; out [B, 1, Hq, Dv] and lse [B, 1, Hq] that the forward gave,
    infinite on a row without keys, and their gradients d_out, last dim contiguous, and d_lse FP32. Written: dq
    [B, 1, Hq, D]; dkv [pages, page, D], the sum over all that name a row; d_sink [Hq] FP32, or None without a sink.
    """

    q: Tensor
    keys: SparseKeys
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor
    dq: Tensor
    dkv: Tensor
    d_sink: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """What is written."""
        return self.dq, self.dkv, self.d_sink


class IndexProblem(NamedTuple):
    """The scores that an index (DeepSeek sparse attention) gives to S_q query tokens of each of B requests.

    Keys lie in pages of `page` rows, e4m3 with one FP32 scale a row; a block table of `table_blocks` columns names a
    request's pages. Where that is None, B is 1 and all keys are one page. `width` is a row of the output; `clean` wants
    -inf in what a query does not see, which otherwise may hold anything.
    """

    device: torch.device
    B: int
    S_q: int
    H: int
    D: int
    pages: int
    page: int
    width: int
    table_blocks: int | None
    clean: bool

    @property
    def empty(self) -> bool:
        """Whether there is no score, or no key to score."""
        return not (self.B and self.S_q and self.width and self.pages) or self.table_blocks == 0


class IndexArgs(NamedTuple):
    """The tensors of one call for scores, normalised.

    q [B, S_q, H, D] e4m3, k [pages, page, D] e4m3, last dims contiguous; k_scale [pages, page] FP32; weights
    [B, S_q, H] FP32; block_table [B, table_blocks], or None; query i of request b sees keys starts[b, i] <= t <
    ends[b, i] (starts None: 0), int32 or int64 of any value; out [B, S_q, width] FP32, last dim contiguous.
    """

    q: Tensor
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    block_table: Tensor | None
    starts: Tensor | None
    ends: Tensor
    out: Tensor


class TopkProblem(NamedTuple):
    """The columns of the topk greatest of N scores, in each of `rows` rows.

    Of a row, `width` columns may be read, so that loads are wide: N of them, or more. `page` is 0 where columns are
    returned as they are; otherwise `queries` rows after one another share a row of the block table, and column t is
    returned as block_table[t // page] * page + t % page.
    """

    device: torch.device
    rows: int
    N: int
    width: int
    topk: int
    page: int
    queries: int

    @property
    def empty(self) -> bool:
        """Whether there is no row, or no column to select."""
        return not (self.rows and self.N)


class TopkArgs(NamedTuple):
    """The tensors of one selection, normalised.

    scores [rows, width] FP32, last dim contiguous; starts, ends [rows]: columns starts <= t < ends count (None: all),
    int32 or int64 of any value; block_table [rows / queries, table_blocks], or None; out [rows, topk] int32 contiguous.
    """

    scores: Tensor
    starts: Tensor | None
    ends: Tensor | None
    block_table: Tensor | None
    out: Tensor


class AppendArgs(NamedTuple):
    """New rows for a paged cache: token i of request b goes to position `start_pos[b] + i`.

    k [B, Hk, P, D] and v [B, Hk, P, Dv] in the caches' dtype; k_cache and v_cache page views; block_table; start_pos
    [B] (None: 0). v and v_cache are None for a latent cache, whose V lies inside K. Rows at or past num_tokens[b]
    (None: P) are not written.
    """

    k: Tensor
    v: Tensor | None
    k_cache: Tensor
    v_cache: Tensor | None
    block_table: Tensor
    start_pos: Tensor | None
    num_tokens: Tensor | None


class AppendRowsArgs(NamedTuple):
    """New rows for a cache of FP8 rows (`quant.RowFormat`), with the memory they go to: views of its pages' bytes.

    codes [num_blocks, page, quantised], scales [num_blocks, page, scale_bytes], rope [num_blocks, page, 2 * rope];
    slots [N] int32 or int64 of any value, of which those outside of the pages are dropped; k_nope and k_rope [N, ..]
    BF16, together a row; descale one FP32 number or None; tile dims share a scale of scale_size bytes (FP32 or e8m0),
    both 0 where rows store none.
    """

    codes: Tensor
    scales: Tensor
    rope: Tensor
    slots: Tensor
    k_nope: Tensor
    k_rope: Tensor
    descale: Tensor | None
    tile: int
    scale_size: int


Attention = DecodeProblem | PrefillProblem | SparseProblem
Problem = (
    DecodeProblem
    | PrefillProblem
    | BackwardProblem
    | SparseProblem
    | SparseBackwardProblem
    | IndexProblem
    | TopkProblem
)
Args = DecodeArgs | PrefillArgs | BackwardArgs | SparseArgs | SparseBackwardArgs | IndexArgs | TopkArgs
