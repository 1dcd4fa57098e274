"""Measuring an engine once, for the simulator: decode steps, prefill, updates, and what a sample costs besides.

    decode    B samples of known context generate without an end; each poll is a point (B, context, seconds a step)
    prefill   n new samples of known length, one token each; the decode step is taken off
    the loop  synchronous batches of the recipe's own task: what is neither decoding nor prefill, updates of several sizes,
              and changes of weights
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from april.config.load import Layers, parse_override
from april.config.recipe import Recipe
from april.config.resolve import Resolved, resolve_layers
from april.core.clock import WallClock
from april.core.errors import RecipeError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.run.build import Parts, build, build_engine, load_policy, sampling_spec
from april.simulate.calibrate import DecodePoint, Measurements, PrefillPoint, UpdatePoint
