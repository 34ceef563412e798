"""The real vLLM engine on this CPU: our attention must give the tokens that vLLM's own gives, in FP32, and as fast.

    make engines        # a venv of its own in .venv-engines, then this file

Two tiny models of random weights, DeepSeek-V3's shape (MLA) and Llama's (GQA), decode six ragged prompts greedily, each
engine in a process of its own: vLLM's backends, ours by the platform plugin (pages of 64), and ours in the place of
vLLM's (pages of 16). In BF16 the random experts of the first part within few tokens, whoever attends; hence FP32.
The CPU time of a decode step is printed beside vLLM's own of the same job, the best of ROUNDS. It fails nothing: on a
shared machine caches are shared too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

LENGTHS = (5, 100, 130, 63, 64, 200)
NEW_TOKENS = 40
ROUNDS = 5
VOCABULARY = 264
CUSTOM = {"attention_config": {"backend": "CUSTOM"}}
RUNS = {
    "vLLM": ("", {}),
    "flash_mla": ("flash_mla,flash_mla_cpu", CUSTOM),
    "flash_mla in vLLM's place": ("flash_mla,flash_mla_cpu_override", {}),
}
"""For each engine: the plugins that VLLM_PLUGINS names, and what LLM is told."""


def build_models(folder: Path) -> dict[str, Path]:
    """Random weights for both models, from one seed."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": 4096,
    }
    deepseek = DeepseekV3Config(
        **shared, moe_intermediate_size=128, num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=512,
        q_lora_rank=128, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
    )  # fmt: skip
    llama = LlamaConfig(**shared, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    torch.manual_seed(0)
    for name, model in (("mla", DeepseekV3ForCausalLM(deepseek)), ("gqa", LlamaForCausalLM(llama))):
        model.to(torch.bfloat16).save_pretrained(folder / name)
    # NOTE: transformers does not write it, and vLLM's loader asks for the bias that it implies
    config = folder / "mla" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "topk_method": "noaux_tc"}))
    return {name: folder / name for name in ("mla", "gqa")}


def generate(model: str, options: str, target: str) -> None:
    """One engine's tokens, written to `target`: in a process of its own."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024, max_num_seqs=8, dtype="float32",
        **json.loads(options),
    )  # fmt: skip
    chance = torch.Generator().manual_seed(1)
    prompts = [
        TokensPrompt(prompt_token_ids=torch.randint(0, VOCABULARY, (n,), generator=chance).tolist()) for n in LENGTHS
    ]

    def timed(count: int) -> tuple[list[list[int]], float]:
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = process_time()
        requests = engine.generate(prompts, greedy, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in requests], process_time() - start

    tokens, _ = timed(NEW_TOKENS)  # kernels compile
    steps = [(timed(NEW_TOKENS)[1] - timed(1)[1]) / (NEW_TOKENS - 1) for _ in range(ROUNDS)]
    Path(target).write_text(json.dumps({"tokens": tokens, "step": min(steps)}))


def run(model: Path, plugins: str, options: dict[str, object], target: Path) -> dict[str, Any]:
    """The tokens of each request, and the CPU seconds of a step that decodes one token for each."""
    # NOTE: vLLM's OpenMP threads wait actively: two of them on two cores that others use took over 15 minutes
    environment = {
        **os.environ, "VLLM_PLUGINS": plugins, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, str(model), json.dumps(options), str(target)]
    log = target.with_suffix(".log")
    with log.open("w") as out:
        if subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=900).returncode:
            raise RuntimeError(f"the engine ended early:\n{log.read_text()[-3000:]}")
    return json.loads(target.read_text())


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in build_models(Path(folder)).items():
            theirs: dict[str, Any] = {}
            for engine, (plugins, options) in RUNS.items():
                result = run(model, plugins, options, Path(folder) / "result.json")
                theirs = theirs or result
                equal = sum(a == b for a, b in zip(result["tokens"], theirs["tokens"], strict=True))
                failures += equal < len(LENGTHS)
                print(
                    f"{kind}, {engine}: {equal} of {len(LENGTHS)} requests of {NEW_TOKENS} tokens equal; a step "
                    f"{1e3 * result['step']:.1f} ms, {result['step'] / theirs['step']:.2f} of vLLM's own",
                    flush=True,
                )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(generate(*sys.argv[1:]) if len(sys.argv) > 1 else main())
