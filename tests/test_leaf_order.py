"""Leaves together or in turn, bases that move at intervals, rounded products, ranks."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance_from_orthonormal, random_like
from test_robustness import GRADIENTS, SHAPE

from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam

# Two ranks, both orientations, a stack.
PARAMS = {
    "stack": jnp.zeros((2, 6, 10)),
    "tall": jnp.zeros((12, 7)),
    "wide": jnp.zeros((6, 10)),
}
NUMBERS = {
    "stack": LDAdamDimensionNumbers(1, 2),
    "tall": LDAdamDimensionNumbers(rank=2),
    "wide": LDAdamDimensionNumbers(),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What makes the code fast is of no use to a few steps of small matrices."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def optimizer(**options):
    return scale_by_ldadam(3, weight_dimension_numbers=NUMBERS, **options)


def lowered(**options):
    tx = optimizer(**options)
    state = jax.eval_shape(tx.init, PARAMS)
    return jax.jit(tx.update).lower(PARAMS, state)


def runs(tx, steps, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(random_like(params, seed=t), state)
        yield updates, state


# Together and in turn


def test_together_gives_what_in_turn_gives(x64):
    params = jax.tree.map(lambda p: p.astype(float), PARAMS)
    both = (
        runs(optimizer(factorizations=order), 3, params)
        for order in ("together", "in_turn")
    )
    for together, in_turn in zip(*both, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(together, in_turn)
        chex.assert_trees_all_close(together, in_turn, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("order", "loops"), [("together", 1), ("in_turn", len(PARAMS))]
)
def test_loops_over_passes(order, loops):
    """One loop for all leaves, or one for each."""
    text = lowered(factorizations=order).as_text()
    assert len(re.findall(r"stablehlo\.while", text)) == loops


def test_one_batch_of_factors_for_each_rank():
    """Three leaves of two ranks r; a factor of the CPU's is of 2 r rows."""

    def batches(order):
        text = lowered(factorizations=order).as_text()
        found = re.findall(r"potrf.*\(tensor<(\S+)xf32>\) ->", text)
        assert all(found.count(batch) == found.count(found[0]) for batch in found)
        return set(found)

    assert batches("together") == {"4x4", "3x6x6"}
    assert batches("in_turn") == {"4x4", "6x6", "2x6x6"}


# A basis that moves every few steps


@functools.cache
def bases(interval):
    return [
        jax.tree.map(np.asarray, (updates, state.projector))
        for updates, state in runs(optimizer(subspace_interval=interval), 5)
    ]


def test_a_basis_moves_every_k_steps_and_leaves_take_turns():
    """All move in the first step; in between a basis stays to the bit."""
    before = jax.tree.map(np.asarray, optimizer().init(PARAMS).projector)
    for t, (_, moved) in enumerate(bases(2)):
        for turn, name in enumerate(PARAMS):
            stays = moved[name].tobytes() == before[name].tobytes()
            assert stays == (t > 0 and t % 2 != turn % 2)
        before = moved


def test_an_interval_of_one_is_every_step():
    """The first step is that of any interval, the ones that follow are not."""
    assert "stablehlo.case" not in lowered(subspace_interval=1).as_text()
    assert "stablehlo.case" in lowered(subspace_interval=2).as_text()
    chex.assert_trees_all_close(bases(2)[0], bases(1)[0], atol=1e-5)
    assert np.abs(bases(2)[3][0]["wide"] - bases(1)[3][0]["wide"]).max() > 1e-3


@pytest.mark.parametrize(("interval", "error"), [(0, ValueError), (2.0, TypeError)])
def test_wrong_interval(interval, error):
    with pytest.raises(error, match=f"subspace_interval={interval}"):
        scale_by_ldadam(3, subspace_interval=interval)


# Products of rounded operands


@functools.cache
def of_precision(precision):
    tx = scale_by_ldadam(4, precision=precision)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("name", GRADIENTS)
def test_rounded_products_keep_the_basis_orthonormal(name):
    tx, update = of_precision("bfloat16")
    state = tx.init(jnp.zeros(SHAPE))
    for t in range(6):
        direction, state = update(jnp.asarray(GRADIENTS[name](t), "float32"), state)
        chex.assert_tree_all_finite((direction, state))
        assert distance_from_orthonormal(state.projector) < 1e-4


def test_rounded_products_change_little():
    """By 2^-8 of each operand, while the singular values are apart."""
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.normal(size=(16, 16)))[0], rng.normal(size=(16, 24))
    values = 2.0 ** -np.arange(16)[:, None]
    grads = [left @ (values * (right + 0.1 * rng.normal(size=(16, 24)))) for _ in "123"]
    (exact, update), (rounded, update_rounded) = map(of_precision, (None, "bfloat16"))
    expected = actual = jnp.zeros(SHAPE)
    state, rounded_state = exact.init(expected), rounded.init(actual)
    for grad in grads:
        expected, state = update(jnp.asarray(grad, "float32"), state)
        actual, rounded_state = update_rounded(jnp.asarray(grad, "float32"), state)
    assert rounded_state.projector.dtype == jnp.float32
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < difference < 0.05


def test_precision_reaches_the_full_size_products():
    shape = jax.ShapeDtypeStruct((16, 24), jnp.float32)
    text = lambda precision: (
        of_precision(precision)[1]
        .lower(shape, jax.eval_shape(of_precision(precision)[0].init, shape))
        .as_text()
    )
    rounded = re.findall(r"dot_general.*bf16.*bf16", text("bfloat16"))
    assert len(rounded) >= 5
    assert "bf16" not in text(None)


# Ranks as a fraction


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((64, 96), 0.25, 16),
        ((96, 64), 0.25, 16),
        ((100, 200), 0.25, 24),
        ((6, 10), 0.5, 3),
        ((6, 10), 0.01, 1),
        ((64, 96), 0.999, 64),
    ],
)
def test_rank_as_a_fraction_of_the_compressed_side(shape, rank, expected):
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    common = scale_by_ldadam(rank)
    own = scale_by_ldadam(3, weight_dimension_numbers=LDAdamDimensionNumbers(rank=rank))
    for tx in (common, own):
        state = jax.eval_shape(tx.init, abstract)
        assert state.projector.shape == (min(shape), expected)


@pytest.mark.parametrize("rank", [0.0, 1.0, 1.5, -0.25])
def test_fraction_out_of_range(rank):
    with pytest.raises((TypeError, ValueError), match=r"rank.*\(0, 1\)"):
        scale_by_ldadam(rank)
