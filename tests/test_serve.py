"""The serving example: a recorded trace, replayed, against one request at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

import serve

from flash_mla.demo import build_model

HERE = Path(serve.__file__).parent


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return serve.one_by_one(build_model(), trace())


def trace() -> list[serve.Request]:
    return serve.read_trace(HERE / "arrivals.jsonl", serve.TEXT)


@pytest.mark.parametrize(
    ("slots", "blocks", "chunk"),
    [(4, 16, 32), (3, 6, 50), (1, 5, 300)],
    ids=["ample", "short-of-blocks", "one-slot"],
)
def test_every_request_gets_the_tokens_that_it_gets_alone(slots, blocks, chunk, alone):
    requests = trace()
    server = serve.Server(build_model(), slots, 300, blocks, chunk)
    use = server.run(requests)
    assert [request.tokens for request in requests] == alone
    pages = server.cache.pages
    assert pages.num_free_blocks == blocks, "every block came back"
    assert not any(pages.lengths)
    assert use.most_blocks <= blocks
    assert all(request.finished >= request.arrival for request in requests)
    computed = sum(len(request.prompt) + request.wanted - 1 - request.shared for request in requests)
    assert (use.computed == computed) == (use.sent_back == 0), "what is sent back is computed again, nothing else is"
    assert (use.sent_back > 0) == (blocks == 6)
    assert any(request.shared for request in requests) == (slots > 1)
    assert (use.most_saved > 0) == (slots > 1)


def test_a_pool_too_small_for_a_request_is_refused():
    with pytest.raises(SystemExit, match="do not hold one request of 300"):
        serve.Server(build_model(), 2, 300, 4)
