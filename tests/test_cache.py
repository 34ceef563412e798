"""PagedKVCache against a plain list of rows per request, and the block allocator by itself."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from flash_mla import flash_mla_with_kvcache, mha_fwd_kvcache
from flash_mla.blocks import BlockAllocator
from flash_mla.cache import PagedKVCache, page_view
from flash_mla.errors import (
    BlockCountError,
    CacheFullError,
    DeviceError,
    DTypeError,
    MaskShapeError,
    SequenceLengthError,
    ShapeError,
)
from flash_mla.quant import dequantise, quantise

B, Hk, D, Dv = 4, 2, 3, 2
FP8 = torch.float8_e4m3fn


def rows_of(tokens: list[list[int]], heads: int, dim: int) -> torch.Tensor:
    """[R, heads, T, dim] FP32, padded with NaN: a token's number, times 8 plus head, and minus a quarter a column."""
    T = max(map(len, tokens), default=0)
    number = torch.tensor([[*row, *[float("nan")] * (T - len(row))] for row in tokens]).view(len(tokens), 1, T, 1)
    return number * 8 + torch.arange(heads).view(-1, 1, 1) - torch.arange(dim) / 4


def held_rows(cache: PagedKVCache, view: torch.Tensor, b: int) -> torch.Tensor:
    """The rows [Hk, seq_lens[b], dim] that a reader of the table finds for request b."""
    length = int(cache.seq_lens[b])
    blocks = cache.block_table[b, : -(-length // 64)].long()
    return view[b][:, blocks].flatten(1, 2)[:, :length]


def snapshot(cache: PagedKVCache) -> list:
    """Every byte and number of the cache."""
    tensors = (cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)
    bits = [tensor.contiguous().view(torch.uint8).clone() for tensor in tensors]
    return [*bits, cache.lengths, cache.num_free_blocks]


def same(before: list, after: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True))


def poison(cache: PagedKVCache) -> None:
    for b in range(cache.k_cache.shape[0]):
        cache.k_cache[b].fill_(float("nan"))
        cache.v_cache[b].fill_(float("nan"))


class CacheMachine(RuleBasedStateMachine):
    """Random operations on a cache and on a list of token numbers per request."""

    @initialize(pool_blocks=st.none() | st.integers(2, 10), latent=st.booleans())
    def make(self, pool_blocks: int | None, latent: bool) -> None:
        self.pool, self.latent = pool_blocks, latent
        heads = 1 if latent else Hk
        self.cache = PagedKVCache(
            B,
            heads,
            D,
            v_head_dim=Dv,
            latent=latent,
            max_seq_len=200,
            pool_blocks=pool_blocks,
            dtype=torch.float32,
        )
        poison(self.cache)
        self.heads, self.limit = heads, 4
        self.model: list[list[int]] = [[] for _ in range(B)]
        self.next_token = 0
        self.remember_tensors()

    def remember_tensors(self) -> None:
        cache = self.cache
        self.pointers = [t.data_ptr() for t in (cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)]

    def table(self) -> list[list[int]]:
        return [row[: -(-len(self.model[b]) // 64)] for b, row in enumerate(self.cache.block_table.tolist())]

    def new_tokens(self, counts: list[int]) -> list[list[int]]:
        tokens = []
        for count in counts:
            tokens.append(list(range(self.next_token, self.next_token + count)))
            self.next_token += count
        return tokens

    def expected_error(self, requests: list[int], counts: list[int]) -> type[ValueError] | None:
        """What must happen on an append, from the lengths and the blocks that the table shows shared."""
        lengths = [len(self.model[b]) for b in requests]
        if any(length + n > self.limit * 64 for length, n in zip(lengths, counts, strict=True)):
            return SequenceLengthError
        if self.pool is None:
            return None
        table = self.table()
        holders = Counter(block for row in table for block in row)
        writers: Counter[int] = Counter()
        needed = 0
        for b, length, n in zip(requests, lengths, counts, strict=True):
            needed += -(-(length + n) // 64) - len(table[b])
            if n and length % 64:
                writers[table[b][-1]] += 1
        needed += sum(n if holders[block] > n else n - 1 for block, n in writers.items())
        return CacheFullError if needed > self.cache.num_free_blocks else None

    @rule(
        requests=st.lists(st.integers(0, B - 1), unique=True, max_size=B),
        count=st.integers(0, 130) | st.just(1),
        data=st.data(),
    )
    def append(self, requests: list[int], count: int, data: st.DataObject) -> None:
        ragged = data.draw(st.booleans())
        everyone = data.draw(st.booleans())
        if everyone:
            requests = list(range(B))
        counts = [data.draw(st.integers(0, count)) if ragged else count for _ in requests]
        error = self.expected_error(requests, counts)
        tokens = self.new_tokens(counts)
        k = rows_of(tokens, self.heads, D)
        v = None if self.latent else -rows_of(tokens, self.heads, Dv)
        arguments = (k, v, counts if ragged else None, None if everyone else requests)
        if error:
            before = snapshot(self.cache)
            with pytest.raises(error):
                self.cache.append(*arguments)
            assert same(before, snapshot(self.cache))
            return
        self.cache.append(*arguments)
        for b, row in zip(requests, tokens, strict=True):
            self.model[b] += row

    @rule(b=st.integers(0, B - 1), count=st.integers(1, 70))
    def extend(self, b: int, count: int) -> None:
        if self.expected_error([b], [count]):
            return
        start = len(self.model[b])
        [tokens] = self.new_tokens([count])
        self.cache.extend(count, [b])
        self.model[b] += tokens
        k = rows_of([tokens], self.heads, D)[0]
        v = k[..., :Dv] if self.latent else -rows_of([tokens], self.heads, Dv)[0]
        for i in range(count):
            block, slot = int(self.cache.block_table[b, (start + i) // 64]), (start + i) % 64
            self.cache.k_cache[b, :, block, slot] = k[:, i]
            self.cache.v_cache[b, :, block, slot] = v[:, i]

    @rule(source=st.integers(0, B - 1), into=st.integers(0, B - 1))
    def fork(self, source: int, into: int) -> None:
        partial = len(self.model[source]) % 64 != 0
        full = self.pool is not None and partial and not self.cache.num_free_blocks
        free = self.cache.num_free_blocks
        if source == into or self.model[into] or full:
            before = snapshot(self.cache)
            error = ShapeError if source == into else SequenceLengthError if self.model[into] else CacheFullError
            with pytest.raises(error):
                self.cache.fork(source, into)
            assert same(before, snapshot(self.cache))
            return
        self.cache.fork(source, into)
        self.model[into] = [*self.model[source]]
        if self.pool is not None:
            assert self.cache.num_free_blocks == free - partial
            table, whole = self.table(), len(self.model[source]) // 64
            assert table[into][:whole] == table[source][:whole]
            assert not partial or table[into][-1] != table[source][-1]

    @rule(order=st.lists(st.integers(0, B - 1), min_size=B, max_size=B), as_tensor=st.booleans())
    def reorder(self, order: list[int], as_tensor: bool) -> None:
        table = self.table()
        self.cache.reorder(torch.tensor(order) if as_tensor else order)
        self.model = [[*self.model[source]] for source in order]
        if self.pool is not None:
            assert self.table() == [table[source] for source in order]

    @rule(requests=st.lists(st.integers(0, B - 1), unique=True))
    def free(self, requests: list[int]) -> None:
        self.cache.free(requests)
        for b in requests:
            self.model[b] = []

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model = [[] for _ in range(B)]

    @precondition(lambda self: self.limit < 10)
    @rule(blocks=st.integers(1, 3))
    def grow(self, blocks: int) -> None:
        table = self.table()
        self.cache.grow(blocks)
        self.limit += blocks
        self.pool = self.pool and self.pool + blocks
        assert self.table() == table
        self.remember_tensors()

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        cache, good = self.cache, torch.zeros(B, self.heads, 1, D)
        v = None if self.latent else torch.zeros(B, self.heads, 1, Dv)
        bad, error = data.draw(
            st.sampled_from(
                [
                    (lambda: cache.append(good, torch.zeros(1) if self.latent else None), ShapeError),
                    (lambda: cache.append(good[1:], v), ShapeError),
                    (lambda: cache.append(good[..., :1], v), ShapeError),
                    (lambda: cache.append(good[0], v), ShapeError),
                    (lambda: cache.append(good.double(), v), DTypeError),
                    (lambda: cache.append(good.to("meta"), v), DeviceError),
                    (lambda: cache.append(good, v, [1, 1, 1, 2]), ShapeError),
                    (lambda: cache.append(good, v, [1, 1, 1, -1]), ShapeError),
                    (lambda: cache.append(good, v, [1, 1]), ShapeError),
                    (lambda: cache.append(good, v, torch.tensor([0.5] * B)), ShapeError),
                    (lambda: cache.append(good, v, None, [0, 1, 2, 2]), ShapeError),
                    (lambda: cache.append(good, v, None, [0, 1, 2, B]), ShapeError),
                    (lambda: cache.extend(-1), ShapeError),
                    (lambda: cache.reorder([0, 1, 2]), ShapeError),
                    (lambda: cache.reorder([0, 1, 2, -1]), ShapeError),
                    (lambda: cache.free([B]), ShapeError),
                    (lambda: cache.fork(0, -1), ShapeError),
                    (lambda: cache.grow(0), ShapeError),
                ]
            )
        )
        before = snapshot(cache)
        with pytest.raises(error) as caught:
            bad()
        assert same(before, snapshot(cache))
        assert all(part in str(caught.value) for part in ("given:", "required:", "cause:", "fix:"))

    @invariant()
    def tensors_say_what_the_model_says(self) -> None:
        cache = self.cache
        assert cache.lengths == tuple(map(len, self.model))
        assert cache.seq_lens.tolist() == [*map(len, self.model)]
        assert cache.seq_lens.dtype == cache.block_table.dtype == torch.int32
        assert cache.block_table.shape == (B, self.limit)
        assert cache.block_table.is_contiguous()
        for b, tokens in enumerate(self.model):
            k = rows_of([tokens], self.heads, D)[0]
            v = k[..., :Dv] if self.latent else -rows_of([tokens], self.heads, Dv)[0]
            assert torch.equal(held_rows(cache, cache.k_cache, b), k)
            assert torch.equal(held_rows(cache, cache.v_cache, b), v)

    @invariant()
    def blocks_are_counted(self) -> None:
        table = self.table()
        if self.pool is None:
            assert self.cache.num_free_blocks == B * self.limit - sum(map(len, table))
            assert table == [[*range(len(row))] for row in table]
        else:
            assert self.cache.num_free_blocks == self.pool - len({block for row in table for block in row})
            assert self.cache.k_cache.stride(0) == 0

    @invariant()
    def tensors_stay_where_they_are(self) -> None:
        pointers, cache = self.pointers, self.cache
        assert pointers == [t.data_ptr() for t in (cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_two_common_caches_are_one_line() -> None:
    cache = PagedKVCache(2, 8, 128, max_seq_len=100)
    assert cache.k_cache.shape == cache.v_cache.shape == (2, 8, 2, 64, 128)
    assert cache.k_cache.is_contiguous()
    assert cache.nbytes == 2 * (2 * 8 * 2 * 64 * 128 * 2) + 2 * 2 * 4 + 2 * 4

    latent = PagedKVCache.mla(2, max_seq_len=100)
    assert latent.k_cache.shape == (2, 1, 2, 64, 576)
    assert latent.v_cache.shape == (2, 1, 2, 64, 512)
    assert latent.v_cache.data_ptr() == latent.k_cache.data_ptr()
    assert latent.v_cache.stride() == latent.k_cache.stride()
    assert latent.nbytes == 2 * 2 * 64 * 576 * 2 + 2 * 2 * 4 + 2 * 4
    assert "Dv=512 inside K" in repr(latent)


@pytest.mark.parametrize("pool_blocks", [None, 3])
def test_grow_keeps_the_tokens_of_a_full_cache(pool_blocks: int | None) -> None:
    cache = PagedKVCache(1, Hk, D, max_seq_len=192, pool_blocks=pool_blocks, dtype=torch.float32)
    k = torch.randn(1, Hk, 192, D)
    cache.append(k, k)
    with pytest.raises(SequenceLengthError):
        cache.append(k[:, :, :1], k[:, :, :1])
    cache.grow(1)
    cache.append(k[:, :, :64], k[:, :, :64])
    assert torch.equal(held_rows(cache, cache.k_cache, 0), torch.cat([k, k[:, :, :64]], dim=2)[0])


def test_beams_copy_a_shared_block_once_each_but_the_last() -> None:
    cache = PagedKVCache(3, Hk, D, max_seq_len=128, pool_blocks=3, dtype=torch.float32)
    k = torch.randn(3, Hk, 10, D)
    cache.append(k[:1], k[:1], requests=[0])
    cache.reorder([0, 0, 0])
    assert cache.num_free_blocks == 2
    cache.append(k[:, :, :1], k[:, :, :1])  # two copies, and the third writes in place
    assert cache.num_free_blocks == 0
    for b in range(3):
        assert torch.equal(held_rows(cache, cache.v_cache, b), torch.cat([k[0], k[b, :, :1]], dim=1))


def test_beams_that_cannot_all_have_a_copy_are_refused() -> None:
    cache = PagedKVCache(3, Hk, D, max_seq_len=128, pool_blocks=2, dtype=torch.float32)
    k = torch.randn(3, Hk, 10, D)
    cache.append(k[:1], k[:1], requests=[0])
    cache.reorder([0, 0, 0])
    before = snapshot(cache)
    with pytest.raises(CacheFullError, match="required: 2 free blocks"):
        cache.append(k[:2], k[:2], requests=[0, 2])  # request 1 stays in the shared block: two copies, one block free
    assert same(before, snapshot(cache))


def test_fork_without_a_block_for_the_copy_is_refused() -> None:
    cache = PagedKVCache(2, Hk, D, max_seq_len=128, pool_blocks=2, dtype=torch.float32)
    k = torch.randn(1, Hk, 100, D)
    cache.append(k, k, requests=[0])
    before = snapshot(cache)
    with pytest.raises(CacheFullError, match="grow"):
        cache.fork(0, 1)
    assert same(before, snapshot(cache))
    cache.append(k[:, :, :28], k[:, :, :28], requests=[0])
    cache.fork(0, 1)  # two full blocks need none
    assert torch.equal(held_rows(cache, cache.k_cache, 1), held_rows(cache, cache.k_cache, 0))


def test_a_pool_gives_each_request_consecutive_blocks() -> None:
    cache = PagedKVCache.mla(8, 8, 8, max_seq_len=1024, pool_blocks=8 * 16, dtype=torch.float32)
    cache.append(torch.randn(8, 1, 300, 8))
    for _ in range(11):  # in all requests by turns, until the pool is full
        cache.append(torch.randn(8, 1, 64, 8))
    for row in cache.block_table.tolist():
        assert row == list(range(row[0], row[0] + 16))


@pytest.mark.parametrize("latent", [False, True])
def test_fp8_rows_are_quantised_on_append(latent: bool) -> None:
    heads = 1 if latent else Hk
    factors = torch.tensor([0.5, 0.25])[:heads]
    kv = {"k_descale": factors, "v_descale": 0.125}
    cache = PagedKVCache(B, heads, 16, v_head_dim=8, latent=latent, max_seq_len=128, dtype=FP8, **kv)
    k, v = torch.randn(B, heads, 70, 16).bfloat16(), torch.randn(B, heads, 70, 8).bfloat16()
    cache.append(k, None if latent else v, [70, 0, 64, 3])
    assert cache.k_descale is not None
    assert torch.equal(cache.k_descale, factors[None])
    assert torch.equal(cache.v_descale, factors[None] if latent else torch.full((1, heads), 0.125))
    for b, count in enumerate([70, 0, 64, 3]):
        expected, _ = quantise(k[b : b + 1, :, :count], factors[None])
        assert torch.equal(held_rows(cache, cache.k_cache, b).float(), expected[0].float())
        real = dequantise(held_rows(cache, cache.k_cache, b)[None], cache.k_descale)
        assert (real - k[b : b + 1, :, :count]).abs().max() <= k.abs().max() / 16 if count else True

    stored, _ = quantise(k[:, :, :1], 1.0)
    before = cache.lengths
    cache.append(stored, None if latent else quantise(v[:, :, :1], 1.0)[0])  # FP8 rows are taken as they are
    for b in range(B):
        assert torch.equal(held_rows(cache, cache.k_cache, b)[:, before[b]].float(), stored[b, :, 0].float())


def test_appending_keeps_no_graph() -> None:
    cache = PagedKVCache(1, Hk, D, max_seq_len=64, dtype=torch.float32)
    k = torch.randn(1, Hk, 2, D, requires_grad=True)
    cache.append(k, k)
    assert not cache.k_cache.requires_grad


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": 0}, {"head_dim": 0}, {"max_seq_len": 0}, {"pool_blocks": 0}, {"latent": True, "v_head_dim": 9},
        {"dtype": FP8, "k_descale": 0.0}, {"dtype": FP8, "v_descale": -1.0}, {"dtype": FP8, "k_descale": float("nan")},
    ],
)  # fmt: skip
def test_constructor_refuses(bad: dict) -> None:
    good = {"batch": 1, "num_kv_heads": 1, "head_dim": 8, "max_seq_len": 64}
    with pytest.raises(ShapeError):
        PagedKVCache(**{**good, **bad})
    with pytest.raises(DTypeError):
        PagedKVCache(**good, dtype=torch.int8)
    with pytest.raises(ShapeError):
        PagedKVCache(**good, dtype=FP8, k_descale=torch.ones(3))


def test_page_view_reads_a_serving_engines_pool() -> None:
    pool = torch.randn(5, 64, Hk, D)
    view = page_view(pool, 3)
    assert view.shape == (3, Hk, 5, 64, D)
    assert view.stride() == (0, D, 64 * Hk * D, Hk * D, 1)
    assert torch.equal(view[2, 1, 4, 63], pool[4, 63, 1])
    with pytest.raises(BlockCountError):
        page_view(pool[:, :32], 3)
    with pytest.raises(ShapeError):
        page_view(pool[0], 3)


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=30), st.randoms())
def test_allocator_gives_each_block_to_one_owner(num_blocks: int, steps: list[tuple[int, bool]], random) -> None:
    allocator = BlockAllocator(num_blocks)
    owned: list[list[int]] = []
    for count, take in steps:
        if take and count <= allocator.num_free:
            after = owned[-1][-1] if owned else None
            blocks = allocator.allocate(count, after)
            successors = [] if after is None else [*range(after + 1, after + 1 + count)]
            if successors and {*successors} <= {*range(num_blocks)} - {*chain(*owned)}:
                assert blocks == successors
            owned.append(blocks)
        elif not take and owned:
            allocator.release(owned.pop(random.randrange(len(owned))))
        held = [*chain(*owned)]
        assert len(held) == len({*held})
        assert {*held} <= {*range(num_blocks)}
        assert allocator.num_free == num_blocks - len(held)


# --- Copies, and operations that fail --------------------------------------------------------------------------------


def filled(pool_blocks: int | None, latent: bool = False) -> PagedKVCache:
    """Four requests: 100 tokens, a fork of them in a pool, 64 tokens, none."""
    cache = PagedKVCache(
        4, Hk, D, max_seq_len=256, v_head_dim=Dv, latent=latent, pool_blocks=pool_blocks, dtype=torch.float32
    )
    k, v = torch.randn(4, Hk, 100, D), torch.randn(4, Hk, 100, Dv)
    cache.append(k, None if latent else v, [100, 0, 64, 0])
    cache.fork(0, 1)
    return cache


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
@pytest.mark.parametrize(("pool_blocks", "latent"), [(None, False), (9, False), (9, True)])
def test_a_copy_has_memory_of_its_own(duplicate, dtype: torch.dtype, pool_blocks: int | None, latent: bool) -> None:
    cache = PagedKVCache(2, Hk, D, max_seq_len=128, v_head_dim=Dv, latent=latent, pool_blocks=pool_blocks, dtype=dtype)
    rows = [torch.randn(2, Hk, 70, D), None if latent else torch.randn(2, Hk, 70, Dv)]
    cache.append(*rows)
    other = duplicate(cache)
    want = held_rows(cache, cache.k_cache, 0).clone()
    cache.clear()
    cache.k_cache[0].view(torch.uint8).fill_(0x55)
    other.append(*(None if x is None else x[:, :, :3] for x in rows))
    got = held_rows(other, other.k_cache, 0)
    assert other.lengths == (73, 73)
    assert torch.equal(got[:, :70].view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(got[:, 70:].view(torch.uint8), want[:, :3].view(torch.uint8))


OPERATIONS = {
    "append": lambda cache: cache.append(torch.ones(4, Hk, 30, D), torch.ones(4, Hk, 30, Dv), [30, 30, 7, 0]),
    "append_some": lambda cache: cache.append(torch.ones(2, Hk, 3, D), torch.ones(2, Hk, 3, Dv), requests=[1, 3]),
    "extend": lambda cache: cache.extend([1, 70, 64, 2]),
    "fork": lambda cache: cache.fork(0, 3),
    "reorder": lambda cache: cache.reorder([2, 0, 0, 1]),
    "truncate": lambda cache: cache.truncate([40, 65, 0, 0]),
    "free": lambda cache: cache.free([0, 2]),
    "grow": lambda cache: cache.grow(2),
}


class FailAt(TorchDispatchMode):
    """Raises at the n-th op of torch, once."""

    def __init__(self, n: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = n, error

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            raise self.error
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("pool_blocks", [None, 12])
def test_an_operation_that_fails_anywhere_is_undone(pool_blocks: int | None, operation: str, error) -> None:
    """A failure at every torch call: lengths, table, rows and free blocks are what they were, and all still works."""
    for n in range(1, 200):
        cache = filled(pool_blocks)
        before = [[held_rows(cache, view, b).clone() for view in (cache.k_cache, cache.v_cache)] for b in range(4)]
        lengths, free = cache.lengths, cache.num_free_blocks
        holders = [[*allocator.holders] for allocator in cache._ledger.allocators]
        failing = FailAt(n, error)
        try:
            with failing:
                OPERATIONS[operation](cache)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            assert cache.lengths == lengths == tuple(cache.seq_lens.tolist())
            assert cache.num_free_blocks == free
            assert [[*allocator.holders] for allocator in cache._ledger.allocators] == holders
            for b, rows in enumerate(before):
                for view, want in zip((cache.k_cache, cache.v_cache), rows, strict=True):
                    assert torch.equal(held_rows(cache, view, b), want), f"call {n}: request {b}"
            OPERATIONS[operation](cache)
        else:
            break
    assert failing.left > 0
    assert n > 1


def interrupt_at(line: int, run) -> bool:
    """Run with a KeyboardInterrupt at the n-th line of the cache's code, as Ctrl-C may come; False: there are fewer."""
    left, told = line, False

    def trace(frame, event, _):
        nonlocal left, told
        own = "flash_mla/cache/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("flash_mla/blocks.py")
        if event == "line":
            left -= 1
            if left == 0:
                told = True
                raise KeyboardInterrupt
        return trace if own else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return told


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("pool_blocks", [None, 12])
def test_an_interrupt_in_any_line_undoes_or_completes(pool_blocks: int | None, operation: str) -> None:
    done = filled(pool_blocks)
    OPERATIONS[operation](done)
    for line in chain(range(1, 40), range(40, 1000, 3)):
        cache = filled(pool_blocks)
        lengths, free = cache.lengths, cache.num_free_blocks
        before = [[held_rows(cache, view, b).clone() for view in (cache.k_cache, cache.v_cache)] for b in range(4)]
        told = interrupt_at(line, lambda cache=cache: OPERATIONS[operation](cache))
        assert (cache.lengths, cache.num_free_blocks) in ((lengths, free), (done.lengths, done.num_free_blocks))
        assert cache.lengths == tuple(cache.seq_lens.tolist())
        assert all(len(allocator.holders) == cache.k_cache.shape[2] for allocator in cache._ledger.allocators)
        held: list[Counter[int]] = [Counter() for _ in cache._ledger.allocators]
        for b, blocks in enumerate(cache._ledger.blocks):
            assert cache.block_table[b, : len(blocks)].tolist() == blocks
            held[b if pool_blocks is None else 0].update(blocks)
        for allocator, counts in zip(cache._ledger.allocators, held, strict=True):
            assert [*allocator.holders] == [counts[block] for block in range(len(allocator.holders))]
            assert allocator.num_free == allocator.holders.count(0)
        if cache.lengths == lengths != done.lengths:
            for b, rows in enumerate(before):
                for view, want in zip((cache.k_cache, cache.v_cache), rows, strict=True):
                    assert torch.equal(held_rows(cache, view, b), want), f"line {line}: request {b}"
        if not told:
            break
    assert line > 1
    assert not told


def test_threads_on_one_cache_take_turns() -> None:
    """Appends, forks and frees of four threads, each on requests of its own: no block has two owners."""
    cache = PagedKVCache(8, 1, D, max_seq_len=640, v_head_dim=Dv, pool_blocks=64, dtype=torch.float32)

    def work(first: int) -> None:
        for i in range(40):
            rows = torch.full((1, 1, 17, D), float(first * 100 + i))
            cache.append(rows, rows[..., :Dv], requests=[first])
            if i % 10 == 5:
                cache.fork(first, first + 1)
                cache.append(rows, rows[..., :Dv], requests=[first + 1])
                cache.free([first + 1])
            if i % 10 == 9:
                assert held_rows(cache, cache.k_cache, first)[0, -1, 0] == first * 100 + i
                cache.truncate([30], [first])

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, first) for first in (0, 2, 4, 6)]:
                done.result()
    finally:
        sys.setswitchinterval(switch)
    assert cache.lengths == (30, 0) * 4
    assert tuple(cache.seq_lens.tolist()) == cache.lengths
    assert cache.num_free_blocks == 64 - 4
    assert len({int(cache.block_table[b, 0]) for b in (0, 2, 4, 6)}) == 4


def test_a_request_may_copy_a_block_and_grow_in_one_append() -> None:
    cache = PagedKVCache(2, Hk, D, max_seq_len=256, v_head_dim=Dv, pool_blocks=8, dtype=torch.float32)
    cache.append(torch.randn(2, Hk, 63, D), torch.randn(2, Hk, 63, Dv), [63, 0])
    cache.fork(0, 1)
    cache.extend(70)
    assert cache.num_free_blocks == 8 - 2 * 3
    cache.clear()
    assert cache.num_free_blocks == 8


@pytest.mark.parametrize("pool_blocks", [None, 12])
def test_truncate_gives_blocks_back_and_copies_on_write(pool_blocks: int | None) -> None:
    cache = filled(pool_blocks)
    want = held_rows(cache, cache.k_cache, 0).clone()
    free = cache.num_free_blocks
    cache.truncate([70, 30, 64, 0])
    assert cache.lengths == (70, 30, 64, 0) == tuple(cache.seq_lens.tolist())
    assert cache.num_free_blocks == free + 1  # request 1's own copy of the second block
    cache.append(torch.full((1, Hk, 5, D), 9.0), torch.full((1, Hk, 5, Dv), 9.0), requests=[1])
    assert torch.equal(held_rows(cache, cache.k_cache, 0), want[:, :70])
    assert torch.equal(held_rows(cache, cache.k_cache, 1)[:, :30], want[:, :30])
    with pytest.raises(SequenceLengthError, match="70 held"):
        cache.truncate([71], [0])


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.append([1]),
        lambda cache: cache.append("k", "v"),
        lambda cache: cache.extend("many"),
        lambda cache: cache.extend([1.5] * 4),
        lambda cache: cache.free(0),
        lambda cache: cache.free("0"),
        lambda cache: cache.fork(None, 0),
        lambda cache: cache.reorder(0),
        lambda cache: cache.truncate(3),
        lambda cache: cache.grow("2"),
        lambda cache: cache.grow(1.5),
        lambda cache: page_view([1], 2),
    ],
)
def test_what_is_no_number_or_tensor_is_refused(call) -> None:
    with pytest.raises(ShapeError):
        call(filled(12))


def test_neither_default_device_nor_inference_mode_matters() -> None:
    with torch.inference_mode():
        cache = filled(12)
    with torch.device("meta"):
        cache.append(torch.ones(4, Hk, 2, D, device="cpu"), torch.ones(4, Hk, 2, Dv, device="cpu"))
        cache.reorder([1, 0, 3, 2])
    assert cache.lengths == (102, 102, 2, 66) == tuple(cache.seq_lens.tolist())


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("pool", [None, 9])
def test_decode_passes_what_the_cache_knows(latent: bool, dtype: torch.dtype, pool: int | None) -> None:
    """`cache.decode` against a float64 reference over the rows that were appended."""
    B, heads, D, Dv, factor = 3, 1 if latent else 2, 64, 32, 0.37
    scaled = {"k_descale": factor, "v_descale": 2 * factor} if dtype == FP8 else {}
    cache = PagedKVCache(
        B, heads, D, v_head_dim=Dv, latent=latent, max_seq_len=192, pool_blocks=pool, dtype=dtype, **scaled
    )
    cache.k_cache[:].fill_(float("nan"))
    cache.v_cache[:].fill_(float("nan"))
    torch.manual_seed(11)
    rows = torch.bfloat16 if dtype == FP8 else dtype
    k, v = torch.randn(B, heads, 130, D).to(rows), torch.randn(B, heads, 130, Dv).to(rows)
    lengths = [130, 1, 64]
    cache.append(k, None if latent else v, lengths)
    q = torch.randn(B, 4, 2, D).to(rows)
    out, lse = cache.decode(q, softmax_scale=0.3, return_lse=True)
    if dtype == FP8:
        k = quantise(k, factor)[0].double() * factor
        v = quantise(v, 2 * factor)[0].double() * 2 * factor
    v = k[..., :Dv] if latent else v
    for b, length in enumerate(lengths):
        keys, values = (x[b, :, :length].double().repeat_interleave(4 // heads, 0) for x in (k, v))
        scores = 0.3 * q[b].double() @ keys.mT
        hidden = torch.arange(length) > length - 2 + torch.arange(2)[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        expected = torch.softmax(scores, -1).nan_to_num(0) @ values
        budget = 1.6e-2 if rows == torch.bfloat16 else 1e-5
        assert (out[b].double() - expected).abs().max() <= budget * expected.abs().max()
        torch.testing.assert_close(lse[b].double(), scores.logsumexp(-1), atol=1e-4, rtol=0)
    assert list(cache._metadata) == [q.shape], "metadata is made once for a shape"
    cache.grow(1)
    assert torch.equal(cache.decode(q, softmax_scale=0.3), out)
    with pytest.raises(MaskShapeError, match="130"):
        cache.decode(q, torch.ones(B, 1, 1, 129, dtype=torch.bool))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("forgotten", ["k_descale", "v_descale"])
def test_a_descale_is_not_forgotten_silently(forgotten: str, copied: bool) -> None:
    cache = PagedKVCache(1, 2, 64, max_seq_len=64, dtype=FP8, k_descale=0.5, v_descale=torch.tensor([1.0, 3.0]))
    cache.append(torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64))
    cache = pickle.loads(pickle.dumps(cache)) if copied else cache
    descales = {"k_descale": cache.k_descale, "v_descale": cache.v_descale}
    call = (cache.k_cache, cache.v_cache, cache.block_table)
    q = torch.randn(1, 2, 1, 64, dtype=torch.bfloat16)
    expected = flash_mla_with_kvcache(q, *call, cache.seq_lens, **descales)
    assert torch.equal(cache.decode(q), expected)
    for mask in (None, torch.ones(1, 1, 1, 9, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=rf"{forgotten}.*\n.*cache\.{forgotten}"):
            flash_mla_with_kvcache(q, *call, cache.seq_lens, mask, **(descales | {forgotten: None}))
    q8 = q.expand(-1, -1, 9, -1).to(FP8)
    with pytest.raises(ShapeError, match=forgotten):
        mha_fwd_kvcache(q8, *call, start_pos=torch.zeros(1, dtype=torch.int32), **(descales | {forgotten: None}))
    plain = PagedKVCache(1, 2, 64, max_seq_len=64, dtype=FP8)
    plain.append(torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64))
    flash_mla_with_kvcache(q, plain.k_cache, plain.v_cache, plain.block_table, plain.seq_lens)  # a factor of 1
