"""What the benches of a step, of two processes and of sampling compute on.

With --quick it is tiny. A bench's processes must agree on it: the environment tells them all.
"""

from __future__ import annotations

import os

from bench.process import QUICK

BATCH_SIZE, SIDE, WARM_UP = (2, 32, 1) if QUICK in os.environ else (16, 64, 3)
