"""A Llama-style language model: RMSNorm, rotary positions, SwiGLU, grouped queries.

Names end in their axes: b batch, t position, d model, n query heads, g key and
value heads, k head width, f MLP width, v vocabulary, j rotary frequencies, s places
of a key-value cache, l layers.

References:
    Touvron et al., LLaMA, arXiv:2302.13971; Su et al., RoFormer, arXiv:2104.09864;
    Shazeer, GLU variants, arXiv:2002.05202; Ainslie et al., GQA, arXiv:2305.13245;
    Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783 (rotary scaling).
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from .config import ModelConfig

Params: TypeAlias = Any  # nested dicts of arrays
Segments: TypeAlias = jax.Array | None  # numbers of the documents in a row
BATCH = P(("data", "fsdp"))  # how activations lie on a mesh


class Cache(NamedTuple):
    """Keys and values of the positions so far, (b, s, g, k); of all layers (l, ...)."""

    keys: jax.Array
    values: jax.Array


def rotary(
    x_btnk: jax.Array,
    theta: float,
    positions_bt: jax.Array | None = None,
    config: ModelConfig | None = None,
) -> jax.Array:
    """Turn each pair (i, i + k/2) of a head by position * theta^(-2i/k).

    Positions count from 0 unless they are given; a config adds its scaling.
    """
    _, t, _, k = x_btnk.shape
    freq_j = theta ** (-jnp.arange(0, k, 2, dtype=jnp.float32) / k)
    if config is not None and config.rope_factor != 1.0:
        freq_j = _scaled(freq_j, config)
    if positions_bt is None:
        positions_bt = jnp.arange(t)[None]
    angle_btj = positions_bt.astype(jnp.float32)[:, :, None] * freq_j[None, None]
    cos, sin = (f(angle_btj)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_btnk.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_btnk.dtype)


def _scaled(freq_j: jax.Array, config: ModelConfig) -> jax.Array:
    """Llama 3: divide slow frequencies by a factor, leave fast ones, blend between."""
    turns_j = config.rope_context * freq_j / (2 * math.pi)
    blend_j = (turns_j - config.rope_low) / (config.rope_high - config.rope_low)
    blend_j = jnp.clip(blend_j, 0.0, 1.0)
    return freq_j * (blend_j + (1 - blend_j) / config.rope_factor)


class Attention(nnx.Module):
    """Causal attention in which each key and value head serves several queries."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, k = config.d_model, config.head_dim
        self.query = _linear(config, d, config.n_heads * k, rngs)
        self.key = _linear(config, d, config.n_kv_heads * k, rngs)
        self.value = _linear(config, d, config.n_kv_heads * k, rngs)
        self.out = _linear(config, config.n_heads * k, d, rngs, closes_branch=True)

    def __call__(self, x_btd: jax.Array, segments_bt: Segments = None) -> jax.Array:
        q_btnk, k_btgk, v_btgk = self._project(x_btd)
        mixed_btnk = jax.nn.dot_product_attention(
            q_btnk,
            k_btgk,
            v_btgk,
            mask=_same_segment(segments_bt),
            is_causal=True,
            implementation=self.config.attention,
        )
        return self.out(mixed_btnk.reshape(*x_btd.shape[:2], -1))

    def decode(
        self, x_btd: jax.Array, positions_bt: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Attend to the cache, into which the keys and values go at their positions."""
        q_btnk, k_btgk, v_btgk = self._project(x_btd, positions_bt)
        row_b1 = jnp.arange(len(x_btd))[:, None]
        cache = Cache(
            cache.keys.at[row_b1, positions_bt].set(k_btgk),
            cache.values.at[row_b1, positions_bt].set(v_btgk),
        )
        place_s = jnp.arange(cache.keys.shape[1])
        past_bts = place_s[None, None] <= positions_bt[:, :, None]
        mixed_btnk = jax.nn.dot_product_attention(
            q_btnk, cache.keys, cache.values, mask=past_bts[:, None]
        )
        return self.out(mixed_btnk.reshape(*x_btd.shape[:2], -1)), cache

    def _project(
        self, x_btd: jax.Array, positions_bt: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, turned to their positions, and values."""
        c = self.config
        b, t, _ = x_btd.shape
        q_btnk = self.query(x_btd).reshape(b, t, c.n_heads, c.head_dim)
        k_btgk = self.key(x_btd).reshape(b, t, c.n_kv_heads, c.head_dim)
        v_btgk = self.value(x_btd).reshape(b, t, c.n_kv_heads, c.head_dim)
        turn = lambda x: rotary(x, c.rope_theta, positions_bt, c)
        return turn(q_btnk), turn(k_btgk), v_btgk


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

    def __call__(self, x_btd: jax.Array, segments_bt: Segments = None) -> jax.Array:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), segments_bt)
        return _constrain(x_btd + self.mlp(self.mlp_norm(x_btd)), BATCH)

    def decode(
        self, x_btd: jax.Array, positions_bt: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """The same at given positions, after those that are in the cache."""
        normed_btd = self.attention_norm(x_btd)
        mixed_btd, cache = self.attention.decode(normed_btd, positions_bt, cache)
        x_btd = x_btd + mixed_btd
        return _constrain(x_btd + self.mlp(self.mlp_norm(x_btd)), BATCH), cache


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
        if not config.tied_head:
            self.head = _linear(config, config.d_model, config.vocab_size, rngs)

    def __call__(self, tokens_bt: jax.Array, segments_bt: Segments = None) -> jax.Array:
        """Tokens see those before them; with segments, those of their own alone."""

        def block(layer: Block, x_btd: jax.Array) -> jax.Array:
            return layer(x_btd, segments_bt)

        block = nnx.remat(block) if self.config.remat else block
        x_btd = self._embed(tokens_bt)
        if self.config.scan_layers:
            scan = nnx.scan(block, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            x_btd = scan(self.layers, x_btd)
        else:
            for layer in self.layers:
                x_btd = block(layer, x_btd)
        return self._logits(x_btd)

    def decode(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array,
        cache: Cache,
        read_b: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Go on after the tokens whose keys and values are in the cache.

        Args:
            tokens_bt: Tokens; what stands after a row's end is overwritten later.
            positions_bt: Their positions.
            cache: `empty_cache`, or what an earlier call returned.
            read_b: Which of the t tokens of each row the logits follow.

        Returns:
            Logits (b, v), and the cache with the tokens in it.
        """
        x_btd = self._embed(tokens_bt)
        if self.config.scan_layers:
            scan = nnx.scan(
                lambda x, layer, cache: layer.decode(x, positions_bt, cache),
                in_axes=(nnx.Carry, 0, 0),
                out_axes=(nnx.Carry, 0),
            )
            x_btd, cache = scan(x_btd, self.layers, cache)
        else:
            caches = []
            for i, layer in enumerate(self.layers):
                own = Cache(cache.keys[i], cache.values[i])
                x_btd, own = layer.decode(x_btd, positions_bt, own)
                caches.append(own)
            cache = jax.tree.map(lambda *parts: jnp.stack(parts), *caches)
        x_b1d = jnp.take_along_axis(x_btd, read_b[:, None, None], axis=1)
        return self._logits(x_b1d)[:, 0], cache

    def _embed(self, tokens_bt: jax.Array) -> jax.Array:
        x_btd = self._table()[tokens_bt].astype(jnp.dtype(self.config.dtype))
        return _constrain(x_btd, BATCH)

    def _table(self) -> jax.Array:
        return _constrain(self.embed.embedding[...], P("tensor"))

    def _logits(self, x_btd: jax.Array) -> jax.Array:
        x_btd = self.norm(x_btd)
        if not self.config.tied_head:
            return self.head(x_btd).astype(jnp.float32)
        return (x_btd @ self._table().astype(x_btd.dtype).T).astype(jnp.float32)


def empty_cache(config: ModelConfig, batch: int, places: int) -> Cache:
    """A cache for `places` positions of each row, all layers stacked on axis 0."""
    shape = (config.n_layers, batch, places, config.n_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return Cache(zeros, zeros)


def _same_segment(segments_bt: Segments) -> jax.Array | None:
    """Which tokens (b, 1, t, t) may see which, as far as segments tell.

    Positions go on from one to the next: rotary ones matter by their distance alone.
    """
    if segments_bt is None:
        return None
    return (segments_bt[:, :, None] == segments_bt[:, None, :])[:, None]


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
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


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


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """Fresh parameters as a plain tree of dicts, to be jitted or `eval_shape`d.

    Args:
        config: Of the model.
        seed: A seed, or the key that `jax.random.key` makes of it.
    """
    model = Transformer(config, rngs=nnx.Rngs(seed))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda x: x.astype(config.param_dtype), params)


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
