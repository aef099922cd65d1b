"""Any bad argument, any foreign or damaged state: a refusal that names what is wrong.

The library's own, not one of jax from within a step: the last frame of its traceback
lies in ``ldadam_optax``.
"""

import inspect
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldadam_optax import LDAdamDimensionNumbers as Dims
from ldadam_optax import ldadam, ldadamw, scale_by_ldadam

Shape = jax.ShapeDtypeStruct

# Bad arguments.


def refusal(call, *args):
    """The message with which the library itself refuses."""
    with pytest.raises((TypeError, ValueError)) as failure:
        call(*args)
    assert isinstance(failure.value, TypeError | ValueError)
    last = traceback.extract_tb(failure.value.__traceback__)[-1]
    assert "/ldadam_optax/" in last.filename, f"{last}: {failure.value}"
    return str(failure.value)


FACTORIES = {"ldadamw": ldadamw, "ldadam": ldadam, "scale_by_ldadam": scale_by_ldadam}
ARGUMENTS = [
    (factory, name)
    for factory, function in FACTORIES.items()
    for name in inspect.signature(function).parameters
]
NEVER = {
    "object": object(),
    "text": "nonsense",
    "bytes": b"x",
    "empty": [],
    "list": [1, 2],
    "dict": {"q": 1},
    "complex": 3 + 4j,
    "nan": float("nan"),
    "array": np.ones(3),
    "traced": jnp.ones((2, 2)),
    "text array": np.array("x"),
    "huge": 10**30 + 0.5j,
}
PARAMS = {"w": Shape((6, 9), "float32"), "b": Shape((9,), "float32")}


def make(factory, **arguments):
    if factory != "scale_by_ldadam":
        arguments.setdefault("learning_rate", 0.1)
    arguments.setdefault("rank", 2)
    return FACTORIES[factory](**arguments)


def init(factory, arguments):
    params = PARAMS if factory != "scale_by_ldadam" else {"w": PARAMS["w"]}
    jax.eval_shape(make(factory, **arguments).init, params)


@pytest.mark.parametrize(("factory", "name"), ARGUMENTS)
def test_no_option_takes_nonsense(factory, name):
    """Every option that there is, of the signature, by its name."""
    for value in NEVER.values():
        assert name in refusal(init, factory, {name: value})


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "rho"])
def test_a_schedule_where_none_is_taken_tells_of_inject_hyperparams(name):
    for value in (optax.constant_schedule(0.5), None, "0.5", True):
        assert "inject_hyperparams" in refusal(init, "ldadamw", {name: value})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"learning_rate": np.inf}, "learning_rate must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"eps": np.inf}, "eps must be > 0 and finite"),
        ({"rho": np.float32(1.5)}, "rho must be in"),
        ({"b1": np.array(1.0)}, "b1 must be in"),
        ({"mu_dtype": np.float32(1)}, "mu_dtype must be None or one of"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False"),
        ({"mask": {"w": "yes", "b": False}}, r"mask['w'] must be a bool"),
        ({"mask": lambda params: {"w": 3, "b": True}}, r"mask['w'] must be a bool"),
        ({"mask": {"w": True}}, "mask must be a bool or a prefix tree"),
        ({"weight_dimension_numbers": {"w": Dims(0.5), "b": None}}, "'w': reduction_"),
        ({"weight_dimension_numbers": {"w": Dims(0, "1"), "b": None}}, "'w': output_"),
        ({"weight_dimension_numbers": lambda params: 3}, "weight_dimension_numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_values(arguments, told):
    assert told in refusal(init, "ldadamw", arguments)


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "rho", "weight_decay"])
def test_numbers_may_be_arrays_under_a_trace(name):
    """Known arrays are checked without jax, which would trace the comparison."""
    params = {"w": jnp.ones((6, 9)), "b": jnp.ones(9)}
    for kind in (jnp.float32, np.float32, lambda x: np.array(x), lambda x: x):
        tx = make("ldadamw", **{name: kind(0.5)})
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


# States of others.

STORAGE = {
    "mu_dtype": ("bfloat16", "float16", "int8"),
    "nu_dtype": ("bfloat16", "float16", "int8"),
    "projector_dtype": ("bfloat16", "float16"),
    "error_dtype": ("bfloat16", "float16", "int8", "int4"),
}
KINDS = {
    "default": {},
    "rank": {"rank": 3},
    "side": {"side": "right"},
    "long": {"side": "long"},
    "subspace": {"subspace": "svd", "subspace_init": "svd"},
    "interval": {"subspace_interval": 3},
    "recovery": {"residual": "recovery"},
    "normalized": {"residual": "normalized"},
    "none": {"residual": "none"},
    **{
        f"{name}={dtype}": {name: dtype}
        for name, dtypes in STORAGE.items()
        for dtype in dtypes
    },
}
MODEL = {"v": jnp.ones((6, 9)), "square": jnp.ones((6, 6)), "b": jnp.ones(9)}


def types_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.fixture(scope="module")
def states():
    return {
        kind: jax.eval_shape(make("ldadamw", **options).init, MODEL)
        for kind, options in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_taken_by_options_that_read_it_alike_alone(kind, states):
    tx = make("ldadamw", **KINDS[kind])
    update = lambda state: jax.eval_shape(tx.update, MODEL, state, MODEL)
    alike = []
    for other, state in states.items():
        if types_of(state) == types_of(states[kind]):
            alike.append(state)
        else:
            told = refusal(update, state)
            assert any(f"'{name}'" in told for name in MODEL), f"{other}: {told}"
    assert types_of(update(alike[-1])[1]) == types_of(states[kind])


OTHER_OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "muon": optax.contrib.muon(0.1),
    "ldadam": ldadam(0.1, 2),
    "multi_steps": optax.MultiSteps(ldadamw(0.1, 2), 2),
    "injected": optax.inject_hyperparams(ldadamw, static_args="rank")(0.1, 2),
    "rounding": ldadamw(0.1, 2, stochastic_rounding=True),
    "none": None,
    "number": 3,
    "triple": (1, 2, 3),
    "nothing": optax.EmptyState(),
}


@pytest.mark.parametrize("other", OTHER_OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(other):
    optimizer = OTHER_OPTIMIZERS[other]
    state = optimizer.init(MODEL) if hasattr(optimizer, "init") else optimizer
    tx = make("ldadamw")
    assert "init" in refusal(tx.update, MODEL, state, MODEL)
    matrices_alone = {"v": MODEL["v"], "square": MODEL["square"]}
    assert "init" in refusal(scale_by_ldadam(2).update, matrices_alone, state)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_needs_the_state_of_one(name):
    constant, scheduled = make("ldadamw"), make("ldadamw", **{name: lambda count: 0.1})
    state = constant.init(MODEL)
    assert f"The state for {name}" in refusal(scheduled.update, MODEL, state, MODEL)
    update = lambda: constant.update(MODEL, scheduled.init(MODEL), MODEL)
    jax.eval_shape(update)  # a number needs no state
    masked = make("ldadamw", mask={"v": True, "square": True, "b": False})
    assert "The state for weight_decay" in refusal(masked.update, MODEL, state, MODEL)


DAMAGES = {
    "another dtype": lambda leaf: leaf.astype("complex64"),
    "an axis more": lambda leaf: leaf[..., None],
    "twice as long": lambda leaf: jnp.concatenate([jnp.atleast_1d(leaf)] * 2),
    "text": lambda leaf: "damaged",
    "a number": lambda leaf: 0,
    "nothing": lambda leaf: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "options",
    [{}, {"mu_dtype": "int8", "error_dtype": "int4"}, {"residual": "recovery"}],
    ids=str,
)
def test_each_damaged_leaf_of_a_state_is_named(options, damage):
    tx = make("ldadamw", **options)
    paths, treedef = jax.tree.flatten_with_path(tx.init(MODEL))
    for i, (path, leaf) in enumerate(paths):
        words = {str(getattr(key, "name", getattr(key, "key", ""))) for key in path}
        if "form" in words and damage == "another dtype":
            continue  # its shape alone is read
        leaves = [leaf for _, leaf in paths]
        leaves[i] = DAMAGES[damage](leaf)
        told = refusal(tx.update, MODEL, treedef.unflatten(leaves), MODEL)
        field = words & {"count", "c"} or words & MODEL.keys() or {"form", "square"}
        assert any(word in told for word in field), f"{path}: {told}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v": None}, "'v'"),
        ({"more": jnp.ones(3)}, "'more'"),
        ({"v": jnp.ones((6, 8))}, "'v'"),
        ({"v": jnp.ones(9)}, "'v'"),
        ({"b": jnp.ones(8)}, "'b'"),
        ({"v": "text"}, "'v'"),
    ],
    ids=str,
)
def test_other_parameters_are_named(change, told):
    tx, other = make("ldadamw"), MODEL | change
    state = tx.init(MODEL)
    assert told in refusal(tx.update, other, state, other)
    assert told in refusal(tx.update, other, state, MODEL)
    refusal(tx.update, MODEL, state, other)
