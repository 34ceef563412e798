"""A step of decode as one CUDA graph: where launches bind, a replay costs one.

    cache = paged_cache(model, batch=1, max_seq_len=4096, cuda_graph=True)

The first step of one token a sequence is captured: the whole model, from token ids to logits, over static tensors. Each
later step does on the host what a step needs (blocks for its tokens, the mask's padding), writes ids, positions,
lengths and tables in place, and replays. Prompts, steps of several tokens (chunks, drafts), steps that hold padding and
calls with other arguments run as they do without a graph. Another batch, or a cache that grew, is captured again.

A model whose forward reads a value on the host cannot be captured. Of transformers' mixtures of experts that is the
"eager" implementation: `model.set_experts_implementation("batched_mm")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_mla.errors import DeviceError, ModelError
from flash_mla.integrations.transformers.cache import CACHE, cache_of
from flash_mla.integrations.transformers.step import Step, Tokens, check_padding

if TYPE_CHECKING:
    from flash_mla.integrations.transformers.cache import PagedCache

KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"}
KNOWN |= {"past_key_values", "cache"}
"""Arguments of a forward that a replay stands for; any other, unless None or False, runs without the graph."""
WARM_UPS = 2  # runs before the capture: kernels compile and workspaces grow outside of it

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a run over static tensors; gives what runs it again, and the tensor that then holds the result."""


class DecodeGraph:
    """The captured step of one PagedCache.

    Attributes:
        step: what the layers share, while the captured forward runs; None otherwise.
        captures: how often a graph was made.
    """

    def __init__(self, cache: PagedCache, capture: Capture | None = None) -> None:
        device = cache.pages.seq_lens.device
        if capture is None and device.type != "cuda":
            raise DeviceError(
                given=f"cuda_graph=True, a model on {device}",
                required="a model on a CUDA device",
                cause="A CUDA graph needs a GPU",
                fix="Leave cuda_graph out",
            )
        self.cache = cache
        self.step: Step | None = None
        self.captures = 0
        self._capture = capture or capture_on_gpu
        self._made_for: tuple[Any, ...] | None = None

    def run(self, forward: Callable[..., Any], ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] of one token a sequence, which has its block already."""
        pages = self.cache.pages
        # the addresses of lengths, tables and caches are in the graph, and a model may be moved or cast
        places = (x.data_ptr() for x in (pages.seq_lens, pages.block_table, pages.k_cache))
        made_for = (*places, ids.shape, forward)
        if made_for != self._made_for:
            self._ids, self._position_ids = ids.clone(), position_ids.clone()
            self._made_for = None
            try:
                self._replay, self._logits = self._capture(lambda: self._forward(forward))
            except RuntimeError as error:
                raise ModelError(
                    given=f"a decode step of {forward!r}"[:200],
                    required="a forward that runs on the GPU alone",
                    cause=f"The step cannot be captured: {error}"[:500],
                    fix='model.set_experts_implementation("batched_mm"), or paged_cache without cuda_graph',
                ) from error
            finally:
                self.step = None
            self._made_for = made_for
            self.captures += 1
        self._ids.copy_(ids)
        self._position_ids.copy_(position_ids)
        self._replay()
        return self._logits.clone()

    def _forward(self, forward: Callable[..., Any]) -> Tensor:
        self.step = Step.of_last_tokens(self.cache.pages)
        cache = {CACHE: self.cache}
        return forward(input_ids=self._ids, position_ids=self._position_ids, use_cache=True, **cache).logits


def replay_or_run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model's forward; a step of decode over a cache with a graph replays it."""
    if args and "input_ids" not in kwargs:
        kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
    cache: Any = cache_of(kwargs)
    graph: DecodeGraph | None = getattr(cache, "graph", None)
    if args or graph is None or graph.step is not None or not is_decode(cache, kwargs):
        return forward(*args, **kwargs)
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    tokens = Tokens(len(ids), 1, mask)
    if tokens.counts is not None and any(count != 1 for _, count in tokens.counts):
        return forward(**kwargs)  # a sequence without a new token
    cache.admit(tokens)
    position_ids = kwargs.get("position_ids")
    if position_ids is None:  # as the models do without padding
        position_ids = torch.full_like(ids, cache.seen - 1)
    return CausalLMOutputWithPast(logits=graph.run(forward, ids, position_ids), **{CACHE: cache})


def is_decode(cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of one token a sequence, behind others, without a gradient."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    more = (value for name, value in kwargs.items() if name not in KNOWN)
    if any(value is not None and value is not False for value in more) or torch.is_grad_enabled():
        return False
    if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or not cache.seen or kwargs.get("return_dict") is False:
        return False
    check_padding(mask, len(ids), cache.seen + 1)
    return True


def capture_on_gpu(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Warm up on a stream of its own, then capture. Each run writes the same rows to the same slots."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    return graph.replay, logits
