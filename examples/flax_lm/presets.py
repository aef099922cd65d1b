"""One table of model sizes, one list of optimizers, and the settings of published runs.

The benchmarks and the documentation use the same names.
"""

from typing import Any, NamedTuple

from .config import Config, Preset


class Size(NamedTuple):
    """Sizes of a Llama-style model."""

    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_layers: int


# 60m to 1b are those of the papers' C4 runs (GaLore, LDAdam), 7b to 70b Llama's.
SIZES: dict[str, Size] = {
    "tiny": Size(128, 352, 4, 2, 4),
    "60m": Size(512, 1376, 8, 8, 8),
    "130m": Size(768, 2048, 12, 12, 12),
    "350m": Size(1024, 2736, 16, 16, 24),
    "1b": Size(2048, 5461, 32, 32, 24),
    "7b": Size(4096, 11008, 32, 32, 32),
    "13b": Size(5120, 13824, 40, 40, 40),
    "70b": Size(8192, 28672, 64, 8, 80),
}

# Moments in 8 bits, the basis in 16.
_EIGHT_BITS = {"mu_dtype": "int8", "nu_dtype": "int8", "projector_dtype": "bfloat16"}

# Optimizers by name, as options of the main job.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "ldadamw-float32": {},
    "ldadamw-bfloat16": {"error_dtype": "bfloat16"},
    "ldadamw-int8": {"error_dtype": "int8"},
    "ldadamw-int4": {"error_dtype": "int4"},
    "ldadamw-recovery": {"residual": "recovery"},
    "ldadamw-normalized": {"residual": "normalized"},
    "ldadamw-none": {"residual": "none"},
    "ldadamw-int8-8bit": {"error_dtype": "int8", **_EIGHT_BITS},
    "ldadamw-int4-8bit": {"error_dtype": "int4", **_EIGHT_BITS},
    "ldadamw-recovery-8bit": {"residual": "recovery", **_EIGHT_BITS},
    "ldadamw-normalized-8bit": {"residual": "normalized", **_EIGHT_BITS},
    "ldadamw-rounded": {"precision": "bfloat16"},
    "ldadamw-svd": {"subspace": "svd"},
    "galore": {"optimizer": "galore"},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor"},
}

# Rank and steps of the papers' C4 runs; all else is the same for every size: bfloat16,
# 512 sequences of 256 tokens, rate 1e-3, a tenth of the steps warm-up, then a cosine to
# a tenth of the rate, betas 0.908 and 0.99, no weight decay, no clipping.
_PUBLISHED = {
    "60m": {"rank": 128, "steps": 10_000},
    "130m": {"rank": 256, "steps": 20_000},
    "350m": {"rank": 256, "steps": 60_000},
    "1b": {"rank": 512, "steps": 100_000},
}


def sized(config: Config, size: str) -> Config:
    """The config with the model of this size."""
    return config.replace(**SIZES[size]._asdict())


def with_variant(config: Config, variant: str) -> Config:
    """The config with one of `VARIANTS` in place of its optimizer."""
    plain = {"optimizer": "ldadamw", "residual": "error_feedback"}
    plain |= {"error_dtype": "float32", "subspace": "power_iteration"}
    plain |= {"precision": None, **dict.fromkeys(_EIGHT_BITS, "float32")}
    return config.replace(**plain | VARIANTS[variant])


def preset(name: Preset) -> Config:
    """The config of a preset; the main job is `tiny`."""
    config = Config(preset=name)
    if name == "tiny":
        return config
    size = name.removeprefix("llama-")
    return sized(config, size).replace(
        vocab_size=32_000,
        dtype="bfloat16",
        scan_layers=True,
        learning_rate=1e-3,
        batch_size=512,
        eval_tokens=10_000_000,
        diagnostics_every=0,  # a second program, for which there may be no memory
        **_PUBLISHED[size],
    )
