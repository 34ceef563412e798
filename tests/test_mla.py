"""MLAProjection: absorbed attention over the cache is the expanded one; and who forgets the scale is told."""

from __future__ import annotations

import warnings

import pytest
import torch

from flash_mla import (
    DTypeError,
    PagedKVCache,
    ScaleWarning,
    ShapeError,
    decode_over_pages,
    flash_mla_prefill,
    flash_mla_with_kvcache,
)
from flash_mla.mla import MLAProjection

B, HQ, NOPE, ROPE, V, LATENT = 2, 3, 24, 16, 40, 64


def draw(S=70, S_q=3, dtype=torch.float64):
    """(kv_b_proj.weight, q of the last S_q tokens before absorption, the cache's rows)."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((HQ * (NOPE + V), LATENT), (B, HQ, S_q, NOPE + ROPE), (B, 1, S, LATENT + ROPE))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def unabsorbed(weight, q, rows, scale):
    """One head and one token at a time, as the model's own code has it: key and value of the token, then softmax."""
    S, S_q = rows.shape[2], q.shape[2]
    out = torch.zeros(B, HQ, S_q, V, dtype=torch.float64)
    for b in range(B):
        for h in range(HQ):
            head = weight[h * (NOPE + V) : (h + 1) * (NOPE + V)].double()
            made = rows[b, 0, :, :LATENT].double() @ head.T  # [S, NOPE + V]
            k = torch.cat([made[:, :NOPE], rows[b, 0, :, LATENT:].double()], dim=-1)
            for i in range(S_q):
                seen = S - S_q + i + 1
                weights = (scale * (k[:seen] @ q[b, h, i].double())).softmax(-1)
                out[b, h, i] = weights @ made[:seen, NOPE:]
    return out


def test_absorbed_scores_and_values_are_the_expanded_ones():
    weight, q, rows = draw()
    kv_b = MLAProjection.from_weight(weight, HQ, nope=NOPE, rope=ROPE)
    assert kv_b.softmax_scale == (NOPE + ROPE) ** -0.5
    k, v = kv_b.expand(rows)
    scores = kv_b.absorb(q) @ rows.transpose(2, 3)
    torch.testing.assert_close(scores, q @ k.transpose(2, 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        kv_b.project(scores.softmax(-1) @ rows[..., :LATENT]), scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12
    )


def test_decode_and_prefill_of_a_layer():
    """The whole way in FP32, over the cache and over expanded keys, against float64 head by head."""
    weight, q, rows = draw(dtype=torch.float32)
    kv_b = MLAProjection.from_weight(weight, HQ, nope=NOPE, rope=ROPE)
    expected = unabsorbed(weight, q, rows, kv_b.softmax_scale)

    cache = PagedKVCache.mla(B, LATENT + ROPE, LATENT, max_seq_len=128, dtype=torch.float32)
    cache.k_cache.fill_(torch.nan)
    cache.append(rows)
    absorbed = kv_b.absorb(q)
    assert absorbed.is_contiguous()
    latent = flash_mla_with_kvcache(
        absorbed, cache.k_cache, cache.v_cache, cache.block_table, cache.seq_lens, softmax_scale=kv_b.softmax_scale
    )
    torch.testing.assert_close(kv_b.project(latent).double(), expected, rtol=1e-4, atol=1e-4)

    k, v = kv_b.expand(rows)
    whole = torch.cat([torch.zeros(B, HQ, rows.shape[2] - q.shape[2], NOPE + ROPE), q], dim=2)
    out = flash_mla_prefill(whole, k, v, softmax_scale=kv_b.softmax_scale)
    torch.testing.assert_close(out[:, :, -q.shape[2] :].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_halves_are_views_and_gradients_reach_the_weight():
    weight, q, rows = draw()
    weight.requires_grad_()
    kv_b = MLAProjection.from_weight(weight, HQ, nope=NOPE, rope=ROPE)
    assert kv_b.w_k.data_ptr() == weight.data_ptr()
    scores = kv_b.absorb(q) @ rows.transpose(2, 3)
    kv_b.project(scores.softmax(-1) @ rows[..., :LATENT]).sum().backward()
    absorbed, weight.grad = weight.grad, None
    k, v = kv_b.expand(rows)
    ((q @ k.transpose(2, 3)).softmax(-1) @ v).sum().backward()
    torch.testing.assert_close(absorbed, weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, q, rows: MLAProjection.from_weight(w.T, HQ, nope=NOPE, rope=ROPE), ShapeError, "transpose"),
        (lambda w, q, rows: MLAProjection.from_weight(w, 5, nope=NOPE, rope=ROPE), ShapeError, "num_heads = 5"),
        (lambda w, q, rows: MLAProjection.from_weight(w, HQ), ShapeError, "nope = 128"),
        (lambda w, q, rows: kv(w).absorb(q.transpose(1, 2)), ShapeError, "Heads come before tokens"),
        (lambda w, q, rows: kv(w).absorb(q[..., :-1]), ShapeError, "q \\[2, 3, 5, 39\\]"),
        (lambda w, q, rows: kv(w).absorb(q.float()), DTypeError, "float32"),
        (lambda w, q, rows: kv(w).expand(rows[:, 0]), ShapeError, "rows"),
        (lambda w, q, rows: kv(w).project(q), ShapeError, "out"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(*draw(S_q=5))


def kv(weight):
    return MLAProjection.from_weight(weight, HQ, nope=NOPE, rope=ROPE)


@pytest.mark.parametrize("door", ["caches", "pages", "split"])
def test_a_latent_without_a_scale_gives_a_warning(door):
    """Once for each place of the user's code, naming that place; not where the scale is given."""
    _, _, rows = draw(dtype=torch.float32)
    cache = PagedKVCache.mla(B, LATENT + ROPE, LATENT, max_seq_len=128, dtype=torch.float32, pool_blocks=4)
    cache.append(rows)
    q = torch.randn(B, HQ, 1, LATENT + ROPE)
    pages = cache.k_cache[0].permute(1, 2, 0, 3)
    tables = (cache.block_table, cache.seq_lens)

    def attend(**scale):
        if door == "caches":
            return flash_mla_with_kvcache(q, cache.k_cache, cache.v_cache, *tables, **scale)
        if door == "pages":
            return decode_over_pages(q, pages, None, *tables, v_head_dim=LATENT, **scale)
        return decode_over_pages(q, pages[..., :LATENT], None, *tables, k_rope_pages=pages[..., LATENT:], **scale)

    with pytest.warns(ScaleWarning, match="before absorption") as caught:
        default = attend()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(softmax_scale=(LATENT + ROPE) ** -0.5), default)


def test_no_warning_where_v_is_all_of_k_or_apart():
    cache = PagedKVCache(B, 1, 64, max_seq_len=64, latent=True, dtype=torch.float32)
    cache.append(torch.randn(B, 1, 5, 64))
    q = torch.randn(B, HQ, 1, 64)
    apart = PagedKVCache(B, 1, 64, v_head_dim=32, max_seq_len=64, dtype=torch.float32)
    apart.append(torch.randn(B, 1, 5, 64), torch.randn(B, 1, 5, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (cache, apart):
            flash_mla_with_kvcache(q, x.k_cache, x.v_cache, x.block_table, x.seq_lens)
