"""Time sparse decode over V4.1 rows beside MODEL1 rows: the same indices into two caches, in one process.

    python docs/bench/sparse_rows.py
    python docs/bench/sparse_rows.py --device cpu --batch 2 --tokens 1024

Each row of the table: the median time of either format, and the median over the rounds of V4.1's time over MODEL1's;
`alternate` of `flash_mla.bench.timing` flushes the caches before each call.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_mla.bench.sparse import sparse_out
from flash_mla.bench.timing import alternate, device_name, median_ratio
from flash_mla.quant import FORMATS

D, S_Q, TOPK, PAGE, EXTRA_PAGE = 512, 2, 128, 256, 64
EXTRA_TOPK = {64: 512, 128: 1024}  # by heads, as DeepSeek V4's layers have them
QUANTISED = 64  # pages of random rows; a cache repeats them


def cache(name: str, pages: int, page: int, device: str) -> Tensor:
    """Pages of a row format, [pages, page, 1, row bytes]."""
    rows = torch.randn(min(pages, QUANTISED), page, 1, D, device=device).bfloat16()
    few = FORMATS[name].quantise(rows)
    # NOTE: a page may be longer than its rows
    pitch = few.stride(0)
    memory = few.as_strided((len(few), pitch), (pitch, 1)).repeat(pages // len(few), 1)
    return memory.as_strided((pages, *few.shape[1:]), few.stride())


def arguments(name: str, batch: int, heads: int, tokens: int, device: str) -> dict[str, Any]:
    """Of a call over two caches of `tokens` tokens a request."""
    generator = torch.Generator().manual_seed(0)

    def indices(topk: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=generator)[:topk] for _ in range(batch * S_Q)]
        named = torch.stack(rows).view(batch, S_Q, -1) + tokens * torch.arange(batch)[:, None, None]
        return named.int().to(device)

    return {
        "q": torch.randn(batch, S_Q, heads, D, generator=generator).bfloat16().to(device),
        "k_cache": cache(name, batch * tokens // PAGE, PAGE, device),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": D,
        "is_fp8_kvcache": True,
        "indices": indices(TOPK),
        "extra_k_cache": cache(name, batch * tokens // EXTRA_PAGE, EXTRA_PAGE, device),
        "extra_indices_in_kvcache": indices(EXTRA_TOPK[heads]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 128])
    parser.add_argument("--tokens", type=int, default=16384, help="of a request, in each cache")
    options = parser.parse_args()
    print(f"{device_name(options.device)}, S_q {S_Q}, {options.tokens} tokens a request in each cache")
    print("| heads | B | rows named | MODEL1 us | V4.1 us | V4.1 / MODEL1 |\n| --- | --- | --- | --- | --- | --- |")
    for heads, extra in EXTRA_TOPK.items():
        for batch in options.batch:
            calls = {
                name: partial(sparse_out, **arguments(name, batch, heads, options.tokens, options.device))
                for name in ("model1", "v4.1")
            }
            times = alternate(calls, options.device, budget_s=1.0)
            model1, v41 = (1000 * statistics.median(times[name]) for name in calls)
            ratio = median_ratio(times["v4.1"], times["model1"])
            print(f"| {heads} | {batch} | {TOPK} + {extra} | {model1:.1f} | {v41:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
