"""The interpreter is repaired before any kernel runs, in its own process and nowhere else."""

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(Path(__file__).parent))  # for `bfloat16` and `launched`, which lie in no package

    import bfloat16

    bfloat16.repair()
