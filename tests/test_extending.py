"""A subspace rule, a residual rule and a codec, each added from outside the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance_from_orthonormal

from ldadam_optax import LDAdamDimensionNumbers, ldadam_error, scale_by_ldadam
from ldadam_optax._quantization import ERROR_CODECS, Codec, Stored
from ldadam_optax._residual import RESIDUALS, ResidualRule, Settled
from ldadam_optax._subspace import SUBSPACES, SubspaceRule

SHAPE, RANK = (6, 10), 3


def gradients(shape=SHAPE, count=4):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def run(tx, grads):
    """Updates and states after each gradient."""
    update, state = jax.jit(tx.update), tx.init(grads[0])
    for grad in grads:
        direction, after = update(grad, state)
        like = lambda x: (x.shape, x.dtype)
        assert jax.tree.map(like, after) == jax.tree.map(like, state)
        assert all(
            np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(after)
        )
        state = after
        yield direction, state


# A subspace rule: the largest rows of B, kept as their numbers


def one_hot(rows, view, dtype):
    return jax.nn.one_hot(rows, view.m, dtype=dtype, axis=-2)


def first_rows(view, key, dtype):
    del key
    rows = jnp.broadcast_to(jnp.arange(view.rank), (*view.batch_shape, view.rank))
    return one_hot(rows, view, dtype)


def largest_rows(tracked):
    def one_basis(one):
        norms = jnp.linalg.norm(one.matrix(), axis=-1)
        _, rows = jax.lax.top_k(norms, one.view.rank)
        moved = one_hot(jnp.sort(rows), one.view, one.prev_basis.dtype)
        return jnp.where(norms.max() == 0, one.prev_basis, moved)

    return [one_basis(one) for one in tracked]


LARGEST_ROWS = SubspaceRule(
    start=first_rows,
    move=largest_rows,
    encode=lambda basis, dtype: jnp.argmax(basis, axis=-2).astype(jnp.int32),
    decode=one_hot,
    shape=lambda view, dtype: jax.ShapeDtypeStruct(
        (*view.batch_shape, view.rank), jnp.int32
    ),
)


def lines(matrix, side):
    """The matrix with the compressed axis in front."""
    return np.asarray(matrix if side == "left" else matrix.T)


@pytest.mark.parametrize("side", ["left", "right"])
def test_subspace_rule_with_a_stored_form_of_its_own(side, monkeypatch):
    """Updates lie in the chosen rows, the error in all others."""
    monkeypatch.setitem(SUBSPACES, "rows", LARGEST_ROWS)
    tx = scale_by_ldadam(RANK, subspace="rows", side=side)
    grads = gradients()
    for t, (direction, state) in enumerate(run(tx, grads)):
        chosen = np.asarray(state.projector)
        assert chosen.dtype == np.int32
        assert chosen.shape == (RANK,)
        if t == 0:  # B is the gradient, and all of it beside those rows is left over
            norms = np.linalg.norm(lines(grads[0], side), axis=1)
            assert set(chosen) == set(np.argsort(norms)[-RANK:])
        others = np.setdiff1d(np.arange(len(lines(direction, side))), chosen)
        error = lines(ldadam_error(state, side=side, subspace="rows"), side)
        assert not lines(direction, side)[others].any()
        assert lines(direction, side)[chosen].all()
        np.testing.assert_allclose(error[chosen], 0, atol=1e-6)
        if t == 0:
            np.testing.assert_allclose(error[others], lines(grads[0], side)[others])


def test_subspace_rule_of_a_stack_with_few_bits(monkeypatch):
    monkeypatch.setitem(SUBSPACES, "rows", LARGEST_ROWS)
    tx = scale_by_ldadam(
        RANK,
        subspace="rows",
        mu_dtype="int8",
        error_dtype="int8",
        projector_dtype="bfloat16",
        weight_dimension_numbers=LDAdamDimensionNumbers(1, 2),
    )
    *_, (direction, state) = run(tx, gradients((2, *SHAPE)))
    assert state.projector.shape == (2, RANK)
    basis = jax.nn.one_hot(state.projector, SHAPE[0], axis=-2)
    assert distance_from_orthonormal(basis) == 0
    in_rows = jnp.matmul(basis, jnp.matmul(basis.mT, direction))
    np.testing.assert_array_equal(in_rows, direction)


# A residual rule: the sign of what projection lost


def signed_residual(before, after):
    view = before.view
    lost = before.grad - view.lift(after.basis, after.ghat, before.precision)
    return Settled(after.direction, 0.1 * jnp.sign(lost), {})


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]], ids=str)
def test_residual_rule(shape, monkeypatch):
    """The update less that of 'none' is the sign of what projection lost."""
    rule = ResidualRule(jnp.zeros_like, lambda before: before.grad, signed_residual)
    monkeypatch.setitem(RESIDUALS, "sign", rule)
    grads = gradients(shape)
    runs = (scale_by_ldadam(RANK, residual=name) for name in ("sign", "none"))
    both = zip(grads, *(run(tx, grads) for tx in runs), strict=True)
    for grad, (signed, state), (dropped, plain) in both:
        assert state.error is None
        np.testing.assert_array_equal(state.mu, plain.mu)
        wide = np.asarray(grad if shape == SHAPE else grad.T, np.float64)
        basis = np.asarray(state.projector, np.float64)
        lost = wide - basis @ (basis.T @ wide)
        added = np.asarray(signed - dropped)
        added = added if shape == SHAPE else added.T
        clear = np.abs(lost) > 1e-4
        assert clear.mean() > 0.9
        np.testing.assert_allclose(added[clear], 0.1 * np.sign(lost)[clear], atol=1e-5)


# A codec: what bfloat16 leaves over, in a bfloat16 of its own


def two_bfloat16():
    def encode(array, axis, seed):
        high = array.astype(jnp.bfloat16)
        return Stored(high, (array - high.astype(array.dtype)).astype(jnp.bfloat16))

    def decode(stored, axis, shape, seed):
        return stored.codes.astype(jnp.float32) + stored.scale.astype(jnp.float32)

    def shapes(shape, axis):
        half = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return Stored(half, half)

    return Codec(encode, decode, shapes)


def test_codec(monkeypatch):
    """16 bits of significand: the run is float32's to 2^-16, not to 2^-23."""
    monkeypatch.setitem(ERROR_CODECS, "two_bfloat16", two_bfloat16())
    grads = gradients()
    runs = (scale_by_ldadam(RANK, error_dtype=d) for d in ("two_bfloat16", None))
    for (direction, state), (expected, plain) in zip(
        *(run(tx, grads) for tx in runs), strict=True
    ):
        assert state.error.dtype == state.error_scale.dtype == jnp.bfloat16
        assert state.error_scale.shape == SHAPE
        np.testing.assert_allclose(direction, expected, atol=1e-3)
        error = np.asarray(ldadam_error(plain))
        difference = np.abs(np.asarray(ldadam_error(state, grads[0])) - error).max()
        assert difference < 16 * 2.0**-16 * np.abs(error).max()


def test_unknown_names_list_what_was_added(monkeypatch):
    monkeypatch.setitem(SUBSPACES, "rows", LARGEST_ROWS)
    with pytest.raises(ValueError, match="'rows'"):
        scale_by_ldadam(RANK, subspace="columns")
