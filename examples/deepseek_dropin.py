"""Code that was written for DeepSeek's FlashMLA package, with one import changed.

    python examples/deepseek_dropin.py

Dense decode over a BF16 pool, then sparse decode over V3.2's FP8 rows of 656 bytes, in DeepSeek's names, argument order
and layouts: q [b, s_q, h_q, d], pools [num_blocks, 64, 1, d].
"""

from __future__ import annotations

import torch
from torch import Tensor

import flash_mla.deepseek as flash_mla  # was: import flash_mla
from flash_mla.quant import FORMATS

B, HQ, D, DV, PAGE, S = 2, 16, 576, 512, 64, 300
SCALE = (128 + 64) ** -0.5


def attend(q: Tensor, keys: Tensor) -> Tensor:
    """The truth in float64: q [h_q, d] over keys [n, d], values in their first columns."""
    weights = (SCALE * q.double() @ keys.double().T).softmax(-1)
    return weights @ keys[:, :DV].double()


def dense(pool: Tensor, table: Tensor, lengths: Tensor, q: Tensor) -> float:
    """Dense decode; the largest error over the largest output."""
    metadata, num_splits = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q, pool, table, lengths, DV, metadata, num_splits, softmax_scale=SCALE, causal=True
    )
    rows = [pool[table[b].long()].view(-1, D)[: int(lengths[b])] for b in range(B)]
    expected = torch.stack([attend(q[b, 0], rows[b]) for b in range(B)])
    return float((out[:, 0].double() - expected).abs().max() / expected.abs().max())


def sparse(pool: Tensor, table: Tensor, lengths: Tensor, q: Tensor, topk: int = 128) -> float:
    """Sparse decode over the same tokens in FP8; the error against the rows as stored."""
    rows = FORMATS["fp8_ds_mla"]
    fp8_pool = rows.quantise(pool)
    chosen = torch.stack([torch.randperm(int(n))[:topk] for n in lengths])[:, None]  # an indexer's, [b, s_q, topk]
    indices = flash_mla.pool_indices(chosen, table, page=PAGE)
    metadata, num_splits = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q, fp8_pool, None, None, DV, metadata, num_splits, softmax_scale=SCALE, is_fp8_kvcache=True, indices=indices
    )
    stored = rows.dequantise(fp8_pool).view(-1, D)
    expected = torch.stack([attend(q[b, 0], stored[indices[b, 0].long()]) for b in range(B)])
    return float((out[:, 0].double() - expected).abs().max() / expected.abs().max())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    blocks = -(-S // PAGE)
    pool = torch.randn(B * blocks, PAGE, 1, D, dtype=torch.bfloat16)
    table = torch.randperm(B * blocks, dtype=torch.int32).view(B, blocks)
    lengths = torch.tensor([S, S - 100], dtype=torch.int32)
    q = torch.randn(B, 1, HQ, D, dtype=torch.bfloat16)
    errors = {"dense": dense(pool, table, lengths, q), "sparse": sparse(pool, table, lengths, q)}
    for name, error in errors.items():
        print(f"{name} decode: error {error:.1e} of the largest output")
    return errors


if __name__ == "__main__":
    main()
