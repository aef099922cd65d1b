"""The runs of `benchmarks.evidence`: what names one, and which each job plans."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from examples.flax_lm.config import ConfigError
from examples.flax_lm.presets import VARIANTS


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is named by."""

    variant: str
    rate: float
    b2: float = 0.99
    rank: int = 64
    seed: int = 0
    steps: int = 5_000
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"No optimizer {self.variant!r}: one of {list(VARIANTS)}."
            )
        no_buffer = "residual" in VARIANTS[self.variant]
        if not (self.transported or no_buffer):  # s = e + c U mu holds the moment, too
            raise ConfigError(
                f"transport false is for LDAdam without an error buffer, "
                f"not {self.variant!r}."
            )

    @property
    def transported(self) -> bool:
        """Whether the moments are carried from one basis to the next."""
        return self.options.get("transport", True)

    @property
    def name(self) -> str:
        options = "".join(f"-{key}_{value}" for key, value in self.options.items())
        setting = f"lr{self.rate:g}-b2_{self.b2:g}-r{self.rank}{options}"
        return f"{self.variant}-{setting}-seed{self.seed}-{self.steps}"

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Runs of a plan, one JSON object a line; refuse what is not one."""
        runs = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                runs.append(cls(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
        return runs


#: Rank of LDAdam and GaLore, an eighth and a third of the width.
RANKS = {"main": 16, "prose": 64, "prose-large": 64, "60m": 128}
SEEDS = (0, 1, 2)
#: Those that b2 is tuned of; the others run at LDAdam's published one.
B2S = {"adamw": (0.95, 0.99, 0.999), "ldadamw-recovery": (0.95, 0.99)}
#: A setting that tables and figures show beside the plain ones.
EVERY_TENTH = {"subspace_interval": 10}


#: Rates of AdamW, of LDAdam on prose, of Muon, Adafactor and GaLore.
FOUR, THREE = (1e-3, 3e-3, 6e-3, 1e-2), (3e-3, 1e-2, 3e-2)


def tuning(rates: Mapping[str, Sequence[float]], **fixed: Any) -> list[Run]:
    """Each over its rates by one seed, some over b2 too."""
    return [
        run
        for variant, own in rates.items()
        for b2 in B2S.get(variant, (0.99,))
        for run in over(variant, own, b2, SEEDS[:1], **fixed)
    ]


def over(
    variant: str, rates: Sequence[float], b2: float, seeds: Sequence[int], **fixed: Any
) -> list[Run]:
    """Each rate by each seed."""
    pairs = [(rate, seed) for seed in seeds for rate in rates]
    return [Run(variant, rate, b2, seed=seed, **fixed) for rate, seed in pairs]


def main_plan() -> list[Run]:
    """The main job: the best setting of each by three seeds, tuning, ablations."""
    fixed: dict[str, Any] = {"rank": RANKS["main"], "steps": 400}
    low = (3e-3, 1e-2, 2e-2)
    rates: dict[str, Sequence[float]] = {"adamw": FOUR, "muon": THREE}
    rates |= {"adafactor": THREE, "galore": (*THREE, 1e-1)}
    rates |= {"ldadamw-float32": low, "ldadamw-recovery": low}
    runs = [
        *main_seeds(**fixed),
        *tuning(rates, **fixed),
        *over("ldadamw-float32", (1e-2,), 0.95, SEEDS[:1], **fixed),
        Run("ldadamw-float32", 1e-2, rank=64, steps=400),
        *main_longer(),
        *main_ablations(**fixed),
        Run("ldadamw-recovery", 1e-2, **fixed, options={"subspace_interval": 50}),
    ]
    return list({run.name: run for run in runs}.values())


def main_seeds(**fixed: Any) -> list[Run]:
    """Each at its best rate and b2, LDAdam in every storage at one rate."""
    best = {"muon": 1e-2, "adafactor": 3e-3, "galore": 1e-1}
    best |= dict.fromkeys((v for v in VARIANTS if v.startswith("ldadamw-")), 1e-2)
    del best["ldadamw-svd"], best["ldadamw-bfloat16"]
    others = [(variant, rate, 0.99) for variant, rate in best.items()]
    return [
        Run(variant, rate, b2, seed=seed, **fixed)
        for seed in SEEDS
        for variant, rate, b2 in (("adamw", 3e-3, 0.95), *others)
    ]


def main_longer() -> list[Run]:
    """Three times the steps, and the setting that is ahead there."""
    plain = {"rank": RANKS["main"], "steps": 1_200}
    tenth = {"rank": 32, "options": EVERY_TENTH}
    return [
        *over("ldadamw-recovery", (1e-2, 3e-3), 0.99, SEEDS[:1], **plain),
        Run("ldadamw-recovery", 1e-2, **plain, options=EVERY_TENTH),
        *over("adamw", (3e-3,), 0.95, SEEDS, **plain),
        Run("ldadamw-recovery-8bit", 1e-2, **tenth, steps=1_200),
        *(
            Run("ldadamw-recovery-8bit", 1e-2, 0.95, **tenth, seed=seed, steps=steps)
            for seed in SEEDS
            for steps in (400, 1_200)
        ),
    ]


def main_ablations(**fixed: Any) -> list[Run]:
    """Recovery with one thing changed."""
    whole = {"param_dtype": "bfloat16", "stochastic_rounding": True}
    options = [
        *({"subspace_interval": k} for k in (2, 5, 10)),
        {"transport": False},
        whole,
        *({"rho": rho} for rho in (0.0, 0.5, 0.97)),
    ]
    changes: list[dict[str, Any]] = [
        *({"options": changed} for changed in options),
        *({"rank": rank} for rank in (8, 32, 64)),
        *({"b2": b2} for b2 in (0.9, 0.95, 0.999)),
    ]
    return [
        Run("ldadamw-recovery", 1e-2, seed=seed, **fixed | change)
        for seed in SEEDS
        for change in changes
    ]


def rules(seeds: Sequence[int], **fixed: Any) -> list[Run]:
    """The residual rule that is ahead, beside the two that it is measured by."""
    return [
        *over("adamw", FOUR, 0.95, seeds, **fixed),
        *over("ldadamw-recovery", FOUR, 0.95, seeds, **fixed, options=EVERY_TENTH),
        *over("muon", THREE, 0.99, seeds, **fixed),
    ]


def other_b2s(rates: Sequence[float], **fixed: Any) -> list[Run]:
    """AdamW tuned over b2, too, by one seed."""
    return [r for b2 in (0.99, 0.999) for r in over("adamw", rates, b2, (0,), **fixed)]


def prose_short(**fixed: Any) -> list[Run]:
    """Every optimizer and mode, at few rates, after 300 steps or more."""
    short: dict[str, Any] = fixed | {"steps": 300}
    modes = ("float32", "int8", "recovery", "none", "normalized")
    return [
        *(Run(f"ldadamw-{mode}", 1e-2, 0.95, **short) for mode in modes),
        *over("ldadamw-float32", (1e-2,), 0.95, SEEDS[1:], **short),
        Run("ldadamw-float32", 6e-3, 0.95, **short),
        Run("ldadamw-recovery-8bit", 1e-2, 0.95, **short, options=EVERY_TENTH),
        Run("ldadamw-recovery", 6e-3, 0.95, **fixed, steps=1_200),
        *other_b2s((3e-3,), **short),
        *over("adafactor", (3e-3, 1e-2), 0.99, SEEDS[:1], **short),
        *over("galore", (3e-2, 1e-1), 0.99, SEEDS[:1], **short),
    ]


def prose_plan() -> list[Run]:
    """English prose: three rules at three lengths; the others at 5,000 steps."""
    fixed, first = {"rank": RANKS["prose"]}, SEEDS[:1]
    every_tenth = {**fixed, "options": EVERY_TENTH}
    modes = ("float32", "int8", "none", "normalized")
    return [
        *(run for n in (5_000, 1_200, 300) for run in rules(SEEDS, steps=n, **fixed)),
        *prose_short(**fixed),
        *other_b2s(FOUR, **fixed),
        *over("ldadamw-recovery-8bit", FOUR, 0.95, SEEDS, **every_tenth),
        *over("ldadamw-recovery", FOUR, 0.95, first, **fixed),
        *over("ldadamw-recovery", FOUR, 0.99, first, **fixed),
        *(r for m in modes for r in over(f"ldadamw-{m}", FOUR, 0.95, first, **fixed)),
        *over("ldadamw-float32", FOUR, 0.99, first, **fixed),
        *over("adafactor", FOUR, 0.99, SEEDS, **fixed),
        *over("galore", THREE, 0.99, SEEDS, **fixed),
    ]


def prose_large_plan() -> list[Run]:
    """Batches of 8,192 tokens instead of 2,048; at first two runs of 200 steps."""
    fixed: dict[str, Any] = {"rank": RANKS["prose-large"], "steps": 1_200}
    short: dict[str, Any] = {"b2": 0.95, **fixed, "steps": 200}
    return [
        Run("adamw", 3e-3, **short),
        Run("ldadamw-recovery", 1e-2, **short, options=EVERY_TENTH),
        *rules(SEEDS, **fixed),
        *other_b2s(FOUR, **fixed),
    ]


def llama_plan() -> list[Run]:
    """Llama-60M under the published settings, for 200 steps, at three rates."""
    names = ("ldadamw-float32", "ldadamw-recovery", "ldadamw-recovery-8bit", "muon")
    rates: dict[str, Sequence[float]] = dict.fromkeys(
        ("adamw", *names), (1e-3, 3e-3, 1e-2)
    )
    fixed: dict[str, Any] = {"rank": RANKS["60m"], "steps": 200}
    moves = fixed | {"options": EVERY_TENTH}
    every_tenth = over("ldadamw-recovery", rates["adamw"], 0.95, SEEDS[:1], **moves)
    return [*every_tenth, *tuning(rates, **fixed)]


PLANS = {
    "main": main_plan(),
    "prose": prose_plan(),
    "prose-large": prose_large_plan(),
    "60m": llama_plan(),
}
