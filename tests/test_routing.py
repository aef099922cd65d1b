"""Which leaf is compressed, and that the others take AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_close,
    gradients_like,
    last,
    ldadam_state,
    params_like,
    run,
)

from ldadam_optax import LDAdamDimensionNumbers, ldadamw


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
