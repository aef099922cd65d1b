"""CholeskyQR in passes against a QR factorisation in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance_from_orthonormal, with_spectrum

from ldadam_optax import _lapack, _orthonormal
from ldadam_optax._cholesky import (
    _CPU_BLOCK,
    _TPU_BLOCK,
    _by_halves,
    _by_solve,
    inverse_cholesky,
)


def orthonormalize(panel):
    return _orthonormal.orthonormalize([panel])[0]


def precondition(panel):
    [factor] = _orthonormal.preconditioners([panel])
    return jnp.matmul(factor, panel, precision="highest")


def test_panels_of_several_sizes_together_are_what_they_are_alone(panels):
    """One call for all of a rank; batch axes and lengths of any kind."""
    several = [panels[:2], panels[0, :, :100], panels[:2, :5, :50]]
    together = jax.jit(_orthonormal.orthonormalize)(several)
    for panel, basis in zip(several, together, strict=True):
        chex.assert_trees_all_close(basis, orthonormalize(panel), atol=2e-6)
    text = jax.jit(_orthonormal.orthonormalize).lower(several[:2]).as_text()
    assert text.count("stablehlo.while") == 1


ROWS, COLUMNS = 24, 160
CONDITIONS = [1e0, 1e2, 1e4, 1e6, 1e10]


@pytest.fixture(scope="module")
def panels():
    """Panels of every conditioning, in one batch."""
    rng = np.random.default_rng(0)
    spectra = [np.geomspace(1, 1 / condition, ROWS) for condition in CONDITIONS]
    batch = [with_spectrum(rng, ROWS, COLUMNS, values) for values in spectra]
    return jnp.asarray(np.stack(batch), jnp.float32)


def gram(panel):
    panel = np.asarray(panel, np.float64)
    return panel @ np.swapaxes(panel, -1, -2)


@pytest.mark.parametrize("alone", [True, False])
def test_rows_are_orthonormal_whatever_the_conditioning(panels, alone):
    """One at a time, and in a batch, which takes as many passes as its worst."""
    rows = jax.jit(orthonormalize)
    found = [rows(panel) for panel in panels] if alone else list(rows(panels))
    for basis in found:
        assert distance_from_orthonormal(basis.mT) < 2e-6


def on_a_tpu(gram):
    return _by_halves(gram, _by_solve, _TPU_BLOCK)


@pytest.mark.parametrize("inverse_factor", [inverse_cholesky, on_a_tpu, _by_solve])
@pytest.mark.parametrize("rank", [1, 24, 97, 200])
def test_the_inverse_factor_of_any_rank(rank, inverse_factor):
    """Whole, and by halves of even and odd size, once and twice."""
    assert 24 <= _CPU_BLOCK < 97 <= _TPU_BLOCK < 200
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1e-2, rank)
    panels = [with_spectrum(rng, rank, 256, spectrum) for _ in range(2)]
    grams = jnp.asarray(gram(np.stack(panels)), jnp.float32)
    factors = np.linalg.cholesky(np.asarray(grams, np.float64))
    inverses = np.asarray(jax.jit(inverse_factor)(grams), np.float64)
    assert not np.any(np.triu(inverses, 1))
    np.testing.assert_allclose(
        inverses @ factors, np.broadcast_to(np.eye(rank), grams.shape), atol=2e-3
    )


@pytest.mark.parametrize("rank", [24, 120, 200])
def test_no_inverse_factor_of_an_indefinite_matrix(rank):
    for negative in (0, rank - 1):
        diagonal = jnp.ones(rank).at[negative].set(-1.0)
        inverse = inverse_cholesky(jnp.diag(diagonal))
        assert np.isnan(inverse[-1, -1])


def test_preconditioned_rows_are_far_better_conditioned(panels):
    """Less than a basis, and enough between the halves of a power step."""
    for condition, panel in zip(CONDITIONS, jax.jit(precondition)(panels), strict=True):
        left = np.linalg.cond(np.asarray(panel, np.float64))
        assert left < max(1.1, condition / 100)


@pytest.mark.parametrize("function", [orthonormalize, precondition])
def test_nested_spans_stay_as_they_are(panels, function):
    """Up to a lower triangular factor with a positive diagonal."""
    panel = panels[1]
    rows = np.asarray(function(panel), np.float64)
    factor = np.linalg.lstsq(rows.T, np.asarray(panel, np.float64).T, rcond=None)[0].T
    np.testing.assert_allclose(factor @ rows, panel, atol=1e-5)
    assert abs(np.triu(factor, 1)).max() < 1e-5
    assert np.diag(factor).min() > 0


def test_rows_are_those_of_a_qr_factorisation(panels):
    expected, triangle = np.linalg.qr(np.asarray(panels[0], np.float64).T)
    expected = (expected * np.sign(np.diag(triangle))).T
    np.testing.assert_allclose(orthonormalize(panels[0]), expected, atol=1e-5)


def test_nan_shows_as_nan(panels):
    panel = panels[0].at[3, 5].set(jnp.nan)
    assert np.isnan(orthonormalize(panel)).any()


@pytest.mark.parametrize("devices", [1, 8])
def test_one_matrix_a_call_gives_what_one_call_of_all_gives(key, monkeypatch, devices):
    """On one device a loop; a batch that may be split over several is left whole."""
    monkeypatch.setattr(_lapack, "_CALLS_WAIT", True)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    matrices = jax.random.normal(key, (2, 3, 5, 4))

    def left_vectors(matrices):
        return jnp.linalg.svd(matrices, full_matrices=False)[0]

    def one_by_one(matrices):
        return _lapack.one_by_one(left_vectors, matrices)

    chex.assert_trees_all_equal(one_by_one(matrices), left_vectors(matrices))
    assert ("scan" in str(jax.make_jaxpr(one_by_one)(matrices))) == (devices == 1)
