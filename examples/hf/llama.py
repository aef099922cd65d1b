"""Llama as transformers saves it, read into the main job's model.

Heads may be grouped, tied or of their own width; positions may be scaled as Llama 3
does. Weights with biases and other scalings are refused.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.flax_lm.config import ConfigError, ModelConfig
from examples.flax_lm.model import Params, graph, init_params

from .checkpoints import Entry, FormatError, config_value

# Our name of a layer's weight -> the tensor's.
MATRICES = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "out"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads",)
NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def from_json(json: dict[str, Any]) -> ModelConfig:
    """The model's config.

    Raises:
      FormatError: if an entry is missing, or asks for what the model does not have.
    """
    _require_known(json)
    _require_sizes(json)
    d_model = config_value(json, "hidden_size")
    heads = config_value(json, "num_attention_heads")
    rope = _rope(json)
    scaled = rope.get("rope_type", rope.get("type", "default")) == "llama3"
    try:
        return ModelConfig(
            vocab_size=config_value(json, "vocab_size"),
            d_model=d_model,
            n_layers=config_value(json, "num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=config_value(json, "num_key_value_heads", None) or heads,
            d_mlp=config_value(json, "intermediate_size"),
            head_size=_head_size(json, d_model, heads),
            norm_eps=config_value(json, "rms_norm_eps", 1e-6),
            tied_head=config_value(json, "tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            scan_layers=True,
            **(_scaling(rope, json) if scaled else {}),
        )
    except (ConfigError, TypeError) as error:
        raise FormatError(f"config.json does not fit: {error}") from error


def _require_known(json: dict[str, Any]) -> None:
    kind = _rope(json).get("rope_type", _rope(json).get("type", "default"))
    asked = {
        "hidden_act": (json.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (json.get("attention_bias", False), (False,)),
        "mlp_bias": (json.get("mlp_bias", False), (False,)),
        "rope_type": (kind, ("default", "llama3")),
    }
    for name, (value, known) in asked.items():
        if value not in known:
            raise FormatError(
                f"{name} must be {' or '.join(map(repr, known))} for Llama, got "
                f"{value!r} in config.json."
            )


def _require_sizes(json: dict[str, Any]) -> None:
    sizes = {name: config_value(json, name) for name in SIZES}
    wrong = {k: v for k, v in sizes.items() if not isinstance(v, int) or v < 1}
    if wrong:
        raise FormatError(f"Sizes in config.json must be whole and positive: {wrong}.")


def _rope(json: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 has all in rope_parameters; before, rope_theta stood beside."""
    scaling = json.get("rope_scaling") or {}
    base = {"rope_theta": json["rope_theta"]} if "rope_theta" in json else {}
    return base | scaling | (json.get("rope_parameters") or {})


def _scaling(rope: dict[str, Any], json: dict[str, Any]) -> dict[str, Any]:
    fallback = json.get("max_position_embeddings", 8192)
    return {
        "rope_factor": float(config_value(rope, "factor")),
        "rope_low": float(config_value(rope, "low_freq_factor")),
        "rope_high": float(config_value(rope, "high_freq_factor")),
        "rope_context": rope.get("original_max_position_embeddings", fallback),
    }


def _head_size(json: dict[str, Any], d_model: int, heads: int) -> int:
    """0 where it is the width over the heads, as the main job has it."""
    size = json.get("head_dim") or 0
    return 0 if size * heads == d_model else size


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json`, as transformers 4 and 5 read them."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_context,
        }
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_factor != 1.0 else None,
        "rope_parameters": rope,
    }


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda: init_params(config, 0))


def entries(config: ModelConfig) -> Sequence[Entry]:
    """Which tensor is which parameter; layers are stacked or apart."""
    found = [
        Entry("model.embed_tokens.weight", ("embed", "embedding")),
        Entry("model.norm.weight", ("norm", "scale")),
    ]
    if not config.tied_head:
        found.append(Entry("lm_head.weight", ("head", "kernel"), transposed=True))
    for i in range(config.n_layers):
        at: tuple[str | int, ...] = ("layers",) if config.scan_layers else ("layers", i)
        layer = i if config.scan_layers else None
        for path, name in MATRICES.items():
            tensor = f"model.layers.{i}.{name}.weight"
            found.append(Entry(tensor, (*at, *path, "kernel"), True, layer))
        for own, name in NORMS.items():
            tensor = f"model.layers.{i}.{name}.weight"
            found.append(Entry(tensor, (*at, own, "scale"), False, layer))
    return found


def ignored(config: ModelConfig) -> Sequence[str]:
    """Tensors that older versions saved, and the head where it is the embedding."""
    buffers = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return (buffers, r"lm_head\.weight") if config.tied_head else (buffers,)


def last_output(config: ModelConfig, params: Params, tokens_t: jax.Array) -> jax.Array:
    """Logits of the token that follows."""
    return logits(config, params, tokens_t[None])[0, -1]


def logits(config: ModelConfig, params: Params, tokens_bt: jax.Array) -> jax.Array:
    """Logits of all positions."""
    return _logits(config, params, jnp.asarray(tokens_bt))


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens_bt: jax.Array) -> jax.Array:
    return nnx.merge(graph(config), params)(tokens_bt)
