"""The options of a run; their defaults are the published settings.

Batch 16, 128 tokens, 3 epochs, the rate linear to zero, rank 8, betas 0.908 and 0.99,
LDAdam on the kernels of attention and MLP: RoBERTa-base's runs in arXiv:2410.16103.
"""

import dataclasses
import math
from typing import Any, Literal

from examples.flax_lm.config import require, require_fine_tuning

Optimizer = Literal[
    "ldadamw", "ldadamw-int8", "ldadamw-recovery", "adamw", "galore", "adafactor"
]
TaskName = Literal[
    "CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI"
]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: Optimizer = "ldadamw"
    """Optimizer of the kernels of attention and MLP; the rest takes AdamW."""
    rank: int = 8
    """Rank of ldadamw and galore."""
    b1: float = 0.908
    """Decay rate of the first moment."""
    b2: float = 0.99
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    rho: float = 0.908
    """ldadamw: weight of the momentum in what the subspace follows."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 0.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    galore_gap: int = 200
    """galore: steps from one SVD to the next."""
    galore_scale: float = 4.0
    """galore: factor on the update of its matrices, 4 in its own GLUE runs."""

    def __post_init__(self) -> None:
        require_fine_tuning(self)
        require(self, "galore_gap is at least 1", self.galore_gap >= 1)
        scale = 0 < self.galore_scale < math.inf
        require(self, "galore_scale is positive and finite", scale)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    learning_rate: float = 1e-4
    """Peak learning rate; tune it for the model and the optimizer."""
    warmup: float = 0.0
    """Share of the steps over which the rate rises; then it is linear to zero."""
    epochs: float = 3.0
    """Times that the training rows are seen."""
    batch_size: int = 16
    """Rows in a step."""
    max_length: int = 128
    """Tokens of a row; what is longer is cut."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and products; parameters are float32."""
    train_rows: int = 0
    """Training rows to use, spread evenly over the file; 0: all."""
    valid_rows: int = 0
    """Validation rows to use, likewise."""

    def __post_init__(self) -> None:
        rate = 0 < self.learning_rate < math.inf
        require(self, "learning_rate is positive and finite", rate)
        require(self, "warmup lies in [0, 1)", 0 <= self.warmup < 1)
        require(self, "epochs is positive and finite", 0 < self.epochs < math.inf)
        require(self, "batch_size is at least 1", self.batch_size >= 1)
        require(self, "max_length is at least 4", self.max_length >= 4)
        fewest = min(self.train_rows, self.valid_rows)
        require(self, "numbers of rows are not negative", fewest >= 0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: str
    """Folder of a BERT or RoBERTa checkpoint, as transformers writes it."""
    data: str
    """GLUE's folder, one of datasets' save_to_disk, or datasets:NAME of the hub."""
    task: TaskName
    """One of GLUE's tasks."""
    out: str
    """Folder of the results; each seed has its own in it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the head, the dropout and the order of the rows, one run each."""
    resume: bool = False
    """Go on: finished seeds stay, an unfinished one goes on from its checkpoint."""
    overwrite: bool = False
    """Start again in a folder that holds results."""
    save_model: bool = True
    """Write the trained model as transformers reads it."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next; 0: none."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    eval_batch_size: int = 32
    """Rows in a batch of evaluation."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        both = self.resume and self.overwrite
        require(self, "resume and overwrite exclude each other", not both)
        require(self, "log_every is at least 1", self.log_every >= 1)
        require(self, "checkpoint_every is at least 0", self.checkpoint_every >= 0)
        require(self, "eval_batch_size is at least 1", self.eval_batch_size >= 1)
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        require(self, "seeds are distinct, and at least one", distinct)
        in_range = all(0 <= seed < 2**32 for seed in self.seeds)
        require(self, "seeds lie in [0, 2^32)", in_range)


@dataclasses.dataclass(frozen=True)
class Config:
    run: RunConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    def identity(self, seed: int) -> dict[str, Any]:
        """What a run of one seed is fixed by, as JSON."""
        return {
            "task": self.run.task,
            "seed": seed,
            "optim": dataclasses.asdict(self.optim),
            "train": dataclasses.asdict(self.train),
        }
