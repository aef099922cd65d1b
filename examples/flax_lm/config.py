"""Every option of a run: typed, on the command line, printed, saved with the run.

    python -m examples.flax_lm.train                      # tiny, bytes, a few minutes
    python -m examples.flax_lm.train --preset 60m --data DIR --rank 64
    python -m examples.flax_lm.train --help

A run is fixed by its sections `model`, `optim` and `train`: a checkpoint goes on
only under the same ones. The section `run` says where and how it runs (folders,
mesh, how often to report) and may change between one start and the next.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Self

import tyro

Dtype = Literal["float32", "bfloat16"]
FIXED_SECTIONS = ("model", "optim", "train")


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot be used."""


def _require(section: Any, rule: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"Rule: {rule}. Given: {section}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 256
    """Number of token ids; bytes need 256."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 2
    """Key and value heads; each serves n_heads / n_kv_heads query heads."""
    d_mlp: int = 352
    """Hidden width of SwiGLU."""
    head_size: int = 0
    """Width of a head; 0: d_model / n_heads."""
    norm_eps: float = 1e-6
    """What RMSNorm adds to the mean square."""
    tied_head: bool = False
    """The embedding is the output head, too."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_factor: float = 1.0
    """Llama 3's scaling: slow frequencies are divided by it; 1: no scaling."""
    rope_low: float = 1.0
    """Frequencies of fewer turns than this in rope_context are slow."""
    rope_high: float = 4.0
    """Frequencies of more turns than this in rope_context stay; between, a blend."""
    rope_context: int = 8192
    """Positions that the model was trained on before the scaling."""
    dtype: Dtype = "float32"
    """Dtype of activations and products; parameters are float32."""
    scan_layers: bool = False
    """One compiled block over stacked weights, or one copy for each layer."""
    remat: bool = False
    """Gradient checkpointing: recompute each block in the backward pass."""
    attention: Literal["xla", "cudnn"] = "xla"
    """What computes attention; cudnn needs a GPU and 16-bit dtype."""

    def __post_init__(self) -> None:
        divides = self.head_size > 0 or self.d_model % self.n_heads == 0
        _require(self, "n_heads divides d_model", divides)
        _require(self, "n_kv_heads divides n_heads", not self.n_heads % self.n_kv_heads)
        _require(self, "the width of a head is even", self.head_dim % 2 == 0)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.n_heads


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["ldadamw", "adamw", "adafactor", "galore", "muon"] = "ldadamw"
    """Optimizer of the matrices; embedding, head and norms take AdamW."""
    learning_rate: float = 1e-2
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    final_learning_rate: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 0.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    b1: float = 0.908
    """Decay rate of the first moment."""
    b2: float = 0.99
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    rank: int = 16
    """Rank of ldadamw and galore."""
    rho: float = 0.908
    """ldadamw: weight of the momentum in what the subspace follows."""
    error_feedback: bool = True
    """ldadamw: carry what the projection lost into the next step."""
    recovery_scaling: bool = False
    """ldadamw, without error feedback: apply what was lost at once, rescaled."""
    side: Literal["short", "long", "left", "right"] = "short"
    """ldadamw: axis that is compressed."""
    subspace: Literal["power_iteration", "svd", "randomized_svd"] = "power_iteration"
    """ldadamw: how the subspace is advanced."""
    subspace_init: Literal["randomized", "svd"] = "randomized"
    """ldadamw: how the subspace is started."""
    mu_dtype: Dtype = "float32"
    """ldadamw: storage of the first moment."""
    nu_dtype: Dtype = "float32"
    """ldadamw: storage of the second moment."""
    error_dtype: Literal[Dtype, "int8", "int4"] = "float32"
    """ldadamw: storage of the error buffer."""
    galore_gap: int = 200
    """galore: steps from one SVD to the next."""
    galore_scale: float = 0.25
    """galore: factor on the update of its matrices."""

    def __post_init__(self) -> None:
        _require(self, "learning_rate is positive", self.learning_rate > 0)
        _require(self, "warmup lies in [0, 1]", 0 <= self.warmup <= 1)
        _require(self, "clip_norm is not negative", self.clip_norm >= 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences in a step, over all devices and micro-batches."""
    context: int = 256
    """Tokens in a sequence."""
    accumulate: int = 1
    """Micro-batches that a step averages over."""
    seed: int = 0
    """Seed of the parameters and of the order of the data."""

    def __post_init__(self) -> None:
        _require(self, "steps is at least 1", self.steps >= 1)
        _require(self, "accumulate is at least 1", self.accumulate >= 1)
        divides = self.batch_size % self.accumulate == 0
        _require(self, "accumulate divides batch_size", divides)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    data: str = ""
    """Folder of text files; empty: the source of Python's standard library."""
    out: str = ""
    """Folder of the run; empty: runs/PRESET-OPTIMIZER."""
    resume: bool = False
    """Go on from the last checkpoint in the run's folder, under its options."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start again."""
    eval_every: int = 100
    """Steps from one validation to the next."""
    eval_batches: int = 8
    """Validation batches, spread evenly over the validation files."""
    log_every: int = 10
    """Steps from one report of the training loss to the next."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    sample_bytes: int = 200
    """Length of the text sampled at the end."""
    progress: bool = True
    """Show the progress bar."""
    mesh: str = "data=-1,fsdp=1,tensor=1"
    """Devices along each axis; -1: those that are left."""
    coordinator: str = ""
    """HOST:PORT of process 0, where several processes train together."""
    num_processes: int = 1
    """Number of processes that train together."""
    process_id: int = 0
    """Number of this process, from 0."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost and the others end."""

    def __post_init__(self) -> None:
        both = self.resume and self.overwrite
        _require(self, "resume and overwrite exclude each other", not both)
        _require(self, "log_every is at least 1", self.log_every >= 1)
        _require(self, "eval_every is at least 1", self.eval_every >= 1)
        _require(self, "heartbeat_timeout is at least 1", self.heartbeat_timeout >= 1)


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["tiny", "60m", "130m", "350m", "1b"] = "tiny"
    """Named sizes and settings; the other options change single ones."""
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        holds_bytes = self.model.vocab_size >= 256
        _require(self.model, "vocab_size is at least 256", holds_bytes)

    @property
    def folder(self) -> Path:
        named = self.run.out or f"runs/{self.preset}-{self.optim.optimizer}"
        return Path(named).absolute()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the config, without what belongs to one start of the run only."""
        names = (
            "resume",
            "overwrite",
            "coordinator",
            "num_processes",
            "process_id",
        )
        fresh = {name: getattr(RunConfig, name) for name in names}
        run = dataclasses.replace(self.run, **fresh)
        saved = dataclasses.replace(self, run=run).to_dict()
        path.write_text(json.dumps(saved, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; a `ConfigError` names what does not fit."""
        sections = {name: type(section) for name, section in vars(cls()).items()}
        try:
            saved = json.loads(path.read_text())
            made = {k: sections[k](**v) for k, v in saved.items() if k != "preset"}
            return cls(preset=saved["preset"], **made)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a saved config: {error}.") from error


def _llama(
    d_model: int, d_mlp: int, heads: int, layers: int, rank: int, steps: int
) -> tuple[ModelConfig, OptimConfig, TrainConfig]:
    """Llama sizes and settings of the papers' C4 runs (GaLore, LDAdam)."""
    model = ModelConfig(
        vocab_size=32_000,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=heads,
        n_kv_heads=heads,
        n_layers=layers,
        dtype="bfloat16",
        scan_layers=True,
    )
    optim = OptimConfig(learning_rate=1e-3, rank=rank)
    return model, optim, TrainConfig(steps=steps, batch_size=512)


PRESETS = {
    "tiny": (ModelConfig(), OptimConfig(), TrainConfig()),
    "60m": _llama(512, 1376, 8, 8, rank=128, steps=10_000),
    "130m": _llama(768, 2048, 12, 12, rank=256, steps=20_000),
    "350m": _llama(1024, 2736, 16, 24, rank=256, steps=60_000),
    "1b": _llama(2048, 5461, 32, 24, rank=512, steps=100_000),
}


def preset(name: str) -> Config:
    """The config of a preset, to be changed with `dataclasses.replace`."""
    model, optim, train = PRESETS[name]
    return Config(preset=name, model=model, optim=optim, train=train)  # pyright: ignore[reportArgumentType]


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line; `--resume` starts from the options of the saved run."""
    config = _parse(argv, Config())
    if config.preset != "tiny":
        config = _parse(argv, preset(config.preset))
    saved = config.folder / "config.json"
    if config.run.resume and saved.exists():
        config = _parse(argv, Config.load(saved))
    return config


def _parse(argv: list[str] | None, default: Config) -> Config:
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(Config, args=argv, default=default, config=omit)
