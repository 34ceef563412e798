"""Random calls of every public function, legal and illegal, judged by an oracle of their own.

    python -m tests.fuzz --calls 20000 --seed 1 --processes 2
    python -m tests.fuzz --calls 3000 --device cuda --backend triton --shapes 60
    python -m tests.fuzz --seed 1 --only 17          # call 17 again, with a traceback

A call is drawn from (seed, number) alone. A legal one must agree with float64 (`oracle`, which shares no code with the
library) within the contract's budgets and write nothing but its outputs; an illegal one must raise the contract's
error and leave every byte of its tensors as it was. Calls run in worker processes, so that a crash is a failure like
any other: `runner` starts the next worker behind it.
"""
