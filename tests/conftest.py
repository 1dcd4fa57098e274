"""One thread for torch, one hypothesis profile; and this folder becomes importable, for `rollout_helpers`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("april", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("april")
