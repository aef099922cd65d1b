"""Moments in int8 on the routes of LDAdam and of AdamW."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_like
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ldadam_optax import _adam, ldadamw

SHAPES = {"embed": (64, 32), "kernel": (32, 64)}
USED = 24  # rows of the embedding that any token has


def loss_of(params):
    """A quadratic; rows of the embedding that no token has get no gradient."""
    target = {name: random_like(jnp.zeros(s), 7) for name, s in SHAPES.items()}
    used = (jnp.arange(64) < USED)[:, None]
    embed = jnp.mean(used * (params["embed"] - target["embed"]) ** 2)
    return embed + jnp.mean((params["kernel"] - target["kernel"]) ** 2)


def trained(tx, steps=40):
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[0])
    return run((params, tx.init(params)))


def moments(state, group):
    state = state[0].inner_states[group].inner_state
    scales = getattr(state, "mu_scale", None), getattr(state, "nu_scale", None)
    return state, sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu, scales)))


def test_moments_in_int8_on_both_routes():
    exact, exact_state = trained(ldadamw(1e-1, rank=8))
    params, state = trained(ldadamw(1e-1, rank=8, mu_dtype="int8", nu_dtype="int8"))
    start = float(loss_of(jax.tree.map(jnp.zeros_like, params)))
    loss, exact_loss = float(loss_of(params)), float(loss_of(exact))
    assert exact_loss < 0.3 * start
    assert abs(loss - exact_loss) < 0.02 * start
    # Zero moments are kept as zero: rows that no token has stay where they are.
    adam, _ = moments(state, "adamw")
    assert not np.asarray(adam.mu["embed"][USED:]).any()
    assert not np.asarray(params["embed"][USED:]).any()
    assert np.asarray(params["embed"][:USED]).all()
    for group in ("adamw", "ldadam"):  # 1.0625 bytes an element in place of 4
        (_, held), (_, exactly) = moments(state, group), moments(exact_state, group)
        assert held == exactly * 1.0625 / 4


def test_blocks_that_devices_do_not_share():
    """88 columns on eight devices: 11 each, and blocks of 32 that none can split."""
    if jax.device_count() < 8:
        pytest.skip("eight devices are needed")
    mesh = jax.make_mesh((8,), ("model",))
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(4, 88)), jnp.float32)
    params = {"embed": jax.device_put(leaf, NamedSharding(mesh, P(None, "model")))}
    options = {"mu_dtype": "int8", "nu_dtype": "int8"}
    tx = ldadamw(1e-1, weight_dimension_numbers={"embed": None}, **options)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        updates, _ = jax.jit(tx.update)(params, state, params)
    alone = {"embed": leaf}
    expected, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
    assert updates["embed"].sharding.spec == P(None, "model")
    np.testing.assert_array_equal(updates["embed"], expected["embed"])
    adam, _ = moments(state, "adamw")
    assert adam.mu["embed"].shape == (4, 96)


@pytest.fixture
def small_tiles(monkeypatch):
    """32 rows a tile, of leaves of any size on one device."""
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU updates all leaves together, and none in tiles")
    for name, value in {"_LARGE": 1, "_TILE": 32 * 32, "_LANES": 32}.items():
        monkeypatch.setattr(_adam, name, value)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def embedding(dtype="float32", gradients="float32", **options):
    """A step of an embedding of three tiles, as a function of gradient and state."""
    params = {"embed": jnp.ones((96, 32), dtype)}
    options = {"mu_dtype": "int8", "nu_dtype": "int8"} | options
    tx = ldadamw(1e-1, weight_dimension_numbers={"embed": None}, **options)
    grads = [random_like(params, seed) for seed in (0, 1)]
    grads = jax.tree.map(lambda g: g.astype(gradients), grads)
    step = jax.jit(lambda grads, state: tx.update(grads, state, params))
    return step, grads, tx.init(params)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"mu_dtype": "bfloat16"},
        {"dtype": "bfloat16", "gradients": "bfloat16"},
        {"dtype": "bfloat16"},
    ],
    ids=["int8", "one_of_the_moments", "bfloat16", "wide_gradients"],
)
def test_tiles_give_the_bits_of_the_whole_leaf(case, small_tiles):
    """Also where directions are narrower than gradients, and need their own place.

    Two programs round differently, which moves a code in many by one, and with a scale
    the codes of its block. With other random bits half of all would differ.
    """
    results = []
    for order in ("together", "in_turn"):
        step, (first, second), state = embedding(factorizations=order, **case)
        _, state = step(first, state)
        results.append(step(second, state))
    (whole, whole_state), (tiled, tiled_state) = results
    assert tiled["embed"].dtype == whole["embed"].dtype
    np.testing.assert_allclose(
        tiled["embed"].astype(float), whole["embed"].astype(float), rtol=0.1, atol=2e-3
    )
    (adam, _), (other, _) = (moments(s, "adamw") for s in (whole_state, tiled_state))
    chex.assert_trees_all_equal_shapes_and_dtypes(adam, other)
    for codes, others in ((adam.mu, other.mu), (adam.nu, other.nu)):
        if codes["embed"].dtype == jnp.int8:
            moved = np.abs(np.int32(codes["embed"]) - np.int32(others["embed"]))
            assert moved.max() <= 1
            assert moved.mean() < 0.05


def test_tiles_are_updated_in_place(small_tiles):
    step, (grads, _), state = embedding()
    compiled = step.lower(grads, state).compile().as_text()
    program, entry = compiled.split("\nENTRY ")
    assert " while(" in entry
    assert "s8[96,32]" in program  # the loop has the codes of the whole leaf
    assert not re.findall(r"= (?:s8|f32|bf16)\[96,\d+\]\S* copy\(", program)


def test_the_compiler_is_not_left_to_encode_the_first_zeros():
    """XLA's constant folding takes minutes for an embedding."""
    init = jax.jit(ldadamw(1e-3, mu_dtype="int8", nu_dtype="int8").init)
    shapes = {"embed": (96, 32), "kernel": (32, 32)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    lowered = init.lower(params).as_text()
    assert lowered.count("stablehlo.optimization_barrier") == 2  # mu and nu of one leaf


def test_rows_of_a_tile():
    """A multiple of 32 that divides the rows, 2^18 elements at most; 0: not cut."""
    for rows, columns, expected in (
        (32_000, 1024, 256),
        (128_256, 4096, 64),
        (50_257, 768, 0),  # an odd number of rows
        (1024, 50_257, 0),  # columns that fill no vector registers
        (64, 128, 0),  # small
    ):
        leaf = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        assert _adam.rows_of_a_tile(leaf) == expected
