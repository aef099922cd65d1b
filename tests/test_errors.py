"""Every refusal tells the rule, the value given, where, and the way out."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import ldadam_optax
from ldadam_optax import LDAdamDimensionNumbers, ldadam, ldadamw, scale_by_ldadam

FACTORIES = {
    "ldadamw": lambda **options: ldadamw(1e-3, **options),
    "ldadam": lambda **options: ldadam(1e-3, **options),
    "scale_by_ldadam": scale_by_ldadam,
}

WRONG_VALUES = [
    ("rank", 0),
    ("rank", -3),
    ("b1", 1.0),
    ("b1", -0.1),
    ("b2", 1.0),
    ("b2", 1.5),
    ("b2", -1e-3),
    ("rho", -0.01),
    ("rho", 1.01),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("side", "std"),
    ("side", "rows"),
    ("subspace", "qr"),
    ("subspace_init", "zeros"),
    ("subspace_init", "power_iteration"),
    ("mu_dtype", "float33"),
    ("nu_dtype", "int32"),
    ("projector_dtype", "complex64"),
    ("error_dtype", "uint4"),
    ("error_dtype", "float33"),
]
WRONG_TYPES = [("rank", 2.5), ("rank", "16"), ("rank", True), ("rank", None)]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_hyperparameter_fails_in_the_factory(factory, name, value):
    with pytest.raises(ValueError, match=name) as failure:
        FACTORIES[factory](**{name: value})
    assert str(value).removeprefix("-").rstrip("0") in str(failure.value)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_rank_must_be_an_int(factory, name, value):
    with pytest.raises((TypeError, ValueError), match=r"rank.*int"):
        FACTORIES[factory](**{name: value})


@pytest.mark.parametrize("name", ["side", "subspace", "subspace_init"])
def test_unknown_choice_lists_the_choices(name):
    choices = {
        "side": ["short", "long", "left", "right"],
        "subspace": ["power_iteration", "svd", "randomized_svd"],
        "subspace_init": ["randomized", "svd"],
    }[name]
    with pytest.raises(ValueError, match="nonsense") as failure:
        scale_by_ldadam(**{name: "nonsense"})
    for choice in choices:
        assert choice in str(failure.value)


def init(shape, spec, *, dtype=jnp.float32):
    params = {"layer": {"kernel": jnp.zeros(shape, dtype)}}
    specs = {"layer": {"kernel": spec}}
    scale_by_ldadam(2, weight_dimension_numbers=specs).init(params)


@pytest.mark.parametrize(
    ("shape", "spec", "told"),
    [
        ((4, 6), LDAdamDimensionNumbers(0, 2), "2"),
        ((4, 6), LDAdamDimensionNumbers(-3, 1), "-3"),
        ((4, 6, 8), LDAdamDimensionNumbers((0, 3), 1), "3"),
        ((4, 6), LDAdamDimensionNumbers(0, 0), "0"),
        ((4, 6), LDAdamDimensionNumbers(0, -2), "-2"),
        ((4, 6, 8), LDAdamDimensionNumbers((0, 1), (1, 2)), "1"),
        ((4, 6, 8), LDAdamDimensionNumbers((0, 0), 1), "0"),
        ((4, 6, 8), LDAdamDimensionNumbers((0, -3), 1), "repeat"),
        ((8,), LDAdamDimensionNumbers(), "(8,)"),
        ((), LDAdamDimensionNumbers(), "()"),
        ((4, 6), LDAdamDimensionNumbers((), 1), "reduction_axis"),
    ],
)
def test_wrong_axes_fail_in_init_and_name_the_leaf(shape, spec, told):
    with pytest.raises(ValueError, match=re.escape(told)) as failure:
        init(shape, spec)
    message = str(failure.value)
    assert "layer" in message
    assert "kernel" in message


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_wrong_rank_of_a_leaf(rank):
    with pytest.raises((TypeError, ValueError), match="rank") as failure:
        init((4, 6), LDAdamDimensionNumbers(rank=rank))
    assert str(rank) in str(failure.value)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.uint8, jnp.bool_])
def test_leaf_that_is_not_real_floating(dtype):
    with pytest.raises((TypeError, ValueError), match=jnp.dtype(dtype).name) as failure:
        init((4, 6), LDAdamDimensionNumbers(), dtype=dtype)
    assert "kernel" in str(failure.value)


@pytest.mark.parametrize("factory", ["ldadamw", "ldadam"])
def test_complex_matrix_is_refused_by_the_whole_optimizer(factory):
    params = {"w": jnp.zeros((8, 12), jnp.complex64)}
    with pytest.raises((TypeError, ValueError), match="complex64"):
        FACTORIES[factory](rank=2).init(params)


def test_scale_by_ldadam_takes_matrices_alone():
    with pytest.raises(ValueError, match=r"\(8,\)") as failure:
        scale_by_ldadam(2).init({"w": jnp.zeros((4, 6)), "bias": jnp.zeros(8)})
    message = str(failure.value)
    assert "bias" in message
    assert "None" in message or "ldadamw" in message  # the way out


@pytest.mark.parametrize(
    "specs",
    [
        {"other": LDAdamDimensionNumbers()},
        {"w": LDAdamDimensionNumbers(), "more": LDAdamDimensionNumbers()},
        {"w": {"deeper": LDAdamDimensionNumbers()}},
        [LDAdamDimensionNumbers()],
        {"w": (0, 1)},
        {"w": "matrix"},
    ],
    ids=["other_key", "one_too_many", "too_deep", "list", "tuple", "string"],
)
@pytest.mark.parametrize("factory", FACTORIES)
def test_tree_of_specs_that_does_not_fit(factory, specs):
    tx = lambda: FACTORIES[factory](rank=2, weight_dimension_numbers=specs)
    with pytest.raises((TypeError, ValueError), match="weight_dimension_numbers"):
        tx().init({"w": jnp.zeros((8, 12))})


@pytest.mark.parametrize("state", [None, (), optax.EmptyState()])
def test_update_without_the_state_of_init(state):
    tx = scale_by_ldadam(2)
    with pytest.raises((TypeError, ValueError), match="init"):
        tx.update(jnp.ones((4, 6)), state)


def test_update_with_the_state_of_another_tree():
    tx = scale_by_ldadam(2)
    state = tx.init({"w": jnp.zeros((4, 6))})
    with pytest.raises((TypeError, ValueError)):
        tx.update({"v": jnp.ones((4, 6))}, state)
    with pytest.raises((TypeError, ValueError), match="init"):
        tx.update({"w": jnp.ones((4, 8))}, state)


def test_errors_come_before_any_computation():
    """Shapes are all that init's checks need."""
    abstract = {"w": jax.ShapeDtypeStruct((4, 6), jnp.int32)}
    with pytest.raises((TypeError, ValueError), match="int32"):
        jax.eval_shape(scale_by_ldadam(2).init, abstract)


def test_public_names():
    for name in (
        "LDAdamDimensionNumbers",
        "ScaleByLDAdamState",
        "flax_dimension_numbers",
        "ldadam",
        "ldadam_error",
        "ldadamw",
        "scale_by_ldadam",
    ):
        assert name in ldadam_optax.__all__
        assert getattr(ldadam_optax, name).__doc__
