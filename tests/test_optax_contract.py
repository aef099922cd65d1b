"""ldadamw within optax: wrappers, trees, dtypes, tracing, donation."""

import functools
import operator
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, last, ldadam_state, random_like, run

from ldadam_optax import LDAdamDimensionNumbers, ldadam, ldadamw, scale_by_ldadam

SETTINGS = {"rank": 2, "weight_decay": 0.01}


def params_like(dtype=jnp.float32):
    zeros = {
        "dense": {"kernel": jnp.zeros((8, 12), dtype), "bias": jnp.zeros(12, dtype)},
        "embed": {"embedding": jnp.zeros((20, 8), dtype)},
        "out": {"kernel": jnp.zeros((12, 6), dtype)},
    }
    return random_like(zeros, seed=0)


def gradients_like(params, count=4):
    return [random_like(params, seed) for seed in range(1, count + 1)]


@pytest.fixture(scope="module")
def plain():
    """Parameters of the bare optimizer after each step."""
    params = params_like()
    return [
        p for p, _ in run(ldadamw(1e-2, **SETTINGS), params, gradients_like(params))
    ]


def check_same_run(tx, plain, rtol=1e-5, atol=1e-6):
    params = params_like()
    steps = run(tx, params, gradients_like(params))
    for (actual, _), expected in zip(steps, plain, strict=True):
        assert_trees_close(actual, expected, rtol=rtol, atol=atol)


# Routing


def test_default_routing():
    """2-D leaves with both sides above the rank, save embeddings; AdamW elsewhere."""
    params = params_like()
    state = ldadam_state(ldadamw(1e-2, rank=6).init(params))
    compressed = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.mu)
    }
    assert compressed == {"['dense']['kernel']"}  # out has a side of 6


def test_what_is_not_compressed_takes_adamw():
    params = params_like()
    grads = gradients_like(params)
    ours = ldadamw(1e-2, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, rank=2)
    adamw = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
    actual, expected = (last(run(tx, params, grads))[0] for tx in (ours, adamw))
    pick = lambda tree: [tree["dense"]["bias"], tree["embed"]]
    assert_trees_close(pick(actual), pick(expected), rtol=1e-6)
    assert np.abs(actual["out"]["kernel"] - expected["out"]["kernel"]).max() > 1e-3


def test_weight_decay_mask():
    params = params_like()
    zeros = jax.tree.map(jnp.zeros_like, params)
    only_kernels = lambda tree: jax.tree.map(lambda p: p.ndim == 2, tree)
    tx = ldadamw(1.0, rank=2, weight_decay=0.25, mask=only_kernels)
    stepped, _ = last(run(tx, params, [zeros]))
    kernel, bias = stepped["dense"]["kernel"], stepped["dense"]["bias"]
    np.testing.assert_allclose(kernel, 0.75 * params["dense"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(bias, params["dense"]["bias"])


@pytest.mark.parametrize("how", ["callable", "tree", "prefix", "muon", "galore"])
def test_ways_to_give_dimension_numbers(how):
    params = params_like()
    spec = {
        "muon": optax.contrib.MuonDimensionNumbers(0, 1),
        "galore": optax.contrib.GaLoreDimensionNumbers(0, 1),
    }.get(how, LDAdamDimensionNumbers())
    tree = {
        "dense": {"kernel": spec, "bias": None},
        "embed": {"embedding": None},
        "out": {"kernel": spec},
    }
    given = {
        "callable": lambda params: tree,
        "prefix": {"dense": tree["dense"], "embed": None, "out": spec},
    }.get(how, tree)
    state = ldadamw(1e-2, rank=2, weight_dimension_numbers=given).init(params)
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == 2
    # None means the defaults, which come to the same here.
    default = ldadamw(1e-2, rank=2).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(default)


def test_one_spec_for_all_leaves():
    params = {"a": jnp.ones((3, 5, 8)), "b": jnp.ones((3, 8, 5))}
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=LDAdamDimensionNumbers(1, 2))
    state = ldadam_state(tx.init(params))
    assert {leaf.shape for leaf in jax.tree.leaves(state.mu)} == {(3, 2, 8)}


# Wrappers


def test_chain_of_the_parts_is_the_optimizer():
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params)
    parts = optax.chain(
        scale_by_ldadam(2),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    whole = ldadamw(1e-2, rank=2, weight_decay=0.1)
    for (a, _), (b, _) in zip(
        run(parts, params, grads), run(whole, params, grads), strict=True
    ):
        assert_trees_close(a, b, rtol=1e-6)


def test_chain_with_clipping(plain):
    check_same_run(
        optax.chain(optax.clip_by_global_norm(1e6), ldadamw(1e-2, **SETTINGS)), plain
    )


def test_masked():
    params = params_like()
    mask = {"dense": True, "embed": False, "out": True}
    tx = optax.masked(ldadamw(1e-2, **SETTINGS), mask)
    grads = gradients_like(params, 1)
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    assert_trees_close(updates["embed"], grads[0]["embed"])
    assert float(jnp.abs(updates["out"]["kernel"]).max()) < 0.05


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition_and_multi_transform(combine):
    params = params_like()
    groups = {"ours": ldadamw(1e-2, **SETTINGS), "theirs": optax.sgd(0.5)}
    labels = {"dense": "ours", "embed": "theirs", "out": "ours"}
    grads = gradients_like(params)
    stepped, state = last(run(combine(groups, labels), params, grads))
    total = functools.reduce(operator.add, [g["embed"]["embedding"] for g in grads])
    expected = params["embed"]["embedding"] - 0.5 * total
    np.testing.assert_allclose(stepped["embed"]["embedding"], expected, atol=1e-5)
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == 2


def test_tree_of_dimension_numbers_under_masked():
    params = {"w": jnp.ones((8, 12)), "frozen": jnp.ones((8, 12)), "b": jnp.ones(3)}
    specs = {"w": LDAdamDimensionNumbers(), "frozen": None, "b": None}
    inner = ldadamw(1e-2, rank=2, weight_dimension_numbers=specs)
    tx = optax.masked(inner, {"w": True, "frozen": False, "b": True})
    state = tx.init(params)
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == 1
    jax.jit(tx.update)(params, state, params)


def test_inject_hyperparams(plain):
    """Learning rate, b1, b2, rho, eps traced; rank static; all the same result."""
    factory = optax.inject_hyperparams(ldadamw, static_args=("rank",))
    tx = factory(
        1e-2, b1=0.908, b2=0.99, eps=1e-8, rho=0.908, **SETTINGS, error_feedback=True
    )
    state = tx.init(params_like())
    assert {"learning_rate", "b1", "b2", "rho", "eps"} <= set(state.hyperparams)
    check_same_run(tx, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["learning_rate", "b1", "rho", "eps"])
def test_injected_hyperparameter_can_be_changed(name):
    """Set in the state between steps, without a second trace."""
    tx = optax.inject_hyperparams(ldadamw, static_args=("rank",))(1e-2, rank=2)
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params, 3)
    traces = []

    @jax.jit
    def step(state, grads):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for g in grads[:2]:
        _, state = step(state, g)
    value = {"learning_rate": 0.5, "b1": 0.1, "rho": 0.1, "eps": 10.0}[name]
    like = state.hyperparams[name]
    changed_state = state._replace(
        hyperparams={**state.hyperparams, name: jnp.asarray(value, like.dtype)}
    )
    same, _ = step(state, grads[2])
    changed, _ = step(changed_state, grads[2])
    assert np.abs(same["w"] - changed["w"]).max() > 1e-5
    assert len(traces) == 1


def test_inject_hyperparams_in_the_bare_transformation():
    tx = optax.inject_hyperparams(scale_by_ldadam, static_args=("rank",))(rank=2)
    params = {"w": jnp.ones((6, 9))}
    _, state = last(run(tx, params, gradients_like(params, 2)))
    assert np.isfinite(ldadam_state(state).mu["w"]).all()


def test_learning_rate_schedule():
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params)
    schedule = optax.linear_schedule(1e-2, 0.0, 2)
    steps = [p["w"] for p, _ in run(ldadamw(schedule, rank=2), params, grads)]
    assert np.abs(steps[1] - steps[0]).max() > 1e-4
    np.testing.assert_array_equal(steps[3], steps[2])


def test_multi_steps():
    """k micro-batches are one step on their mean."""
    params = params_like()
    grads = gradients_like(params)
    tx = optax.MultiSteps(ldadamw(1e-2, **SETTINGS), every_k_schedule=2)
    accumulated, _ = last(run(tx, params, grads))
    mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    means = [mean(*grads[:2]), mean(*grads[2:])]
    expected, _ = last(run(ldadamw(1e-2, **SETTINGS), params, means))
    assert_trees_close(accumulated, expected, rtol=1e-4, atol=1e-5)


def test_schedule_free():
    params = {"w": jnp.ones((6, 9)), "b": jnp.ones(9)}
    target = {"w": jnp.full((6, 9), 0.5), "b": jnp.zeros(9)}
    tx = optax.contrib.schedule_free(ldadamw(1e-2, rank=2, b1=0.0), 1e-2, b1=0.9)
    loss = lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (params, state), _ = jax.lax.scan(body, start, length=400)
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 1e-2


def test_apply_if_finite_passes_good_steps_through(plain):
    check_same_run(optax.apply_if_finite(ldadamw(1e-2, **SETTINGS), 3), plain)


# State


def test_tree_map_params_visits_what_is_like_the_parameters():
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    doubled = optax.tree.map_params(
        tx, lambda s: s + 1, state, transform_non_params=lambda s: s
    )
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert int(ldadam_state(doubled).count) == 0
    for leaf in jax.tree.leaves(ldadam_state(doubled).mu):
        np.testing.assert_array_equal(leaf, 1.0)


def test_tree_get_and_set():
    params = {"w": jnp.ones((6, 9))}
    tx = scale_by_ldadam(2)
    state = tx.init(params)
    assert optax.tree.get(state, "projector")["w"].shape == (6, 2)
    assert int(optax.tree.get(state, "count")) == 0
    whole = ldadamw(1e-2, rank=2).init(params)
    assert optax.tree.get(whole, "projector")["w"].shape == (6, 2)
    replaced = optax.tree.set(state, count=jnp.asarray(7, jnp.int32))
    assert int(replaced.count) == 7


@pytest.mark.parametrize("error_feedback", [True, False])
def test_state_is_what_is_documented(error_feedback):
    spec = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(
        2, error_feedback=error_feedback, weight_dimension_numbers=spec
    )
    state = tx.init({"wide": jnp.ones((3, 5, 8)), "tall": jnp.ones((3, 8, 5))})
    assert state.count.dtype == jnp.int32
    assert state.count.shape == ()
    for name in ("wide", "tall"):
        assert state.mu[name].shape == state.nu[name].shape == (3, 2, 8)
        assert state.projector[name].shape == (3, 5, 2)
    if error_feedback:
        assert state.error["tall"].shape == (3, 8, 5)
    else:
        assert state.error is None
    assert state.error_scale is None
    assert state.residual_norm is None


def test_init_is_repeatable_and_differs_between_leaves():
    params = {"a": jnp.ones((6, 9)), "b": jnp.ones((6, 9))}
    first, second = (scale_by_ldadam(2).init(params).projector for _ in range(2))
    np.testing.assert_array_equal(first["a"], second["a"])
    jitted = jax.jit(scale_by_ldadam(2).init)(params).projector
    np.testing.assert_allclose(first["a"], jitted["a"], atol=1e-6)


def test_state_types_do_not_change():
    """`jax.typeof` sees what shape and dtype do not: weak types and sharding."""
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(gradients_like(params)[0], state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)
    assert types(jax.jit(tx.init)(params)) == types(state)


def test_one_trace():
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    traces = []

    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    jitted, state = jax.jit(update), tx.init(params)
    for grads in gradients_like(params):
        _, state = jitted(grads, state, params)
    assert len(traces) == 1


def test_learning_rate_and_rank_of_numpy():
    tx = ldadamw(np.float32(1e-2), rank=np.int64(2))
    params = {"w": jnp.ones((6, 9))}
    last(run(tx, params, gradients_like(params, 1)))


# Trees


@pytest.mark.parametrize("empty", [None, optax.MaskedNode(), {}, ()])
def test_empty_nodes(empty):
    params = {"w": jnp.ones((6, 9)), "nothing": empty, "b": jnp.ones(9)}
    for tx in (ldadamw(1e-2, rank=2), ldadam(1e-2, rank=2)):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    alone = {"w": params["w"], "nothing": empty}
    tx = scale_by_ldadam(2)
    updates, _ = jax.jit(tx.update)(alone, tx.init(alone))
    assert jax.tree.structure(updates) == jax.tree.structure(alone)


@pytest.mark.parametrize("params", [{}, None, (), {"b": None}], ids=repr)
def test_no_leaf_at_all(params):
    tx = ldadamw(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates == params


def test_single_array_as_params():
    matrix = jnp.ones((6, 9))
    tx = ldadamw(1e-2, rank=2)
    updates, _ = jax.jit(tx.update)(matrix, tx.init(matrix), matrix)
    assert updates.shape == matrix.shape


def test_bare_transformation_needs_no_params():
    tx = scale_by_ldadam(2)
    grads = {"w": jnp.ones((6, 9))}
    state = tx.init(grads)
    updates, _ = tx.update(grads, state)
    assert float(jnp.vdot(updates["w"], grads["w"])) > 0  # a direction to descend


def test_extra_arguments_are_accepted():
    params = {"w": jnp.ones((6, 9))}
    for tx in (scale_by_ldadam(2), ldadamw(1e-2, rank=2)):
        tx.update(params, tx.init(params), params, value=1.0, unknown="x")


@pytest.mark.parametrize("error_dtype", [None, "bfloat16"])
def test_abstract_init(error_dtype):
    """`init` on shapes gives the shapes that it gives on values."""
    params = params_like()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tx = ldadamw(1e-2, **SETTINGS, error_dtype=error_dtype)
    expected = jax.eval_shape(tx.init, params)
    for abstract in (jax.eval_shape(tx.init, shapes), tx.init(shapes)):
        like = lambda leaf: (leaf.shape, leaf.dtype)
        assert jax.tree.structure(abstract) == jax.tree.structure(expected)
        assert [like(leaf) for leaf in jax.tree.leaves(abstract)] == [
            like(leaf) for leaf in jax.tree.leaves(expected)
        ]


# Dtypes


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float16", "float32"),
    ],
)
def test_dtype_mixes(param_dtype, grad_dtype):
    """Updates in the parameter's dtype, state in float32, the step near float32's."""
    params = params_like(param_dtype)
    grads = [
        jax.tree.map(lambda g: g.astype(grad_dtype), g)
        for g in gradients_like(params_like())
    ]
    tx = ldadamw(1e-2, rank=2)
    update = jax.jit(tx.update)
    state, reference_state = tx.init(params), tx.init(params_like())
    for g in grads:
        updates, state = update(g, state, params)
        as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), g)
        expected, reference_state = update(as_float32, reference_state, params_like())
        for leaf in jax.tree.leaves(updates):
            assert leaf.dtype == param_dtype
    for leaf in jax.tree.leaves(ldadam_state(state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    eps = float(jnp.finfo(param_dtype).eps)
    kernel = lambda tree: np.asarray(tree["dense"]["kernel"], np.float64)
    np.testing.assert_allclose(kernel(updates), kernel(expected), atol=0.01 * 4 * eps)


def test_float64_leaves_are_computed_in_float64(x64):
    params = {"w": jnp.ones((6, 9), jnp.float64), "v": jnp.ones((6, 9), jnp.float32)}
    tx = ldadamw(1e-2, rank=2)
    (updates, state) = jax.jit(tx.update)(params, tx.init(params), params)
    state = ldadam_state(state)
    for name, dtype in (("w", jnp.float64), ("v", jnp.float32)):
        assert updates[name].dtype == dtype
        for tree in (state.mu, state.nu, state.projector, state.error):
            assert tree[name].dtype == dtype


def test_storage_dtypes():
    params = {"w": jnp.ones((6, 9))}
    tx = scale_by_ldadam(
        2,
        mu_dtype="bfloat16",
        nu_dtype=jnp.float32,
        projector_dtype=jnp.bfloat16,
        error_dtype="bfloat16",
    )
    updates, state = tx.update(params, tx.init(params))
    dtypes = [getattr(state, f)["w"].dtype for f in ("mu", "nu", "projector", "error")]
    assert dtypes == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert updates["w"].dtype == jnp.float32


# Compilation


def compiled_step(params, donate=(), **options):
    tx = ldadamw(1e-2, **{**SETTINGS, **options})

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=donate).lower(params, state, params).compile()


_DECOMPOSITIONS = re.compile(r"(?i)gesdd|gesvd|syevd|eigh|\bsvd|geev|polar")


def test_compiled_step_holds_no_svd_by_default():
    assert not _DECOMPOSITIONS.search(compiled_step(params_like()).as_text())


@pytest.mark.parametrize("options", [{"subspace": "svd"}, {"subspace_init": "svd"}])
def test_compiled_step_holds_an_svd_where_asked(options):
    """The pattern above does find one."""
    assert _DECOMPOSITIONS.search(compiled_step(params_like(), **options).as_text())


def test_no_transposed_copy_of_a_matrix():
    """Either orientation is a matter of which axis a product contracts."""
    for shape in ((48, 80), (80, 48)):
        text = compiled_step({"w": jnp.ones(shape)}).as_text()
        turned = r"\w+\[{},{}\][^=\n]*\btranspose\(".format(*reversed(shape))
        assert not re.search(turned, text)


def test_donation_aliases_everything():
    """Every buffer of parameters and state is reused; nothing is aliased twice."""
    params = params_like()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = compiled_step(params, donate=(0, 1))
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased == bytes_of(params) + bytes_of(state)


def test_state_does_not_alias_the_parameters():
    """Donating both at once is an error where two of them share a buffer."""
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients_like(params):
        params, state = step(params, state, grads)
    assert np.isfinite(params["dense"]["kernel"]).all()


def test_scan_over_steps():
    params = params_like()
    grads = gradients_like(params)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    tx = ldadamw(1e-2, **SETTINGS)

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    looped, _ = last(run(tx, params, grads))
    assert_trees_close(scanned, looped, rtol=1e-4, atol=1e-5)


def test_vmap_over_models():
    """An ensemble: the optimizer itself mapped over a leading axis."""
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params_like())
    grads = jax.tree.map(
        lambda g: jnp.stack([g, -3 * g]), gradients_like(params_like())[0]
    )
    tx = ldadamw(1e-2, **SETTINGS)
    state = jax.vmap(tx.init)(params)
    updates, _ = jax.jit(jax.vmap(tx.update))(grads, state, params)
    alone = jax.tree.map(lambda x: x[1], (grads, state, params))
    expected, _ = tx.update(*alone)
    assert_trees_close(jax.tree.map(lambda u: u[1], updates), expected, atol=1e-5)
