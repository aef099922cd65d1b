"""BERT and RoBERTa in Flax NNX, in transformers' folder format.

One encoder for both: RoBERTa counts its positions from `pad_token_id + 1` and skips
padding, and its classification head has a dense layer of its own where BERT's goes
through the pooler. Names end in their axes: b batch, t and s positions, d model,
n heads, k head width, c classes.

References:
    Devlin et al., BERT, arXiv:1810.04805; Liu et al., RoBERTa, arXiv:1907.11692.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoints import (
    Entry,
    FormatError,
    config_value,
    open_source,
    read_config,
    read_params,
)

Params: TypeAlias = Any  # nested dicts of arrays; layers are numbered from 0

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


class _Class(NamedTuple):
    """What sets one class of transformers apart from the others."""

    model_type: str
    prefix: str
    pooler: bool
    head: bool
    ignored: tuple[str, ...] = ()


# A head of pre-training is passed over, and so is a pooler that the class has not.
CLASSES = {
    "BertModel": _Class("bert", "", True, False),
    "BertForPreTraining": _Class("bert", "bert.", True, False, (r"cls\..*",)),
    "BertForMaskedLM": _Class(
        "bert", "bert.", False, False, (r"cls\..*", r"bert\.pooler\..*")
    ),
    "BertForSequenceClassification": _Class("bert", "bert.", True, True),
    "RobertaModel": _Class("roberta", "", True, False),
    "RobertaForMaskedLM": _Class(
        "roberta", "roberta.", False, False, (r"lm_head\..*", r"roberta\.pooler\..*")
    ),
    "RobertaForSequenceClassification": _Class(
        "roberta", "roberta.", False, True, (r"roberta\.pooler\..*",)
    ),
}
CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What `config.json` tells, under shorter names."""

    architecture: str
    """Class of transformers, of those in `CLASSES`."""
    vocab_size: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_layers: int
    max_positions: int
    """Rows of the position table; RoBERTa leaves `pad_token_id + 1` of them unused."""
    type_vocab_size: int = 2
    """Token types: 2 tells a pair's sentences apart, RoBERTa has 1."""
    pad_token_id: int = 0
    eps: float = 1e-12
    """Epsilon of LayerNorm."""
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    """None: that of the other layers."""
    initializer_range: float = 0.02
    pooler: bool = True
    """Whether the tensors of the pooler are there."""
    labels: tuple[str, ...] = ()
    """Names of the classes; one for regression, none without a head."""
    problem_type: str | None = None
    gamma_and_beta: bool = False
    """The files call LayerNorm's weight and bias so, as BERT's first ones do."""

    @property
    def kind(self) -> _Class:
        return CLASSES[self.architecture]

    @property
    def is_roberta(self) -> bool:
        return self.kind.model_type == "roberta"

    @property
    def longest(self) -> int:
        """Most tokens in a sequence."""
        offset = self.pad_token_id + 1 if self.is_roberta else 0
        return self.max_positions - offset


class Output(NamedTuple):
    """What the encoder gives; under `jit`, what is not used is not computed."""

    hidden_btd: jax.Array
    pooled_bd: jax.Array | None
    logits_bc: jax.Array | None


class Attention(nnx.Module):
    """Every position attends to all that are not padding."""

    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        d = config.d_model
        self.n_heads = config.n_heads
        self.query = _linear(config, d, d, dtype, rngs)
        self.key = _linear(config, d, d, dtype, rngs)
        self.value = _linear(config, d, d, dtype, rngs)
        self.out = _linear(config, d, d, dtype, rngs)
        self.dropout = nnx.Dropout(config.attention_dropout)

    def __call__(
        self, x_btd: jax.Array, mask_bt: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        b, t, d = x_btd.shape
        q, k, v = (
            linear(x_btd).reshape(b, t, self.n_heads, d // self.n_heads)
            for linear in (self.query, self.key, self.value)
        )
        scores_bnts = jnp.einsum("btnk,bsnk->bnts", q, k) * (d // self.n_heads) ** -0.5
        scores_bnts = scores_bnts.astype(jnp.float32)
        lowest = jnp.finfo(jnp.float32).min
        scores_bnts = jnp.where(mask_bt[:, None, None, :], scores_bnts, lowest)
        weights_bnts = jax.nn.softmax(scores_bnts).astype(x_btd.dtype)
        weights_bnts = _drop(self.dropout, weights_bnts, key)
        mixed_btnk = jnp.einsum("bnts,bsnk->btnk", weights_bnts, v)
        return self.out(mixed_btnk.reshape(b, t, d))


class MLP(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = _linear(config, config.d_model, config.d_mlp, dtype, rngs)
        self.down = _linear(config, config.d_mlp, config.d_model, dtype, rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x_btd)))


class Layer(nnx.Module):
    """Attention and MLP, each added to the stream, which is normalised after it."""

    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.attention = Attention(config, dtype, rngs=rngs)
        self.attention_norm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs=rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x_btd: jax.Array, mask_bt: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        branch_btd = self.attention(x_btd, mask_bt, keys[0])
        x_btd = self.attention_norm(x_btd + _drop(self.dropout, branch_btd, keys[1]))
        branch_btd = self.mlp(x_btd)
        return self.mlp_norm(x_btd + _drop(self.dropout, branch_btd, keys[2]))


class Embeddings(nnx.Module):
    """Word, position and token type, summed and normalised."""

    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.config = config
        self.word = _embed(config, config.vocab_size, rngs)
        self.position = _embed(config, config.max_positions, rngs)
        self.token_type = _embed(config, config.type_vocab_size, rngs)
        self.norm = _norm(config, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, tokens_bt: jax.Array, types_bt: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        positions_bt = positions(self.config, tokens_bt)
        x_btd = self.word(tokens_bt) + self.token_type(types_bt)
        x_btd = self.norm(x_btd + self.position(positions_bt))
        return _drop(self.dropout, x_btd, key)


class Pooler(nnx.Module):
    """tanh(W x) of the first position; also RoBERTa's way to its classes."""

    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.dense = _linear(config, config.d_model, config.d_model, dtype, rngs)

    def __call__(self, x_bd: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x_bd))


class Head(nnx.Module):
    """Logits of the classes, or the one number of a regression."""

    def __init__(self, config: EncoderConfig, dtype: Any, *, rngs: nnx.Rngs):
        if config.is_roberta:
            self.dense = Pooler(config, dtype, rngs=rngs)
        n_labels = len(config.labels)
        self.out = _linear(config, config.d_model, n_labels, jnp.float32, rngs)
        rate = config.classifier_dropout
        self.dropout = nnx.Dropout(config.dropout if rate is None else rate)

    def __call__(
        self, first_bd: jax.Array, pooled_bd: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        keys = (None,) * 2 if key is None else jax.random.split(key)
        if hasattr(self, "dense"):
            pooled_bd = self.dense(_drop(self.dropout, first_bd, keys[0]))
        return self.out(_drop(self.dropout, pooled_bd, keys[1]).astype(jnp.float32))


class Encoder(nnx.Module):
    """Tokens to hidden states, the pooled output, and logits where there is a head."""

    def __init__(
        self, config: EncoderConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs
    ):
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        keys = (rngs.fork() for _ in range(config.n_layers))
        self.layers = nnx.List([Layer(config, dtype, rngs=key) for key in keys])
        if config.pooler:
            self.pooler = Pooler(config, dtype, rngs=rngs)
        if config.labels:
            self.head = Head(config, dtype, rngs=rngs)

    def __call__(
        self,
        tokens_bt: jax.Array,
        types_bt: jax.Array,
        mask_bt: jax.Array,
        key: jax.Array | None = None,
    ) -> Output:
        """Run the encoder.

        Args:
          tokens_bt: Token ids, padded.
          types_bt: Token types, of the same shape.
          mask_bt: True where there is a token, False at padding.
          key: Key of the dropout; None: none is dropped.
        """
        n = len(self.layers)
        keys = (None,) * (n + 2) if key is None else jax.random.split(key, n + 2)
        x_btd = self.embeddings(tokens_bt, types_bt, keys[n])
        for i, layer in enumerate(self.layers):
            x_btd = layer(x_btd, mask_bt, keys[i])
        first_bd = x_btd[:, 0]
        pooled_bd = self.pooler(first_bd) if hasattr(self, "pooler") else None
        logits_bc = None
        if hasattr(self, "head"):
            logits_bc = self.head(first_bd, pooled_bd, keys[n + 1])
        return Output(x_btd, pooled_bd, logits_bc)


def positions(config: EncoderConfig, tokens_bt: jax.Array) -> jax.Array:
    """Rows of the position table.

    BERT counts 0, 1, 2, ...; RoBERTa counts the tokens that are not padding from
    `pad_token_id + 1` on, and padding stays at `pad_token_id`.
    """
    if not config.is_roberta:
        return jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    is_token = (tokens_bt != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + config.pad_token_id


def _linear(
    config: EncoderConfig, d_in: int, d_out: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        d_in,
        d_out,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def _embed(config: EncoderConfig, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Embed(rows, config.d_model, embedding_init=init, rngs=rngs)


def _norm(config: EncoderConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.d_model,
        epsilon=config.eps,
        use_fast_variance=False,  # 1e-12 under the root wants the exact variance
        dtype=dtype,
        rngs=rngs,
    )


def _drop(dropout: nnx.Dropout, x: Any, key: jax.Array | None) -> jax.Array:
    return x if key is None else dropout(x, deterministic=False, rngs=key)


def graph(config: EncoderConfig, dtype: Any = jnp.float32) -> nnx.GraphDef[Encoder]:
    """The model without its arrays; `nnx.merge(graph(config), params)` is callable."""
    return nnx.graphdef(
        nnx.eval_shape(lambda: Encoder(config, dtype, rngs=nnx.Rngs(0)))
    )


def init_params(config: EncoderConfig, seed: int | jax.Array) -> Params:
    """Fresh parameters by a seed or a key, to be jitted or `eval_shape`d."""
    model = Encoder(config, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


# What `architectures.Architecture` asks of a module.


def abstract_params(config: EncoderConfig) -> Params:
    return jax.eval_shape(lambda: init_params(config, 0))


def from_json(json: dict[str, Any]) -> EncoderConfig:
    """Read what `config.json` holds.

    Raises:
      FormatError: if a class or an option is not supported, or a size is missing.
    """
    named = json.get("architectures") or []
    name = next((name for name in named if name in CLASSES), None)
    if name is None:
        raise FormatError(
            f"The architecture must be one of {', '.join(sorted(CLASSES))}; "
            f"config.json has architectures={named!r}, "
            f"model_type={json.get('model_type')!r}."
        )
    kind = CLASSES[name]
    _require(json, "model_type", json.get("model_type", kind.model_type), kind[0])
    _require(json, "is_decoder", json.get("is_decoder", False), False)
    absolute = json.get("position_embedding_type") or "absolute"
    _require(json, "position_embedding_type", absolute, "absolute")
    is_roberta = kind.model_type == "roberta"
    pad = json.get("pad_token_id")
    config = EncoderConfig(
        architecture=name,
        vocab_size=config_value(json, "vocab_size"),
        d_model=config_value(json, "hidden_size"),
        d_mlp=config_value(json, "intermediate_size"),
        n_heads=config_value(json, "num_attention_heads"),
        n_layers=config_value(json, "num_hidden_layers"),
        max_positions=config_value(json, "max_position_embeddings"),
        type_vocab_size=config_value(json, "type_vocab_size", 2),
        pad_token_id=int(is_roberta) if pad is None else pad,
        eps=config_value(json, "layer_norm_eps", 1e-12),
        activation=config_value(json, "hidden_act", "gelu"),
        dropout=config_value(json, "hidden_dropout_prob", 0.1),
        attention_dropout=config_value(json, "attention_probs_dropout_prob", 0.1),
        classifier_dropout=config_value(json, "classifier_dropout", None),
        initializer_range=config_value(json, "initializer_range", 0.02),
        pooler=kind.pooler,
        labels=_labels(json) if kind.head else (),
        problem_type=config_value(json, "problem_type", None),
    )
    _require_usable(config)
    return config


def _labels(json: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes by number; transformers leaves two of them out."""
    names = json.get("id2label")
    if names is None:
        return tuple(f"LABEL_{i}" for i in range(json.get("num_labels", 2)))
    try:
        return tuple(str(names[str(i)]) for i in range(len(names)))
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"id2label in config.json must name the classes '0', '1', ..., got {names}."
        ) from error


def _require(json: dict[str, Any], name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise FormatError(
            f"config.json has {name}={value!r}; {json['architectures'][0]} is read "
            f"with {wanted!r} only."
        )


def _require_usable(config: EncoderConfig) -> None:
    sizes = ("vocab_size", "d_model", "d_mlp", "n_heads", "n_layers", "max_positions")
    wrong = {
        name: value
        for name in (*sizes, "type_vocab_size")
        if not isinstance(value := getattr(config, name), int) or value < 1
    }
    if wrong:
        raise FormatError(f"Sizes in config.json must be whole and positive: {wrong}.")
    if config.d_model % config.n_heads:
        raise FormatError(
            f"num_attention_heads must divide hidden_size, config.json has "
            f"{config.n_heads} and {config.d_model}."
        )
    if config.activation not in ACTIVATIONS:
        raise FormatError(
            f"hidden_act must be one of {', '.join(ACTIVATIONS)}; config.json has "
            f"{config.activation!r}."
        )


def to_json(config: EncoderConfig) -> dict[str, Any]:
    json = {
        "architectures": [config.architecture],
        "model_type": config.kind.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "pad_token_id": config.pad_token_id,
        "layer_norm_eps": config.eps,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "initializer_range": config.initializer_range,
        "torch_dtype": "float32",
    }
    if config.labels:
        json["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
        json["label2id"] = {name: i for i, name in enumerate(config.labels)}
        json["problem_type"] = config.problem_type
    return json


def entries(config: EncoderConfig) -> list[Entry]:
    """Which tensor is which parameter."""
    body = config.kind.prefix
    word = f"{body}embeddings."
    table = [
        _table(f"{word}word_embeddings", ("embeddings", "word")),
        _table(f"{word}position_embeddings", ("embeddings", "position")),
        _table(f"{word}token_type_embeddings", ("embeddings", "token_type")),
        *_norm_of(config, f"{word}LayerNorm", ("embeddings", "norm")),
    ]
    for i in range(config.n_layers):
        layer = f"{body}encoder.layer.{i}."
        at = ("layers", i)
        for name in ("query", "key", "value"):
            tensor = f"{layer}attention.self.{name}"
            table += _linear_of(tensor, (*at, "attention", name))
        out = f"{layer}attention.output"
        table += _linear_of(f"{out}.dense", (*at, "attention", "out"))
        table += _norm_of(config, f"{out}.LayerNorm", (*at, "attention_norm"))
        table += _linear_of(f"{layer}intermediate.dense", (*at, "mlp", "up"))
        table += _linear_of(f"{layer}output.dense", (*at, "mlp", "down"))
        table += _norm_of(config, f"{layer}output.LayerNorm", (*at, "mlp_norm"))
    if config.pooler:
        table += _linear_of(f"{body}pooler.dense", ("pooler", "dense"))
    if config.labels and config.is_roberta:
        table += _linear_of("classifier.dense", ("head", "dense", "dense"))
        table += _linear_of("classifier.out_proj", ("head", "out"))
    elif config.labels:
        table += _linear_of("classifier", ("head", "out"))
    return table


def _table(tensor: str, path: tuple[str | int, ...]) -> Entry:
    return Entry(f"{tensor}.weight", (*path, "embedding"))


def _linear_of(tensor: str, path: tuple[str | int, ...]) -> list[Entry]:
    kernel = Entry(f"{tensor}.weight", (*path, "kernel"), transposed=True)
    return [kernel, Entry(f"{tensor}.bias", (*path, "bias"))]


def _norm_of(
    config: EncoderConfig, tensor: str, path: tuple[str | int, ...]
) -> list[Entry]:
    scale, bias = ("gamma", "beta") if config.gamma_and_beta else ("weight", "bias")
    return [
        Entry(f"{tensor}.{scale}", (*path, "scale")),
        Entry(f"{tensor}.{bias}", (*path, "bias")),
    ]


def ignored(config: EncoderConfig) -> list[str]:
    """Heads of pre-training, and the numbers 0, 1, ... that older versions saved."""
    return [*config.kind.ignored, rf"{config.kind.prefix}embeddings\.position_ids"]


def last_output(config: EncoderConfig, params: Params, tokens_t: jax.Array) -> Any:
    """The logits where there is a head, else the pooled output.

    Without a pooler it is the hidden state of the first position.
    """
    tokens_bt = tokens_t[None]
    if len(tokens_t) > config.longest:
        raise FormatError(
            f"At most {config.longest} tokens, as max_position_embeddings has it, "
            f"got {len(tokens_t)}."
        )

    @jax.jit
    def run(params: Params) -> Output:
        model = nnx.merge(graph(config), params)
        mask_bt = jnp.ones(tokens_bt.shape, bool)
        return model(tokens_bt, jnp.zeros_like(tokens_bt), mask_bt)

    with jax.default_matmul_precision("float32"):
        output = run(params)
    if output.logits_bc is not None:
        return output.logits_bc[0]
    return output.hidden_btd[0, 0] if output.pooled_bd is None else output.pooled_bd[0]


def classifier(config: EncoderConfig, labels: tuple[str, ...]) -> EncoderConfig:
    """The same encoder with a head: of one label, a regression."""
    model_type = config.kind.model_type
    return dataclasses.replace(
        config,
        architecture=CLASSIFIERS[model_type],
        pooler=model_type == "bert",
        labels=labels,
        problem_type=(
            "regression" if len(labels) == 1 else "single_label_classification"
        ),
    )


def load_classifier(
    folder: Path, labels: tuple[str, ...], seed: int, *, progress: bool = False
) -> tuple[EncoderConfig, Params]:
    """Read any of the `CLASSES`, and put a fresh head on it.

    BERT's pooler is read where the files hold one, and fresh where they do not.

    Args:
      folder: Folder of the checkpoint.
      labels: Names of the classes; one for a regression.
      seed: Seed of what is fresh.
      progress: Show a progress bar.

    Raises:
      FormatError: if the checkpoint is broken, or of another architecture.
    """
    config = from_json(read_config(folder))
    with open_source(folder) as source:
        names = set(source.shapes)
    old = any(name.endswith("LayerNorm.gamma") for name in names)
    pooler = (
        not config.is_roberta and f"{config.kind.prefix}pooler.dense.weight" in names
    )
    body = dataclasses.replace(config, pooler=pooler, labels=(), gamma_and_beta=old)
    passed_over = [*ignored(config), r"classifier\..*", r".*pooler\..*"]
    params = read_params(
        folder,
        entries(body),
        abstract_params(body),
        ignored=passed_over,
        progress=progress,
    )
    whole = classifier(config, labels)
    fresh = _fresh(whole, tuple(sorted(abstract_params(whole).keys() - params.keys())))
    return whole, params | fresh(jax.random.key(seed))


@functools.lru_cache(maxsize=4)
def _fresh(config: EncoderConfig, names: tuple[str, ...]) -> Callable[..., Params]:
    """Makes some parts of the parameters, of a key; compiled once for all seeds."""

    def make(key: jax.Array) -> Params:
        made = init_params(config, key)
        return {name: made[name] for name in names}

    return jax.jit(make)
