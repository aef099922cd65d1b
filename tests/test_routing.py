"""Which leaf is compressed, and that the others take AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    assert_trees_close,
    gradients_like,
    last,
    ldadam_state,
    params_like,
    run,
)

from ldadam_optax import (
    LDAdamDimensionNumbers,
    dimension_numbers_by_name,
    ldadamw,
)


def test_default_routing():
    """2-D leaves with both sides above the rank, save embeddings; AdamW elsewhere."""
    params = params_like()
    state = ldadam_state(ldadamw(1e-2, rank=6).init(params))
    compressed = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.mu)
    }
    assert compressed == {"['dense']['kernel']"}  # out has a side of 6


TABLES = (
    "embedder/input_embedding",  # Tunix, gemma
    "token_embedder/embedding",  # MaxText
    "Embed_0/embedding",  # Flax
    "transformer/wte/weight",  # Levanter, Equinox
    "embeddings/token_embeddings/weight",
    "model/embed_tokens/kernel",  # EasyDeL, Hugging Face
    "transformer/wpe",
    "gpt/~/embed/embeddings",  # Haiku
    "decoder/emb/token_emb/weight",  # axlearn
    "lm_head/w",  # Tunix
    "lm_head/kernel",
    "decoder/logits_dense/kernel",  # MaxText
)
MATRICES = (
    "layers/0/mlp/gate_proj/kernel",
    "embed_proj/kernel",
    "head/kernel",
    "attention/out/kernel",
    "linear/w",
)


@pytest.mark.parametrize("boxed", [False, True])
def test_embeddings_and_heads_by_the_names_that_they_have(boxed):
    matrix = jnp.ones((24, 32))
    params = dict.fromkeys((*TABLES, *MATRICES), matrix)
    if boxed:
        with nnx.use_eager_sharding(False):
            params = nnx.State({k: nnx.Param(v) for k, v in params.items()})
    state = ldadam_state(ldadamw(1e-2, rank=8).init(params))
    compressed = {
        path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(state.mu)
    }
    assert compressed == set(MATRICES)


def test_nothing_to_compress_is_told_once():
    params = {"w": jnp.ones((4, 8, 2)), "lm_head": jnp.ones((8, 50))}
    with pytest.warns(UserWarning, match="'lm_head', 'w' have two axes") as told:
        ldadamw(1e-2, rank=2).init(params)
    assert len(told) == 1
    ldadamw(1e-2, rank=2).init({"bias": jnp.ones(8)})  # Nothing could be.
    ldadamw(1e-2, weight_dimension_numbers={"w": None, "lm_head": None}).init(params)


def test_dimension_numbers_by_name():
    """First match wins, with a rank for each pattern."""
    attention = LDAdamDimensionNumbers(0, (1, 2), rank=3)
    specs = dimension_numbers_by_name(
        [
            ("embed|head", None),
            ("q_proj/w$", attention),
            ("w$", LDAdamDimensionNumbers()),
        ]
    )
    params = {
        "embed": {"w": jnp.ones((20, 8))},
        "layers": [{"q_proj": {"w": jnp.ones((8, 2, 4))}, "scale": jnp.ones(8)}],
        "up": {"w": jnp.ones((8, 12))},
    }
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=specs)
    state = tx.init(params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(ldadam_state(state).mu)]
    assert shapes == [(3, 8), (2, 12)]
    _, state = tx.update(params, state, params)


def test_leaves_without_a_rule_and_rules_without_a_leaf_are_told_once():
    spec = LDAdamDimensionNumbers()
    specs = dimension_numbers_by_name([("kernel", spec), ("kernal", spec)])
    params = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"w": jnp.ones((4, 6))}}
    with pytest.warns(UserWarning, match="dimension_numbers_by_name") as told:
        found = specs(params), specs(params)
    assert len(told) == 1
    assert "no rule matches 'b/w', which take AdamW" in str(told[0].message)
    assert "no leaf is first matched by 'kernal'" in str(told[0].message)
    assert found[1] == {"a": {"kernel": spec}, "b": {"w": None}}


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ([("kernel", 8)], TypeError, "A rule must be a pair"),
        ([("kernel",)], TypeError, "A rule must be a pair"),
        ([("(kernel", None)], ValueError, "not a regular expression"),
    ],
)
def test_bad_rules(rules, error, match):
    with pytest.raises(error, match=match):
        dimension_numbers_by_name(rules)


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
