"""int8 and int4: bytes, bounds, no bias, one matrix's blocks apart from another's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldadam_optax import LDAdamDimensionNumbers, ldadam_error, scale_by_ldadam
from ldadam_optax._quantization import ERROR_CODECS, MU_CODECS, NU_CODECS, block_axis
from ldadam_optax._random import seed_of


@functools.partial(jax.jit, static_argnames=("dtype", "axis"))
def encode(array, dtype, axis, seed):
    return ERROR_CODECS[dtype].encode(array, axis, seed)


@functools.partial(jax.jit, static_argnames=("dtype", "axis", "shape"))
def decode(stored, dtype, axis, shape, seed):
    return ERROR_CODECS[dtype].decode(stored, axis, shape, seed)


LARGEST = {"int8": 127, "int4": 7.5}
# Shape and the axis of its blocks, with and without padding.
SHAPES = [((64, 96), 0), ((10, 96), 1), ((3, 40, 5), 1), ((2, 3, 7), 2), ((64, 2), 0)]


def array_of(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def through(array, dtype, axis, count=1, salt=0):
    seed = seed_of(jnp.int32(count), salt)
    return decode(encode(array, dtype, axis, seed), dtype, axis, array.shape, seed)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_codes_are_within_half_a_unit_of_what_they_stand_for(shape, axis, dtype):
    array = array_of(shape)
    seed = seed_of(jnp.int32(3), 5)
    stored = encode(array, dtype, axis, seed)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        stored, ERROR_CODECS[dtype].shapes(shape, axis)
    )
    decoded, scales = decode(stored, dtype, axis, shape, seed), stored.scale
    unit = np.repeat(np.asarray(scales, np.float32), 32, axis)
    unit = np.take(unit, range(shape[axis]), axis)
    assert np.all(np.abs(decoded - array) < 0.5001 * unit)
    # A scale is the block's largest entry, rounded up to bfloat16: 1 part in 128.
    assert np.all(unit <= np.abs(array).max() / LARGEST[dtype] * (1 + 2**-7))


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_entries_stay_in_range_under_any_dither(dtype):
    """Scales of one, so that nothing rounds them up; 32,000 dithers of 65,536."""
    ends = LARGEST[dtype] * jnp.where(jnp.arange(32_000) % 2, 1.0, -1.0)
    decoded = through(ends, dtype, 0)
    assert np.abs(decoded - ends).max() <= 0.5


@pytest.mark.parametrize("dtype", LARGEST)
def test_right_on_average(dtype):
    """2000 roundings: no bias, and the variance of rounding to nearest, 1/12 unit^2."""
    array = array_of((32, 3))
    rounded = jax.vmap(lambda count: through(array, dtype, 0, count))(jnp.arange(2000))
    unit = np.abs(array).max() / LARGEST[dtype]
    assert np.abs(np.mean(rounded, 0) - array).max() < 4 * 12**-0.5 * unit / 2000**0.5
    units = np.abs(array).max(axis=0) / LARGEST[dtype]
    variance = np.var(np.asarray(rounded) - np.asarray(array), axis=(0, 1))
    np.testing.assert_allclose(variance / np.asarray(units) ** 2, 1 / 12, rtol=0.05)


def test_the_count_and_the_leaf_change_the_rounding_and_nothing_else_does():
    array = array_of((64, 8))
    first = through(array, "int4", 0)
    np.testing.assert_array_equal(first, through(array, "int4", 0))
    assert np.any(first != through(array, "int4", 0, count=2))
    assert np.any(first != through(array, "int4", 0, salt=1))


@pytest.mark.parametrize("dtype", LARGEST)
def test_zero_stays_zero_and_nan_shows(dtype):
    array = jnp.zeros((64, 2)).at[40, 1].set(jnp.nan)
    decoded = through(array, dtype, 0)
    assert not np.any(decoded[:, 0])
    assert not np.any(decoded[:32])
    assert np.all(np.isnan(decoded[32:, 1]))


def test_the_axis_of_the_blocks():
    assert block_axis((768, 2048), (0, 1)) == 0
    assert block_axis((12, 768, 2048), (1, 2)) == 1
    assert block_axis((768, 12, 64), (0, 1, 2)) == 0  # 12 heads would be padded to 32
    assert block_axis((12, 64, 768), (0, 1, 2)) == 1
    assert block_axis((10, 2048), (0, 1)) == 1
    assert block_axis((5461, 2048), (0, 1)) == 0  # 11 rows of padding: 0.2 %


@pytest.mark.parametrize(("dtype", "most"), [("int8", 1.07), ("int4", 0.57)])
@pytest.mark.parametrize(
    ("shape", "reduction", "output"),
    [
        ((768, 2048), 0, 1),
        ((2048, 5461), 0, 1),
        ((5461, 2048), 0, 1),
        ((1024, 2736), 0, 1),
        ((768, 12, 64), 0, (1, 2)),
        ((12, 64, 768), (0, 1), 2),
        ((24, 1024, 4096), 1, 2),
        ((1024, 24, 4096), 0, 2),
    ],
    ids=str,
)
def test_bytes_an_element(shape, reduction, output, dtype, most):
    numbers = LDAdamDimensionNumbers(reduction, output)
    tx = scale_by_ldadam(8, error_dtype=dtype, weight_dimension_numbers=numbers)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.float32))
    held = sum(
        leaf.size * leaf.dtype.itemsize for leaf in (state.error, state.error_scale)
    )
    assert held / np.prod(shape) <= most


def test_matrices_of_a_batch_share_no_block():
    """A scale of one matrix knows nothing of another, wherever the batch axis is."""
    numbers = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(1, error_dtype="int8", weight_dimension_numbers=numbers)
    grad = array_of((32, 4, 6)).at[0].multiply(1e6)
    _, state = tx.update(grad, tx.init(grad))
    scales = np.asarray(state.error_scale, np.float32)
    assert scales[0].min() > 1e2
    assert scales[1:].max() < 1


MOMENTS = {"mu": MU_CODECS["int8"], "nu": NU_CODECS["int8"]}


def moment_through(name, array, count=1):
    codec, seed = MOMENTS[name], seed_of(jnp.int32(count), 0)
    return codec.decode(codec.encode(array, 0, seed), 0, array.shape, seed)


@pytest.mark.parametrize(("name", "bound"), [("mu", 1 / 63), ("nu", 1 / 126)])
def test_moments_are_within_one_level(name, bound):
    """Levels are finer near zero than at the block's largest entry."""
    array = array_of((64, 96))
    array = array if name == "mu" else array**2
    blocks = np.abs(array).reshape(2, 32, 96).max(1)
    largest = np.repeat(blocks, 32, 0) * (1 + 2**-7)
    error = np.abs(moment_through(name, array) - array) / largest
    assert error.max() < bound
    small = np.abs(array) / largest < 1e-2
    assert error[small].max() < bound / 2


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_right_on_average_and_keep_zero(name):
    """2000 roundings in the map's own units; a zero beside large entries stays zero."""
    array = (jnp.abs(array_of((32, 3))) + 0.1).at[5].set(0.0)
    rounded = np.asarray(
        jax.vmap(lambda count: moment_through(name, array, count))(jnp.arange(2000))
    )
    mapped = {"mu": lambda x: x / (1 + x), "nu": np.sqrt}[name]
    scale = np.asarray(array).max(axis=0)
    mean = mapped(rounded / scale).mean(axis=0)
    exact = mapped(np.asarray(array) / scale)
    alive = np.arange(32) != 5
    assert np.abs(mean - exact)[alive].max() < 4 * 0.5 / 127 / 2000**0.5
    least = {"mu": 0.0, "nu": (0.5 / 255) ** 2 * 1.01}[name]
    assert (rounded[:, 5] / scale).max() <= least


def test_mu_and_nu_are_rounded_independently():
    array = jnp.full((32, 500), 0.5).at[0].set(1.0)
    up = [np.ravel(moment_through(name, array)[1:] > 0.5) for name in MOMENTS]
    assert abs(np.corrcoef(*up)[0, 1]) < 0.05


def error_norm_after(error_dtype, steps=2500):
    """Norm of the error in a regression at rank 1 of 32."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, noise = draw(64, 32), 0.1 * draw(64, 48)
    y = x @ draw(32, 48) + noise
    tx = scale_by_ldadam(1, error_dtype=error_dtype)

    def step(carry, _):
        weights, state = carry
        updates, state = tx.update(x.T @ (x @ weights - y) / 64, state, weights)
        return (weights - 1e-2 * updates, state), None

    weights = jnp.zeros((32, 48))
    start = weights, tx.init(weights)
    weights, state = jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])(start)
    return float(jnp.linalg.norm(ldadam_error(state, weights)))


def test_the_noise_of_an_int4_buffer_does_not_pile_up():
    """Read in full, the int4 buffer stands at 4.5 times float32's here."""
    assert error_norm_after("int4") < 1.5 * error_norm_after("float32")
