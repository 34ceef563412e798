"""Time context-parallel decode over the cards of one host beside one card, in one run; the exchange apart.

    torchrun --nproc-per-node 2 docs/bench/two_cards.py                # B 8, S 131072, 128 heads, BF16
    torchrun --nproc-per-node 2 docs/bench/two_cards.py --device cpu --batch 2 --tokens 1000 --heads 8

Every rank holds the whole cache, and for the sharded calls a copy of its own blocks. On GPUs each round of a case is
ten replays of a CUDA graph between two events; the time of a case is the median of its rounds on the slowest rank.
`exchange` is pack and all-gather of (out, lse) alone, `merge` the average of the parts alone: both are inside of the
decodes too.

A prompt then: causal attention of all of it on one card, beside the gather of K and V and each rank's own chunks.

Exits with status 1 where a sharded result is wrong, or a decode slower than --aim times one card.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from flash_mla import PagedKVCache, flash_mla_prefill, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.distributed import ShardedAttention, local_cache
from flash_mla.distributed.attention import merge_rounded
from flash_mla.distributed.exchange import pack, unpack
from flash_mla.problem import BLOCK

SCALE = 192**-0.5
REPLAYS = 10  # a round: what one rank starts later than the other is a tenth of it in a time


def seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median time of a call on the slowest rank."""
    for _ in range(3):
        run()
    times = []
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # NOTE: NCCL's watchdog asks for its events from a thread of its own, which a global capture would refuse
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            dist.barrier()
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / REPLAYS)
    else:
        for _ in range(rounds):
            dist.barrier()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    medians = [0.0] * dist.get_world_size()
    dist.all_gather_object(medians, statistics.median(times))
    return max(medians)


def largest_difference(got: Tensor, true: Tensor) -> float:
    """Of the largest |true|; 0 where a rank has no rows."""
    return 0.0 if not true.numel() else ((got.float() - true.float()).abs().max() / true.float().abs().max()).item()


def decodes(
    attention: ShardedAttention, B: int, S: int, Hq: int, device: str
) -> tuple[dict[str, Callable[[], object]], float]:
    """The cases of a decode, and how far the sharded result is from one card's."""
    rank, size = attention.context.rank, attention.context.size
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)  # the same on all ranks
    cache = PagedKVCache.mla(B, max_seq_len=S, dtype=dtype, device=device)
    for start in range(0, S, 64 * BLOCK):
        rows = min(64 * BLOCK, S - start)
        cache.append(torch.randn(B, 1, rows, 576, generator=generator, device=device, dtype=dtype))
    q = torch.randn(B, Hq, 1, 576, generator=generator, device=device, dtype=dtype)
    whole = (cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)
    metadata = get_mla_metadata(q.shape, cache.k_cache.shape, cache.block_table, cache.seq_lens, v_head_dim=512)
    k, table = local_cache(cache.k_cache, cache.block_table, rank, size)
    step = attention.step(q.shape, k.shape, table, cache.seq_lens, v_head_dim=512)

    def one_card() -> Tensor:
        return flash_mla_with_kvcache(q, *whole, metadata=metadata, softmax_scale=SCALE)

    def sharded(scatter_heads: bool = False) -> Tensor:
        own = (k, k[..., :512], table)
        return attention.decode(q, *own, step, softmax_scale=SCALE, scatter_heads=scatter_heads)

    part, part_lse = flash_mla_with_kvcache(
        q, k, k[..., :512], table, step.parts[0].seq_lens, metadata=step.metadata, softmax_scale=SCALE, return_lse=True
    )

    def exchange() -> tuple[Tensor, Tensor]:
        return unpack(attention.context.all_gather(pack(part, part_lse)), dtype)

    parts = exchange()
    cases: dict[str, Callable[[], object]] = {
        "one card": one_card,
        f"{size} cards": sharded,
        f"{size} cards, heads scattered": lambda: sharded(True),
        "exchange": exchange,
        "merge": lambda: merge_rounded(*parts, None),
    }
    return cases, largest_difference(sharded(), one_card())


def prompts(attention: ShardedAttention, P: int, Hq: int, device: str) -> tuple[dict[str, Callable[[], object]], float]:
    """The cases of a prompt of P tokens with expanded heads, and how far the sharded result is from one card's."""
    size = attention.context.size
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (
        torch.randn(1, Hq, P, width, generator=generator, device=device, dtype=torch.bfloat16)
        for width in (192, 192, 128)
    )
    own_q, own_k, own_v = (attention.shard_prompt(x, 2) for x in (q, k, v))

    def gather() -> tuple[Tensor, ...]:
        return attention.gather_prompt(own_k, own_v, num_tokens=P)

    def sharded() -> Tensor:
        return attention.prefill(own_q, *gather())

    cases = {"one card": lambda: flash_mla_prefill(q, k, v), f"{size} cards": sharded, "gather of K and V": gather}
    return cases, largest_difference(sharded(), attention.shard_prompt(flash_mla_prefill(q, k, v), 2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Context-parallel attention over the cards of one host, beside one card."
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=131072, help="S of every request")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--prompt-heads", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--aim", type=float, default=0.58, help="of one card's time, on two")
    options = parser.parse_args(arguments)
    device = options.device

    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
        print(f"rank {rank}: {torch.cuda.get_device_name()}", flush=True)
    attention = ShardedAttention(init_device_mesh(device, (size,), mesh_dim_names=("context",)), context="context")

    failures = []
    for title, (cases, error), aim in (
        (
            f"decode: B {options.batch}, S {options.tokens}, {options.heads} heads",
            decodes(attention, options.batch, options.tokens, options.heads, device),
            options.aim,
        ),
        (
            f"prompt: {options.prompt} tokens, {options.prompt_heads} heads",
            prompts(attention, options.prompt, options.prompt_heads, device),
            math.inf,
        ),
    ):
        times = {name: seconds(run, device, options.rounds) for name, run in cases.items()}
        ratio = times[f"{size} cards"] / times["one card"]
        if rank == 0:
            print(f"{title}, BF16; {options.rounds} rounds")
            for case, value in times.items():
                print(f"{case:28} {value * 1e6:10.1f} us  {value / times['one card']:6.3f} of one card")
            print(f"largest difference {error:.1e} of the largest |out|; aim: {aim} of one card", flush=True)
        # both are within BF16's budget of the truth: 1.6e-2 of the largest
        if error > 3.2e-2:
            failures.append(f"{title}: rank {rank} is off by {error:.1e} of the largest |out|")
        if ratio > aim:
            failures.append(f"{title}: {ratio:.3f} of one card, aim {aim}")
    if own_group:
        dist.destroy_process_group()
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
