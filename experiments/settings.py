"""How large the experiment is: one value holds every number a run depends on, and its digest names the run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

VERSIONS = ("m1", "m2", "m3", "m4")  # along one run of pre-training, its data changing
FAR = "far"  # m1, continued on other data
UNRELATED = "unrelated"  # m1's data from another initialisation
MODELS = (*VERSIONS, FAR, UNRELATED)
TASKS = ("recall", "repeat", "reverse")
ONWARD = ("m2", "m4", FAR)  # where fine-tuning from the merged start is compared with fine-tuning from the plain base
ALPHA_TARGETS = ("m2", "m4", FAR)
MIX_TARGET = "m2"
# A change to these files makes results of earlier runs void; what only draws and tells them does not.
SOURCES = ("world.py", "tasks.py", "training.py", "settings.py", "jobs.py", "doing.py", "measuring.py")
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of the models."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    feed_forward: int = 256


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Fine-tuning for one task: steps in full and in the short budget of recycling, rate, steps between scores."""

    steps: int
    short_steps: int
    rate: float
    every: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """One configuration of the experiment."""

    seeds: int
    size: Size
    rows: int  # of a batch of text; a batch of questions has twice as many
    words: int  # of a row of text
    first_steps: int
    later_steps: int
    far_steps: int
    first_rate: float  # of learning, at first; it falls to the last rate along half a cosine
    first_last_rate: float
    later_rate: float
    later_last_rate: float
    far_rate: float
    far_last_rate: float
    tuning: dict[str, Tuning]
    questions: int  # of a test, where there are as many as one likes
    held_out_rows: int  # of text, from each mix
    line: tuple[float, ...]  # places along the line between two versions
    alphas: tuple[float, ...]
    mix_alphas: tuple[float, ...]

    def digest(self) -> str:
        """A name for all that results depend on: these numbers, the sources, the versions of what computes."""
        numbers = {**dataclasses.asdict(self), "seeds": None}  # more seeds leave those that are done as they are
        said = [json.dumps(numbers, sort_keys=True), platform.machine()]
        said += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
        said += [Path(__file__).with_name(name).read_text() for name in SOURCES]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()[:12]


FULL = Settings(
    seeds=5,
    size=Size(),
    rows=32,
    words=48,
    first_steps=1000,
    later_steps=250,
    far_steps=350,
    first_rate=2e-3,
    first_last_rate=3e-4,
    later_rate=4e-4,
    later_last_rate=2e-4,
    far_rate=1e-3,
    far_last_rate=3e-4,
    tuning={
        "recall": Tuning(steps=80, short_steps=20, rate=3e-4, every=5),
        "repeat": Tuning(steps=80, short_steps=25, rate=5e-4, every=5),
        "reverse": Tuning(steps=200, short_steps=80, rate=5e-4, every=10),
    },
    questions=200,
    held_out_rows=12,
    line=tuple(x / 8 for x in range(9)),
    alphas=tuple(x / 4 for x in range(9)),
    mix_alphas=(0.25, 0.5, 0.75, 1.0, 1.25),
)

# The same chain, short: one seed, models that learn little. The tests run it.
SHORT = dataclasses.replace(
    FULL,
    seeds=1,
    size=Size(hidden=64, layers=2, heads=4, feed_forward=160),
    rows=16,
    words=32,
    first_steps=200,
    later_steps=20,
    far_steps=20,
    tuning={task: Tuning(steps=30, short_steps=10, rate=1e-3, every=10) for task in TASKS},
    questions=24,
    held_out_rows=3,
    line=(0.0, 0.5, 1.0),
    alphas=(0.0, 1.0, 2.0),
    mix_alphas=(0.5, 1.0),
)
CONFIGURATIONS = {"full": FULL, "short": SHORT}
