"""Reader of the trajectories in ``golden/``."""

import dataclasses
import functools
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.npz")))
_SIDES = {"std": "short", "reverse_std": "long", "left": "left", "right": "right"}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded run, its options under this library's names."""

    meta: dict
    arrays: dict[str, np.ndarray]

    @property
    def steps(self) -> int:
        return self.meta["steps"]

    @property
    def learning_rate(self) -> float:
        return self.meta.get("lr", 1e-2)

    @property
    def weight_decay(self) -> float:
        return self.meta.get("wd", 0.0)

    @property
    def options(self) -> dict:
        """Options of one matrix; vectors take the first four alone."""
        b1, b2 = self.meta.get("betas", (0.908, 0.99))
        return {
            "b1": b1,
            "b2": b2,
            "eps": self.meta.get("eps", 1e-8),
            "rho": self.meta.get("rho", 0.908),
            "rank": self.meta["rank"],
            "side": _SIDES[self.meta.get("proj_type", "std")],
            "subspace": self.meta.get("proj_method", "power_iteration"),
            "residual": "error_feedback" if self.meta.get("ef", True) else "none",
        }

    def values(self, letter: str, step: int) -> dict[int, np.ndarray]:
        """``letter`` (p, g or e) of each parameter that has it at ``step``."""
        indices = range(len(self.meta["shapes"]))
        found = {i: self.arrays.get(f"{letter}{step}_{i}") for i in indices}
        return {i: value for i, value in found.items() if value is not None}


@functools.cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(json.loads(str(arrays.pop("meta"))), arrays)
