"""What the two questions about an accelerator's program share: options and rows."""

import dataclasses
from typing import Any, Literal

from . import common

Order = Literal["together", "in_turn"]


@dataclasses.dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = (
        "adamw",
        "ldadamw-float32",
        "ldadamw-recovery",
        "ldadamw-none",
        "ldadamw-int8",
        "muon",
        "adafactor",
    )
    """Names of `presets.VARIANTS`; ratios are to the first."""
    rank: int = 256
    """Rank of LDAdam and GaLore."""
    layers: int = 1
    """Layers, or matrices of one shape."""
    stacked: bool = False
    """All layers in one leaf, instead of a leaf for each."""
    dtype: common.Dtype = "float32"
    """Of parameters and gradients."""
    residual: str = ""
    """LDAdam's residual rule; empty, here and below: what the variant has."""
    error_dtype: str = ""
    """Storage of its error buffer."""
    moments_dtype: str = ""
    """Storage of its moments."""
    precision: Literal["", "default", "high", "highest", "bfloat16"] = ""
    """Precision of its full-size products."""
    factorizations: Order = "in_turn"
    """Order of leaves."""
    consume_gradients: bool = False
    """Updates take the gradients' place, as they may in a training step."""
    resume: bool = False
    """Keep the rows of the result file, and add those that are missing."""

    def changes(self, variant: str) -> dict[str, Any]:
        """Options of LDAdam that are not the variant's own."""
        return {name: value for name, value in self._asked(variant).items() if value}

    def case(self, variant: str, **more: Any) -> dict[str, Any]:
        """What names a row: each name, or a case would fit a row that has more."""
        case = {"optimizer": variant, "rank": self.rank, "layers": self.layers}
        case |= {"stacked": self.stacked, "dtype": self.dtype}
        case |= {"consume_gradients": self.consume_gradients}
        return case | self._asked(variant) | more

    def _asked(self, variant: str) -> dict[str, str]:
        asked = {
            "residual": self.residual,
            "error_dtype": self.error_dtype,
            "mu_dtype": self.moments_dtype,
            "nu_dtype": self.moments_dtype,
            "precision": self.precision,
            "factorizations": self.factorizations,
        }
        return asked if variant.startswith("ldadamw") else dict.fromkeys(asked, "")
