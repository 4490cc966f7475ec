"""The scripts of examples/, which the experiments run as they are, and the facts that stand beside numbers."""

import sys
from pathlib import Path


BENCHMARKS = Path(__file__).resolve().parents[1]
EXAMPLES = BENCHMARKS.parent / "examples"
sys.path += [str(EXAMPLES), str(BENCHMARKS)]

import demo  # noqa: E402, F401
import facts  # noqa: E402, F401
import finetune_rotation  # noqa: E402, F401
import train_mpdit  # noqa: E402, F401
