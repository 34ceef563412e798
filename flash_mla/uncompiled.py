"""The call that no graph holds. Apart, because `torch.compiler.disable` imports all of torch's compiler: seconds."""

from __future__ import annotations

import torch

from flash_mla import api

mha_fwd_kvcache = torch.compiler.disable(
    api.mha_fwd_kvcache,
    reason="mha_fwd_kvcache writes into a pool (stride 0 on the batch dim), and a graph cannot declare that it writes "
    "to an expanded tensor: the graph breaks here. Compile without fullgraph=True, or write the rows before the graph "
    "and call without k and v in it",
)
