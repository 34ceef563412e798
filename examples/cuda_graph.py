"""A decode step under a CUDA graph: captured once, right for every later step.

    python examples/cuda_graph.py

With metadata a decode call reads no value on the host and allocates nothing but its output and workspace. The cache
writes new rows, lengths and table entries in place, so a replay sees them. Without a GPU the same steps run without
a graph, and the program says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_mla import PagedKVCache, flash_mla_with_kvcache, get_mla_metadata

B, HQ, SCALE = 4, 16, (128 + 64) ** -0.5


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a graph; calling it replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles; a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def main() -> int:
    """Returns how many of eight steps gave bitwise what a call outside of the graph gives."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cache = PagedKVCache.mla(B, max_seq_len=256, device=device)
    cache.append(torch.randn(B, 1, 60, 576, dtype=torch.bfloat16, device=device), num_tokens=[60, 7, 31, 58])
    q = torch.zeros(B, HQ, 1, 576, dtype=torch.bfloat16, device=device)
    tables = (cache.block_table, cache.seq_lens)
    metadata = get_mla_metadata(q.shape, cache.k_cache.shape, *tables, check_values=False)

    def step() -> Tensor:
        return flash_mla_with_kvcache(q, cache.k_cache, cache.v_cache, *tables, None, metadata, softmax_scale=SCALE)

    replay = capture(step) if device == "cuda" else step
    same = 0
    for _ in range(8):  # request 0 and 3 go on into a second block on the way
        cache.append(torch.randn(B, 1, 1, 576, dtype=torch.bfloat16, device=device))
        q.copy_(torch.randn_like(q))
        same += int(torch.equal(replay().clone(), step()))
    how = "replays of a CUDA graph" if device == "cuda" else "steps (no CUDA device: nothing was captured)"
    print(f"{same} of 8 {how} gave bitwise what an eager call gives; lengths {cache.lengths}")
    return same


if __name__ == "__main__":
    main()
