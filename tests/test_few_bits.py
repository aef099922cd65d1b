"""int8 and int4: bytes, bounds, no bias, one matrix's blocks apart from another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam
from ldadam_optax._few_bits import block_axis, decode, encode, encoded_shapes
from ldadam_optax._random import seed_of

encode = jax.jit(encode, static_argnames=("dtype", "axis"))
decode = jax.jit(decode, static_argnames=("axis", "shape"))
LARGEST = {"int8": 127, "int4": 7.5}
# Shape and the axis of its blocks, with and without padding.
SHAPES = [((64, 96), 0), ((10, 96), 1), ((3, 40, 5), 1), ((2, 3, 7), 2), ((64, 2), 0)]


def array_of(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def through(array, dtype, axis, count=1, salt=0):
    seed = seed_of(jnp.int32(count), salt)
    codes, scales = encode(array, dtype, axis, seed)
    return decode(codes, scales, axis, array.shape, seed)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_codes_are_within_half_a_unit_of_what_they_stand_for(shape, axis, dtype):
    array = array_of(shape)
    seed = seed_of(jnp.int32(3), 5)
    codes, scales = encode(array, dtype, axis, seed)
    assert (codes.shape, scales.shape) == encoded_shapes(shape, dtype, axis)
    assert codes.dtype == jnp.int8
    assert scales.dtype == jnp.bfloat16
    decoded = decode(codes, scales, axis, shape, seed)
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
