"""Every option of a run: typed, on the command line, printed, saved with the run.

    python -m examples.flax_lm.train                      # tiny, bytes, a few minutes
    python -m examples.flax_lm.train --preset llama-60m --data DIR --rank 64
    python -m examples.flax_lm.train --help

A run is fixed by its sections `model`, `optim`, `train` and `data`: a checkpoint goes
on only under the same ones (a run may be given more steps). The other sections say
where and how it runs and may change between one start and the next. Names of options
are unique over all sections, so that `Config.replace` needs no section.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, Self

from .files import write_json

Dtype = Literal["float32", "bfloat16"]
Preset = Literal["tiny", "llama-60m", "llama-130m", "llama-350m", "llama-1b"]
FIXED_SECTIONS = ("model", "optim", "train", "data")


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot be used."""


def require(section: Any, rule: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"Rule: {rule}. Given: {section}.")


def require_fine_tuning(section: Any) -> None:
    """The rules of LDAdam's and Adam's options that the fine-tuning jobs share."""
    b1, b2 = section.b1, section.b2
    decay, clip = section.weight_decay, section.clip_norm
    require(section, "rank is at least 1", section.rank >= 1)
    require(section, "b1 and b2 lie in [0, 1)", 0 <= b1 < 1 and 0 <= b2 < 1)
    require(section, "eps is positive and finite", 0 < section.eps < math.inf)
    require(section, "rho lies in [0, 1]", 0 <= section.rho <= 1)
    require(section, "weight_decay is finite, at least 0", 0 <= decay < math.inf)
    require(section, "clip_norm is finite, at least 0", 0 <= clip < math.inf)


def _require_at_least(section: Any, least: float, *names: str) -> None:
    for name in names:
        holds = getattr(section, name) >= least
        require(section, f"{name} is at least {least}", holds)


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
    """Dtype of activations and products."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters, which are drawn in float32."""
    scan_layers: bool = False
    """One compiled block over stacked weights, or one copy for each layer."""
    remat: bool = False
    """Gradient checkpointing: recompute each block in the backward pass."""
    attention: Literal["xla", "cudnn"] = "xla"
    """What computes attention; cudnn needs a GPU and 16-bit dtype."""

    def __post_init__(self) -> None:
        sizes = ("d_model", "d_mlp", "n_layers", "n_heads", "n_kv_heads")
        _require_at_least(self, 1, *sizes)
        divides = self.head_size > 0 or self.d_model % self.n_heads == 0
        require(self, "n_heads divides d_model", divides)
        require(self, "n_kv_heads divides n_heads", not self.n_heads % self.n_kv_heads)
        require(self, "the width of a head is even", self.head_dim % 2 == 0)

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
    """Share of the schedule over which the learning rate rises."""
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
    rank_gradients: int = 0
    """ldadamw: number of gradients, at the start, whose spectra share out the bytes of
    that rank among the leaves, as ranks; 0: one rank for all."""
    rank_run: str = ""
    """Folder of a run at whose last parameters those gradients are taken; empty: at the
    first parameters."""
    ranks: str = ""
    """ldadamw: ranks of single leaves, PATH=RANK,PATH=RANK; the others have rank."""
    rho: float = 0.908
    """ldadamw: weight of the momentum in what the subspace follows."""
    residual: Literal["error_feedback", "recovery", "normalized", "none"] = (
        "error_feedback"
    )
    """ldadamw: what projection lost: kept for later, applied at once, or dropped."""
    error_dtype: Literal[Dtype, "int8", "int4"] = "float32"
    """ldadamw: storage of the error buffer of error_feedback."""
    side: Literal["short", "long", "left", "right"] = "short"
    """ldadamw: axis that is compressed."""
    subspace: Literal["power_iteration", "svd", "randomized_svd"] = "power_iteration"
    """ldadamw: how the subspace is advanced."""
    subspace_init: Literal["randomized", "svd"] = "randomized"
    """ldadamw: how the subspace is started."""
    subspace_interval: int = 1
    """ldadamw: steps from one move of the subspace to the next."""
    precision: Literal["default", "high", "highest", "bfloat16"] | None = None
    """ldadamw: precision of products of full size; None: the backend's own."""
    factorizations: Literal["together", "in_turn"] | None = None
    """ldadamw: all leaves together, or one after another; None: by backend."""
    mu_dtype: Literal[Dtype, "int8"] = "float32"
    """ldadamw: storage of the first moment."""
    nu_dtype: Literal[Dtype, "int8"] = "float32"
    """ldadamw: storage of the second moment."""
    projector_dtype: Dtype = "float32"
    """ldadamw: storage of the basis."""
    stochastic_rounding: bool = False
    """ldadamw: round bfloat16 weights stochastically."""
    galore_gap: int = 200
    """galore: steps from one SVD to the next."""
    galore_scale: float = 0.25
    """galore: factor on the update of its matrices."""

    def __post_init__(self) -> None:
        require(self, "learning_rate is positive", 0 < self.learning_rate < math.inf)
        require(self, "warmup lies in [0, 1]", 0 <= self.warmup <= 1)
        for name in ("b1", "b2", "rho"):
            require(self, f"{name} lies in [0, 1)", 0 <= getattr(self, name) < 1)
        require(self, "eps is positive", self.eps > 0)
        at_least_0 = ("clip_norm", "weight_decay", "final_learning_rate")
        _require_at_least(self, 0, *at_least_0)
        _require_at_least(self, 1, "rank", "galore_gap", "subspace_interval")
        kept = self.residual == "error_feedback" or self.error_dtype == "float32"
        require(self, "error_dtype is for residual error_feedback only", kept)
        _require_at_least(self, 0, "rank_gradients")
        used = self.rank_gradients > 0 or not self.rank_run
        require(self, "rank_run is for rank_gradients", used)
        try:
            holds = all(rank > 0 for rank in self.rank_of_leaf.values())
        except ValueError:
            holds = False
        require(self, "ranks are PATH=RANK,PATH=RANK, each at least 1", holds)

    @property
    def rank_of_leaf(self) -> dict[str, int]:
        """The ranks of single leaves, by their path."""
        pairs = (one.rsplit("=", 1) for one in self.ranks.split(",") if one)
        return {path: int(rank) for path, rank in pairs}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 400
    """Optimizer steps; a run that is done goes on with more by --resume."""
    decay_steps: int = 0
    """Steps of the learning rate's schedule, then it stays; 0: as many as steps."""
    batch_size: int = 16
    """Sequences in a step, over all devices and micro-batches."""
    context: int = 256
    """Tokens in a sequence."""
    accumulate: int = 1
    """Micro-batches that a step averages over."""
    seed: int = 0
    """Seed of the parameters and of the order of the data."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "context", "accumulate")
        _require_at_least(self, 1, *counts)
        _require_at_least(self, 0, "decay_steps", "seed")
        divides = self.batch_size % self.accumulate == 0
        require(self, "accumulate divides batch_size", divides)

    @property
    def schedule(self) -> int:
        """Steps of the learning rate's schedule."""
        return self.decay_steps or self.steps

    @property
    def tokens(self) -> int:
        """Tokens that a step predicts."""
        return self.batch_size * self.context


@dataclasses.dataclass(frozen=True)
class DataConfig:
    data: str = ""
    """Folder of text files, or of .json.gz shards (`text`, one document a line), or
    hub:NAME; empty: the source of Python's standard library."""
    subset: str = ""
    """hub: the data set's configuration, such as en."""
    tokenizer: str = ""
    """shards: tokenizer.json or a sentencepiece model; empty: one trained on them."""
    eos: str = ""
    """shards: the token that ends a document; empty: the tokenizer's own."""
    mask_documents: bool = False
    """shards: tokens see nothing of the documents packed before their own."""
    shuffle_window: int = 10_000
    """shards: documents that are shuffled at a time, beside the shards themselves."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "shuffle_window")
        hub = self.data.startswith("hub:")
        require(self, "subset is for hub:NAME", hub or not self.subset)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    out: str = ""
    """Folder of the run; empty: runs/PRESET-OPTIMIZER."""
    resume: bool = False
    """Go on from the last checkpoint in the run's folder, under its options."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start again."""
    stop_after: float = 0.0
    """Hours after which the run saves and stops, to go on another time; 0: never."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    keep_freed_memory: bool = True
    """On the CPU under glibc, keep freed pages for the next step: faster."""

    def __post_init__(self) -> None:
        both = self.resume and self.overwrite
        require(self, "resume and overwrite exclude each other", not both)
        _require_at_least(self, 0, "checkpoint_every", "stop_after")
        _require_at_least(self, 1, "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    log_every: int = 10
    """Steps from one report of the training loss to the next."""
    eval_every: int = 100
    """Steps from one validation to the next; 0: only at the end."""
    eval_tokens: int = 32_768
    """Held-out tokens of a validation, in whole batches."""
    diagnostics_every: int = 50
    """ldadamw: steps from one look at the subspaces to the next, which takes about as
    long as a step and is compiled by itself; 0: never."""
    sample_tokens: int = 200
    """Length of the text sampled at the end."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "log_every", "eval_tokens")
        _require_at_least(self, 0, "eval_every", "diagnostics_every", "sample_tokens")


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
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
        _require_at_least(self, 1, "heartbeat_timeout", "num_processes")
        known = 0 <= self.process_id < self.num_processes
        require(self, "process_id lies in [0, num_processes)", known)
        alone = self.num_processes == 1 or self.coordinator
        require(self, "num_processes needs coordinator HOST:PORT", bool(alone))


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Preset = "tiny"
    """Named sizes and settings; the other options change single ones."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    report: ReportConfig = ReportConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    model: ModelConfig = ModelConfig()
    devices: DevicesConfig = DevicesConfig()

    def __post_init__(self) -> None:
        holds_bytes = self.model.vocab_size >= 256
        require(self.model, "vocab_size is at least 256", holds_bytes)
        rounded = self.model.param_dtype == "bfloat16"
        holds = rounded or not self.optim.stochastic_rounding
        require(self.optim, "stochastic_rounding is for param_dtype bfloat16", holds)
        alone = self.devices.num_processes == 1 or not self.optim.rank_gradients
        require(self.optim, "rank_gradients is for one process", alone)

    @property
    def folder(self) -> Path:
        named = self.run.out or f"runs/{self.preset}-{self.optim.optimizer}"
        return Path(named).absolute()

    @property
    def diagnostics_every(self) -> int:
        """0 where there is no subspace to look at."""
        of_ldadam = self.optim.optimizer == "ldadamw"
        return self.report.diagnostics_every if of_ldadam else 0

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The class of each section, by its name."""
        default = cls()
        return {k: type(v) for k, v in vars(default).items() if k != "preset"}

    def replace(self, **options: Any) -> Self:
        """Change single options, each by its own name, whatever its section.

        Raises:
            ConfigError: If no section has such an option, or its rules are broken.
        """
        changed: dict[str, Any] = {}
        for section, made in self.sections().items():
            names = {field.name for field in dataclasses.fields(made)}
            own = {name: options.pop(name) for name in names & options.keys()}
            changed[section] = dataclasses.replace(getattr(self, section), **own)
        if options:
            raise ConfigError(f"There is no option {', '.join(options)}.")
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the config, without what belongs to one start of the run only."""
        once = {"resume": False, "overwrite": False, "coordinator": ""}
        saved = self.replace(**once, num_processes=1, process_id=0).to_dict()
        write_json(path, saved)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; a `ConfigError` names what does not fit."""
        try:
            saved = json.loads(path.read_text())
            made = {name: made(**saved[name]) for name, made in cls.sections().items()}
            return cls(preset=saved["preset"], **made)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a saved config: {error}.") from error
