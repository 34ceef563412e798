"""Load the built package as `kernels` does, and hold its decode against float64.

    python hub/load.py build/hub

Exits with an error where the package does not load, reaches outside of its folder, or is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel


def check(folder: Path) -> str:
    """A line that says what ran."""
    sys.modules["flash_mla"] = None  # type: ignore[assignment]  # an import of the installed package fails
    kernel = get_local_kernel(folder, backend="cpu")
    torch.manual_seed(0)
    lengths, scale = [0, 100, 64], 192**-0.5
    cache = kernel.PagedKVCache.mla(3, max_seq_len=256, dtype=torch.float32)
    rows, q = torch.randn(3, 1, 100, 576), torch.randn(3, 16, 1, 576)
    cache.append(rows, num_tokens=lengths)
    call = (q, cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens)
    out = kernel.flash_mla_with_kvcache(*call, softmax_scale=scale)
    for b, length in enumerate(lengths):
        keys = rows[b, 0, :length].double()
        true = ((q[b, :, 0].double() @ keys.T) * scale).softmax(-1) @ keys[:, :512]
        torch.testing.assert_close(out[b, :, 0].double(), true, rtol=1e-5, atol=1e-5)
    namespace = getattr(torch.ops, kernel.__name__)
    assert callable(namespace.flash_mla_with_kvcache), "the ops have no namespace of their own"
    outside = {
        name: module.__file__
        for name, module in sys.modules.items()
        if name.startswith(kernel.__name__) and not Path(module.__file__ or "").is_relative_to(folder.resolve())
    }
    assert not outside, outside
    return f"{kernel.__name__}: decode of {sum(lengths)} tokens is that of float64"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load the package back and check it.")
    parser.add_argument("folder", type=Path)
    print(check(parser.parse_args().folder))
