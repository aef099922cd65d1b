"""A Llama-style language model: RMSNorm, rotary positions, SwiGLU, grouped queries.

Names end in their axes: b batch, t position, d model, n query heads, g key and
value heads, k head width, f MLP width, v vocabulary, j rotary frequencies.

References:
    Touvron et al., LLaMA, arXiv:2302.13971; Su et al., RoFormer, arXiv:2104.09864;
    Shazeer, GLU variants, arXiv:2002.05202; Ainslie et al., GQA, arXiv:2305.13245.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from .config import ModelConfig

Params: TypeAlias = Any  # nested dicts of arrays
BATCH = P(("data", "fsdp"))  # how activations lie on a mesh


def rotary(x_btnk: jax.Array, theta: float) -> jax.Array:
    """Turn each pair (i, i + k/2) of a head by position * theta^(-2i/k)."""
    _, t, _, k = x_btnk.shape
    freq_j = theta ** (-jnp.arange(0, k, 2, dtype=jnp.float32) / k)
    angle_tj = jnp.outer(jnp.arange(t, dtype=jnp.float32), freq_j)
    cos, sin = (f(angle_tj)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_btnk.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_btnk.dtype)


class Attention(nnx.Module):
    """Causal attention in which each key and value head serves several queries."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, k = config.d_model, config.head_dim
        self.query = _linear(config, d, config.n_heads * k, rngs)
        self.key = _linear(config, d, config.n_kv_heads * k, rngs)
        self.value = _linear(config, d, config.n_kv_heads * k, rngs)
        self.out = _linear(config, config.n_heads * k, d, rngs, closes_branch=True)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        c = self.config
        b, t, _ = x_btd.shape
        q_btnk = self.query(x_btd).reshape(b, t, c.n_heads, c.head_dim)
        k_btgk = self.key(x_btd).reshape(b, t, c.n_kv_heads, c.head_dim)
        v_btgk = self.value(x_btd).reshape(b, t, c.n_kv_heads, c.head_dim)
        mixed_btnk = jax.nn.dot_product_attention(
            rotary(q_btnk, c.rope_theta),
            rotary(k_btgk, c.rope_theta),
            v_btgk,
            is_causal=True,
            implementation=c.attention,
        )
        return self.out(mixed_btnk.reshape(b, t, c.n_heads * c.head_dim))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_mlp
        self.gate = _linear(config, d, f, rngs)
        self.up = _linear(config, d, f, rngs)
        self.down = _linear(config, f, d, rngs, closes_branch=True)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        hidden_btf = nnx.silu(self.gate(x_btd)) * self.up(x_btd)
        return self.down(hidden_btf)


class Block(nnx.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd))
        return _constrain(x_btd + self.mlp(self.mlp_norm(x_btd)), BATCH)


class Transformer(nnx.Module):
    """Tokens (b, t) to the logits of the token that follows each, (b, t, v)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = _layers(config, rngs)
        self.norm = _norm(config, rngs)
        self.head = _linear(config, config.d_model, config.vocab_size, rngs)

    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        block = nnx.remat(_apply) if self.config.remat else _apply
        table_vd = _constrain(self.embed.embedding[...], P("tensor"))
        x_btd = table_vd[tokens_bt].astype(jnp.dtype(self.config.dtype))
        x_btd = _constrain(x_btd, BATCH)
        if self.config.scan_layers:
            scan = nnx.scan(block, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            x_btd = scan(self.layers, x_btd)
        else:
            for layer in self.layers:
                x_btd = block(layer, x_btd)
        return self.head(self.norm(x_btd)).astype(jnp.float32)


def _apply(layer: Block, x_btd: jax.Array) -> jax.Array:
    return layer(x_btd)


def _layers(config: ModelConfig, rngs: nnx.Rngs) -> Any:
    """Blocks as a list, or as one block whose weights are stacked on axis 0."""
    if not config.scan_layers:
        keys = (rngs.fork() for _ in range(config.n_layers))
        return nnx.List([Block(config, rngs=key) for key in keys])

    @nnx.split_rngs(splits=config.n_layers)
    @nnx.vmap
    def stacked(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return stacked(rngs)


def _linear(
    config: ModelConfig,
    d_in: int,
    d_out: int,
    rngs: nnx.Rngs,
    *,
    closes_branch: bool = False,
) -> nnx.Linear:
    """Variance 1 / d_in; 1 / (2 layers) of it where a branch joins the stream."""
    variance = 1 / (2 * config.n_layers) if closes_branch else 1.0
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(variance, "fan_in", "normal"),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    """Lay an array out on the mesh, where there is one.

    Activations stay split by batch and the embedding is gathered over fsdp before it
    is read; the compiler finds the rest of the way by itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def graph(config: ModelConfig) -> nnx.GraphDef[Transformer]:
    """The model without its arrays; `nnx.merge(graph(config), params)` is callable."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh parameters as a plain tree of dicts, to be jitted or `eval_shape`d."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def generate(
    config: ModelConfig, params: Params, tokens_t: jax.Array, start: int, key: jax.Array
) -> jax.Array:
    """Fill `tokens_t` from position `start` on, each token drawn given those before.

    The whole sequence is run for each token: short, and enough for a sample.
    """
    model = graph(config)

    def step(t: jax.Array, tokens_t: jax.Array) -> jax.Array:
        logits_v = nnx.merge(model, params)(tokens_t[None])[0, t - 1]
        drawn = jax.random.categorical(jax.random.fold_in(key, t), logits_v)
        return tokens_t.at[t].set(drawn)

    return jax.lax.fori_loop(start, len(tokens_t), step, tokens_t)
