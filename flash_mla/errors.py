"""The errors of flash_mla: each says what was given, what is required, the cause, and the fix.

This is the only module that formats an error message. A class carries the cause and the fix of its row in the
reference's table ("Common Shape Mismatch Errors & Fixes"); a call site adds the names, shapes and numbers it saw, and
replaces cause or fix where it knows better.
"""

from __future__ import annotations

__all__ = [
    "BlockCountError",
    "BlockTableError",
    "CacheFullError",
    "DTypeError",
    "DeviceError",
    "FlashMLAError",
    "GradientError",
    "HeadGroupingError",
    "LayoutError",
    "MaskShapeError",
    "ModelError",
    "RankError",
    "ScaleWarning",
    "SequenceLengthError",
    "ShapeError",
]


class FlashMLAError(ValueError):
    """Base of every error that flash_mla raises for bad input.

    Args:
        given: what the call passed, with argument names, shapes and numbers.
        required: the rule that it breaks.
        cause: why that matters; the class's own cause when omitted.
        fix: what to do about it; the class's own fix when omitted.

    The four parts are attributes of the same names, so that a program can read them.
    """

    cause: str = "The arguments do not describe an attention problem"
    fix: str = "See docs/contract.md"

    def __init__(self, given: str, required: str, cause: str | None = None, fix: str | None = None) -> None:
        super().__init__(given, required, cause, fix)
        self.given = given
        self.required = required
        self.cause = cause or type(self).cause
        self.fix = fix or type(self).fix

    def __str__(self) -> str:
        return describe(self.given, self.required, self.cause, self.fix)


def describe(given: str, required: str, cause: str, fix: str) -> str:
    """The four parts as lines."""
    return f"\n  given:    {given}\n  required: {required}\n  cause:    {cause}\n  fix:      {fix}"


class HeadGroupingError(FlashMLAError):
    """Hq is not an integer multiple of Hk, or Hq != Hk where the function is MHA."""

    cause = "`Hq` is not an integer multiple of `Hk`"
    fix = "Adjust q reshape or head-splitting for MLA"


class BlockCountError(FlashMLAError):
    """Too few blocks for the sequence, or blocks that are not 64 tokens long."""

    cause = "`Nblk` is less than `ceil(seq_len/64)`"
    fix = "Update block_table or cache allocation"


class LayoutError(FlashMLAError):
    """Inner dims are not contiguous, or strides are not monotonic."""

    cause = "q/k_cache/v_cache not contiguous on D/Blk"
    fix = "Call `.contiguous()` or re-pack before kernel call"


class MaskShapeError(FlashMLAError):
    """A mask that is too short, or has a wrong shape or dtype."""

    cause = "`attn_mask` last dim < `P+T`"
    fix = "Pad mask or recompute with correct seq length"


class SequenceLengthError(FlashMLAError):
    """A sequence that is longer than its blocks, or of negative length."""

    cause = "`seq_lens[b]` > `Nblk*64`"
    fix = "Grow cache or truncate sequence"


class BlockTableError(FlashMLAError):
    """A used table entry that names no block of the cache."""

    cause = "block_table names a physical block that the cache does not have"
    fix = "Rebuild block_table from the cache's allocator; only entries past ceil(seq_len/64) may hold anything"


class DTypeError(FlashMLAError):
    """Tensors of different dtypes in one call, or a dtype that is not supported."""

    cause = "q/k/v and cache have different dtypes"
    fix = "Cast consistently to FP8/BF16/FP16"


class DeviceError(FlashMLAError):
    """Tensors on different devices, or a problem that no backend of this device runs."""

    cause = "The tensors are on different devices"
    fix = "Move every tensor of the call to one device"


class ShapeError(FlashMLAError):
    """Every other shape that does not fit."""

    cause = "The shapes of the arguments do not fit together"
    fix = "Compare the shapes with docs/contract.md"


class GradientError(FlashMLAError):
    """A gradient is asked of a function that has none."""

    cause = "The function has no backward"
    fix = "Call it under torch.no_grad(), or detach its inputs"


class CacheFullError(FlashMLAError):
    """The pool of a PagedKVCache has no free block left for what was asked."""

    cause = "The cache has too few free blocks"
    fix = "Call grow(num_blocks), or free() requests that are done"


class ModelError(FlashMLAError):
    """A transformers model, or a call of one, that attention over a paged cache does not serve."""

    cause = "The model attends in a way that the paged cache does not know"
    fix = "Use a transformers cache for this model"


class RankError(FlashMLAError):
    """Another rank died, did not come in time, refused its arguments, or was called with others."""

    cause = "A rank died, or did not make the same call within the process group's timeout"
    fix = "Read that rank's log; then start the process group again"


class ScaleWarning(UserWarning):
    """MLA's latent is attended to under the default scale, which is hardly ever the model's."""
