"""Every option of a run: typed, on the command line, saved with the run.

A run is fixed by `optim` and `train`, the model and the data: it resumes only under
the same ones. The section `run` says where and how, and may change in between.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, Self

import tyro

from examples.flax_lm.config import (
    ConfigError,
    Dtype,
    require,
    require_fine_tuning,
)
from examples.flax_lm.files import write_json

MARK = "gsm8k"  # in config.json: what job a folder belongs to


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["ldadamw", "adamw"] = "adamw"
    """Optimizer of the matrices; under ldadamw embedding, head and norms take AdamW."""
    learning_rate: float = 5e-5
    """Peak learning rate; afterwards it falls in a line to zero."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 0.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    b1: float = 0.0
    """Decay rate of the first moment; 0: 0.9 for adamw, 0.908 for ldadamw."""
    b2: float = 0.0
    """Decay rate of the second moment; 0: 0.999 for adamw, 0.99 for ldadamw."""
    eps: float = 1e-8
    """Adam's epsilon."""
    rank: int = 32
    """ldadamw: rank."""
    rho: float = 0.908
    """ldadamw: weight of the momentum in what the subspace follows."""
    residual: Literal["error_feedback", "recovery", "normalized", "none"] = (
        "error_feedback"
    )
    """ldadamw: what becomes of the part of the gradient that the subspace lacks."""
    mu_dtype: Dtype = "float32"
    """ldadamw: storage of the first moment."""
    nu_dtype: Dtype = "float32"
    """ldadamw: storage of the second moment."""
    error_dtype: Literal[Dtype, "int8", "int4"] = "float32"
    """ldadamw: storage of the error buffer."""

    def __post_init__(self) -> None:
        rate = 0 < self.learning_rate < math.inf
        require(self, "learning_rate is positive and finite", rate)
        require(self, "warmup_steps is not negative", self.warmup_steps >= 0)
        require_fine_tuning(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 3
    """Passes over the training problems."""
    steps: int = 0
    """Optimizer steps; 0: as many as the epochs take."""
    batch_size: int = 32
    """Problems in a step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step; LDAdam sums them into its error buffer."""
    length: int = 512
    """Tokens of a problem; longer ones are left out of the training."""
    dtype: Dtype = "bfloat16"
    """Dtype of activations and products."""
    param_dtype: Dtype = "float32"
    """Dtype of the weights."""
    remat: bool = False
    """Gradient checkpointing: recompute each block in the backward pass."""
    seed: int = 0
    """Seed of the order of the problems."""

    def __post_init__(self) -> None:
        require(self, "epochs is at least 1", self.epochs >= 1)
        require(self, "steps is not negative", self.steps >= 0)
        require(self, "length is at least 8", self.length >= 8)
        require(self, "batch_size is at least 1", self.batch_size >= 1)
        require(self, "seed lies in [0, 2^32)", 0 <= self.seed < 2**32)
        require(self, "accumulate is at least 1", self.accumulate >= 1)
        divides = self.batch_size % self.accumulate == 0
        require(self, "accumulate divides batch_size", divides)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: str = ""
    """Folder of the model, as transformers writes it."""
    data: str = ""
    """Folder with train.jsonl and test.jsonl."""
    out: str = "runs/gsm8k"
    """Folder of the run."""
    resume: bool = False
    """Go on from the last checkpoint in the run's folder, under its options."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start again."""
    eval_every: int = 0
    """Steps from one answer loss to the next; 0: at the end only."""
    eval_before: bool = True
    """Measure the answer loss before the first step."""
    eval_problems: int = 0
    """Test problems for the answer loss, the first ones; 0: all."""
    eval_batch_size: int = 16
    """Problems in a batch of the answer loss."""
    generate_problems: int = 0
    """Test problems to solve, the first ones; 0: all, -1: none."""
    generate_before: bool = False
    """Solve them before the training, too."""
    generate_batch_size: int = 64
    """Problems solved side by side."""
    max_new_tokens: int = 256
    """Tokens of a solution at most."""
    log_every: int = 10
    """Steps from one report of the training loss to the next."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; 0: only at the end; -1: none."""
    keep_checkpoints: int = 1
    """Checkpoints that are kept."""
    save_model: bool = True
    """Write the trained model to OUT/model, as transformers reads it."""
    progress: bool = True
    """Show progress bars."""
    mesh: str = "data=1,fsdp=-1,tensor=1"
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
        require(self, "resume and overwrite exclude each other", not both)
        require(self, "log_every is at least 1", self.log_every >= 1)
        sizes = (self.eval_batch_size, self.generate_batch_size, self.max_new_tokens)
        require(self, "batch sizes and max_new_tokens are positive", min(sizes) >= 1)
        every = min(self.eval_every, self.eval_problems)
        require(self, "eval_every and eval_problems are at least 0", every >= 0)
        fewest = min(self.checkpoint_every, self.generate_problems)
        rule = "checkpoint_every and generate_problems are at least -1"
        require(self, rule, fewest >= -1)
        require(self, "keep_checkpoints is at least 1", self.keep_checkpoints >= 1)
        alone = self.num_processes == 1 or self.coordinator
        require(self, "num_processes needs coordinator HOST:PORT", bool(alone))


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["published", "cpu"] = "published"
    """Named settings; the other options change single ones."""
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    @property
    def folder(self) -> Path:
        return Path(self.run.out).absolute()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the config, without what belongs to one start of the run only."""
        names = ("resume", "overwrite", "coordinator", "num_processes", "process_id")
        fresh = {name: getattr(RunConfig, name) for name in names}
        run = dataclasses.replace(self.run, **fresh)
        saved = {"job": MARK, **dataclasses.replace(self, run=run).to_dict()}
        write_json(path, saved)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; a `ConfigError` names what does not fit."""
        try:
            saved = json.loads(path.read_text())
            if saved.pop("job") != MARK:
                raise ValueError("it is another job's")
            return cls(
                preset=saved["preset"],
                optim=OptimConfig(**saved["optim"]),
                train=TrainConfig(**saved["train"]),
                run=RunConfig(**saved["run"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a saved config: {error}.") from error


# Length, epochs, batch, warm-up and rate of the paper's runs are the defaults; `cpu`
# is what a processor does in minutes.
PRESETS = {
    "published": Config(),
    "cpu": Config(
        preset="cpu",
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=20, batch_size=4, length=160, dtype="float32"),
        run=RunConfig(
            eval_problems=64,
            generate_problems=-1,
            eval_batch_size=4,
            generate_batch_size=32,
            max_new_tokens=160,
            log_every=1,
            checkpoint_every=0,
        ),
    ),
}


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line; `--resume` starts from the options of the saved run."""
    config = _parse(argv, Config())
    if config.preset != "published":
        config = _parse(argv, PRESETS[config.preset])
    saved = config.folder / "config.json"
    if config.run.resume and saved.exists():
        config = _parse(argv, Config.load(saved))
    for name in ("model", "data"):
        if not getattr(config.run, name):
            raise ConfigError(f"--{name} must name a folder, got none.")
    return config


def _parse(argv: list[str] | None, default: Config) -> Config:
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(Config, args=argv, default=default, config=omit)
