"""What the fork server of `fresh_processes` does once: imports, and the miniature world. One thread, as it forks."""

from __future__ import annotations

import torch

from robustness_tests.meta import fresh_processes
from robustness_tests.meta.mini_world import mini

torch.set_num_threads(1)
WORLD = mini()
assert fresh_processes
