"""Leaves together or in turn, bases that move at intervals, rounded products, ranks."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance_from_orthonormal, random_like, with_spectrum
from test_robustness import GRADIENTS, SHAPE

from ldadam_optax import LDAdamDimensionNumbers, _schedule, scale_by_ldadam

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


def test_leaves_alike_are_traced_once(monkeypatch):
    """And leaves that are not, each for itself; salts and places in the tree differ."""
    traced, step = [], _schedule.ldadam_step
    monkeypatch.setattr(
        _schedule, "ldadam_step", lambda *args: traced.append(1) or step(*args)
    )
    params = {name: jnp.zeros((6, 11)) for name in "abcd"} | {"e": jnp.zeros((11, 6))}
    tx = scale_by_ldadam(2, factorizations="in_turn")
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state)
    assert len(traced) == 2


def test_one_batch_of_factors_for_each_rank():
    """Three leaves of two ranks r; a factor of the CPU's is of 2 r rows."""

    def batches(order):
        text = lowered(factorizations=order).as_text()
        found = re.findall(r"potrf.*\(tensor<(\S+)xf32>\) ->", text)
        assert all(found.count(batch) == found.count(found[0]) for batch in found)
        return set(found)

    assert batches("together") == {"4x4", "3x6x6"}
    assert batches("in_turn") == {"4x4", "6x6", "2x6x6"}


@pytest.fixture
def one_device(monkeypatch):
    """With several, nobody knows inside jit how a leaf is split."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_panels_of_leaves_alike_are_stacked(one_device):
    """A further leaf of one shape brings ten products of its own, of some sixteen.

    Five where its basis moves (coordinates, their Gram matrix, one with the gradient,
    two beside it), and five after that.
    """

    def products(leaves):
        params = [jnp.zeros((6, 10))] * leaves
        tx = scale_by_ldadam(3, factorizations="together")
        text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params))
        return text.as_text().count("stablehlo.dot_general")

    assert products(4) - products(3) == products(3) - products(2) == 10


def test_leaves_in_a_stack_keep_to_themselves(x64, one_device):
    """Each of four leaves of one shape moves as it does alone; one has no gradient."""
    params = {name: jnp.zeros((6, 10)) for name in "abcd"}
    tx = scale_by_ldadam(3, factorizations="together")
    state, update = tx.init(params), jax.jit(tx.update)
    alone = {name: (tx.init({name: p}), p) for name, p in params.items()}
    for t in range(3):
        grads = random_like(params, seed=t) | {"c": jnp.zeros((6, 10))}
        updates, state = update(grads, state)
        for name in params:
            one = {name: grads[name]}
            mine, kept = update(one, alone[name][0])
            alone[name] = kept, mine[name]
            chex.assert_trees_all_close(updates[name], mine[name], rtol=1e-9, atol=1e-9)
    assert not np.any(updates["c"])


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
    branches = lambda k: lowered(subspace_interval=k).as_text().count("stablehlo.case")
    assert branches(None) == branches(1) < branches(2)
    chex.assert_trees_all_close(bases(2)[0], bases(1)[0], atol=1e-5)
    assert np.abs(bases(2)[3][0]["wide"] - bases(1)[3][0]["wide"]).max() > 1e-3


def test_moments_stay_in_a_basis_that_stays():
    """Without a gradient they decay, and nothing turns them, to the bit."""
    tx = optimizer(subspace_interval=4, residual="none")
    (_, state), *_ = runs(tx, 1)
    _, later = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, PARAMS), state)
    mu = jnp.float32(0.908) * state.mu["wide"]  # the third leaf: its turn is step 2
    chex.assert_trees_all_equal(later.mu["wide"], mu)


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
    """The momentum by some 2^-8, as the gradient's singular values are apart.

    Adam's direction would not do: it has the sign of entries that are next to zero.
    """
    rng = np.random.default_rng(0)
    signal = with_spectrum(rng, *SHAPE, 2.0 ** -np.arange(16))
    momenta = []
    for precision in (None, "bfloat16"):
        tx, update = of_precision(precision)
        state = tx.init(jnp.zeros(SHAPE))
        for t in range(4):
            grad = signal + 0.01 * np.random.default_rng(t).normal(size=SHAPE)
            _, state = update(jnp.asarray(grad, "float32"), state)
        assert state.projector.dtype == jnp.float32
        momenta.append(np.asarray(state.projector @ state.mu))
    exact, rounded = momenta
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.03


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
