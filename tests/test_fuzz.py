"""Any tree, shape, dtype, axes and options: what holds of each valid step.

Problems are hypothesis' draws, the same ones on every run. Compiling is most of the
time, so many problems are only traced, and few are run.
"""

import collections

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import (
    assert_trees_close,
    distance_from_orthonormal,
    ldadam_state,
    random_like,
)
from hypothesis import strategies as st

from ldadam_optax import (
    LDAdamDimensionNumbers,
    ldadam_error,
    ldadamw,
)

Dims, Shape = LDAdamDimensionNumbers, jax.ShapeDtypeStruct
Pair = collections.namedtuple("Pair", ["first", "second"])
MATRICES = [
    ((5, 7), Dims()),
    ((7, 5), Dims(-2, -1)),
    ((6, 6), Dims(1, 0)),
    ((3, 4, 6), Dims(1, 2)),
    ((4, 3, 6), Dims(0, 2)),
    ((6, 2, 3), Dims(0, (1, 2), rank=1)),
    ((2, 3, 2, 5), Dims((2, 1), -1, rank=0.5)),
    ((1, 4), Dims()),
]
OTHERS = [((5, 7), None), ((4,), None), ((), None)]  # AdamW's
TREES = [
    lambda a, b: {"x": a, "y": {"z": b}},
    lambda a, b: (a, [b]),
    lambda a, b: Pair(a, {"nothing": None, "b": b}),
    lambda a, b: [{"layers": (a, optax.MaskedNode(), b)}, ()],
]
FLOATS = ["float32", "bfloat16", "float16"]
OPTIONS = {
    "rank": [1, 2, 100, 0.4],
    "b1": [0.0, 0.908],
    "rho": [0.0, 0.908, 1.0],
    "weight_decay": [0.0, 0.1],
    "residual": ["error_feedback", "recovery", "normalized", "none"],
    "side": ["short", "long", "left", "right"],
    "subspace": ["power_iteration", "svd", "randomized_svd"],
    "subspace_init": ["randomized", "svd"],
    "subspace_interval": [None, 2],
    "precision": [None, "highest", "bfloat16"],
    "factorizations": ["together", "in_turn"],
    "mu_dtype": [None, *FLOATS, "int8"],
    "nu_dtype": [None, *FLOATS, "int8"],
    "projector_dtype": [None, *FLOATS],
    "error_dtype": [None, *FLOATS, "int8", "int4"],
    "stochastic_rounding": [False, True],
}


@st.composite
def options(draw, names=tuple(OPTIONS), most=5):
    """A few options away from their default, as users have them."""
    chosen = draw(st.lists(st.sampled_from(names), max_size=most, unique=True))
    drawn = {"rank": 2} | {n: draw(st.sampled_from(OPTIONS[n])) for n in chosen}
    if drawn.get("residual", "error_feedback") != "error_feedback":
        drawn.pop("error_dtype", None)  # the storage of what these do not have
    return drawn


@st.composite
def models(draw):
    """Abstract parameters, gradients and specs of two leaves in some tree."""
    leaves = [draw(st.sampled_from(MATRICES + OTHERS)) for _ in range(2)]
    tree, dtype = draw(st.sampled_from(TREES)), st.sampled_from(FLOATS)
    of_shapes = lambda: tree(*(Shape(shape, draw(dtype)) for shape, _ in leaves))
    return of_shapes(), of_shapes(), tree(*(spec for _, spec in leaves))


def train_step(tx, loss_grad):
    """A step that recomputes its forward pass, in a function to scan with."""

    @jax.checkpoint
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(loss_grad(params, grads), state, params)
        return optax.apply_updates(params, updates), state

    def body(carry, inputs):
        take, grads = inputs
        skip = lambda carry, grads: carry
        return jax.lax.cond(take, step, skip, carry, grads), None

    return body


# Valid problems.


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@hypothesis.settings(max_examples=30)
@hypothesis.given(models(), options())
def test_no_step_changes_a_type(model, options):
    """So it fits into scan, cond, remat and vmap, where types are compared."""
    params, grads, specs = model
    tx = ldadamw(1e-2, weight_dimension_numbers=specs, **options)
    state = jax.eval_shape(tx.init, params)
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(state)))
    updates, after = jax.eval_shape(tx.update, grads, rebuilt, params)
    assert types(after) == types(state)
    rounded = options.get("stochastic_rounding")  # in float32, for apply_updates
    for update, param in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
        wide = rounded and param.dtype == jnp.bfloat16
        assert update.dtype == ("float32" if wide else param.dtype)
    assert jax.tree.structure(updates) == jax.tree.structure(params)

    stacked = lambda count, tree: jax.tree.map(
        lambda x: Shape((count, *x.shape), x.dtype), tree
    )
    body = train_step(tx, lambda params, grads: grads)
    steps = lambda *args: jax.lax.scan(body, args[:2], args[2:])[0]
    ensemble = jax.eval_shape(
        jax.vmap(steps, in_axes=(0, 0, None, 0)),
        *(stacked(3, tree) for tree in (params, state)),
        Shape((2,), bool),
        stacked(3, stacked(2, grads)),
    )
    assert types(ensemble) == types((stacked(3, params), stacked(3, state)))


STORAGE = ("mu_dtype", "nu_dtype", "projector_dtype", "error_dtype")
RUN = tuple(set(OPTIONS) - {"stochastic_rounding", "precision"})


# Without shrinking, as each try is compiled.
@hypothesis.settings(max_examples=6, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    st.sampled_from(MATRICES), options(sorted(RUN)), st.integers(0, 2**16)
)
def test_all_ways_of_taking_steps_agree(matrix, options, seed):
    """vmap of scan of cond of remat of a jitted step is a loop of eager ones."""
    (shape, spec), taken = matrix, [True, False, True, True]
    model = {"x": jnp.zeros(shape), "y": {"z": jnp.zeros(shape)}, "bias": jnp.zeros(4)}
    specs = {"x": spec, "y": {"z": spec}, "bias": None}
    tx = ldadamw(1e-2, weight_dimension_numbers=specs, **options)
    draw = lambda *shape: random_like(
        jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape)), model), seed + len(shape)
    )
    params, noise, state = draw(2), draw(2, 4), tx.init(model)
    loss_grad = lambda p, g: jax.tree.map(lambda p, g: jnp.cos(p) * g, p, g)
    body = train_step(tx, loss_grad)
    steps = lambda p, g: jax.lax.scan(body, (p, state), (jnp.asarray(taken), g))[0]
    together, states = jax.jit(jax.vmap(steps))(params, noise)

    pick = lambda tree, *index: jax.tree.map(lambda x: x[index], tree)
    finest = min(
        (jnp.finfo(d).bits for n in STORAGE if (d := options.get(n)) in FLOATS),
        default=8 if "int" in str(options) else 32,
    )
    for member in range(2):
        p, s = pick(params, member), state
        for t in np.flatnonzero(taken):
            before, grads = s, loss_grad(p, pick(noise, member, t))
            updates, s = tx.update(grads, s, p)
            p = optax.apply_updates(p, updates)
        # A step is 0.01 large; a stored value may be rounded the other way.
        atol = 1e-5 if finest == 32 else 2e-3
        assert_trees_close(pick(together, member), p, rtol=0, atol=atol)
        check_state(options, specs, grads, before, s)
        assert int(ldadam_state(pick(states, member)).count) == sum(taken)
    check_zero_gradients(tx, options, model, state)
    check_exchanged_leaves(tx, options, s, p, grads)


def check_state(options, specs, grads, before, after):
    """Finite; an orthonormal basis; (I) e = a - (M - b1 M') / (1 - b1)."""
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()
    before, after = map(ldadam_state, (before, after))
    dtype = options.get("projector_dtype") or "float32"
    for basis in jax.tree.leaves(after.projector):
        assert distance_from_orthonormal(basis) < 8 * float(jnp.finfo(dtype).eps)
    exact = not any(options.get(n) not in (None, "float32") for n in STORAGE)
    if after.error is None or not exact:
        return
    side = options.get("side", "short")
    read = lambda state: ldadam_error(
        state,
        side=side,
        subspace=options.get("subspace", "power_iteration"),
        weight_dimension_numbers={**specs, "bias": optax.MaskedNode()},
    )
    errors = read(before), read(after)
    momenta = before.mu, after.mu
    bases = before.projector, after.projector
    for pick in (lambda tree: tree["x"], lambda tree: tree["y"]["z"]):
        check_error(
            options.get("b1", 0.908),
            pick(specs),
            side,
            pick(grads),
            *(list(map(pick, pair)) for pair in (errors, bases, momenta)),
        )


def check_error(b1, spec, side, grad, errors, bases, mus):
    old, new = (matrices(error, spec, side) for error in errors)
    corrected = matrices(grad, spec, side) + old
    flat = lambda x: np.asarray(x, np.float64).reshape(len(old), *x.shape[-2:])
    prev, lifted = (flat(u) @ flat(mu) for u, mu in zip(bases, mus, strict=True))
    expected = corrected - (lifted - b1 * prev) / (1 - b1)
    np.testing.assert_allclose(new, expected, atol=2e-4)


def matrices(leaf, spec, side):
    """The leaf in float64 as (count, m, n), with m the compressed axis."""
    leaf = np.asarray(leaf, np.float64)
    rows, columns = (
        [axis % leaf.ndim for axis in np.atleast_1d(axes)] for axes in spec[:2]
    )
    batch = [axis for axis in range(leaf.ndim) if axis not in rows + columns]
    m, n = (int(np.prod([leaf.shape[a] for a in axes])) for axes in (rows, columns))
    of_rows = {"short": m <= n, "long": m >= n, "left": True, "right": False}[side]
    found = leaf.transpose(batch + rows + columns).reshape(-1, m, n)
    return found if of_rows else found.mT


def check_zero_gradients(tx, options, params, state):
    """Nothing moves but what decays."""
    ones = jax.tree.map(jnp.ones_like, params)
    updates, after = tx.update(jax.tree.map(jnp.zeros_like, params), state, ones)
    decay = -1e-2 * options.get("weight_decay", 0.0)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, decay, rtol=1e-6)
    for field in ("mu", "nu", "error"):
        if f"{field}_dtype" not in options:  # Codes of zero are not zero.
            for leaf in jax.tree.leaves(getattr(ldadam_state(after), field)):
                assert not np.asarray(leaf).any()


def check_exchanged_leaves(tx, options, state, params, grads):
    """What a leaf is called decides on random bits and on its turn, on nothing else."""
    named = (
        options.get("subspace_interval"),
        options.get("subspace") == "randomized_svd",
    )
    if any(named) or "int" in str([options.get(n) for n in STORAGE]):
        return
    if options.get("error_dtype") == "bfloat16":
        return
    plain, _ = tx.update(grads, state, params)
    swapped, _ = tx.update(*(exchange(tree) for tree in (grads, state, params)))
    assert_trees_close(exchange(swapped), plain, rtol=0, atol=1e-6)


def exchange(tree):
    """x and y/z in each other's place, wherever both are."""
    both = lambda node: isinstance(node, dict) and {"x", "y"} <= node.keys()
    swap = lambda node: {**node, "x": node["y"]["z"], "y": {"z": node["x"]}}
    return jax.tree.map(
        lambda node: swap(node) if both(node) else node, tree, is_leaf=both
    )
