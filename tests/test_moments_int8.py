"""Moments in int8 on the routes of LDAdam and of AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import random_like
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ldadam_optax import ldadamw

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
