"""The interpreter is repaired before any kernel runs, in its own process and nowhere else."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from support import bfloat16

    bfloat16.repair()
