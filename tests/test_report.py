"""The report's bytes are the bytes of the state that is really allocated."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import ldadam_state, params_like

from ldadam_optax import LDAdamDimensionNumbers, ldadamw, memory_report

RANK = 4
PEERS = {
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2),
}


def allocated(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def mixed_params():
    """A last axis that blocks of 32 do not divide, a stack, wide enough to factor."""
    return {
        "wide": jnp.zeros((20, 45)),
        "stack": jnp.zeros((3, 130, 128)),
        "heads": jnp.zeros((24, 4, 3), jnp.bfloat16),
        "embedding": jnp.zeros((30, 20)),
        "bias": jnp.zeros(45, jnp.bfloat16),
    }


SPECS = {
    "wide": LDAdamDimensionNumbers(),
    "stack": LDAdamDimensionNumbers(1, 2, rank=6),
    "heads": LDAdamDimensionNumbers(0, (1, 2)),
    "embedding": None,
    "bias": None,
}

OPTIONS = {
    "defaults": {},
    "bfloat16 error": {"error_dtype": "bfloat16"},
    "int8 error": {"error_dtype": "int8"},
    "int4 error": {"error_dtype": "int4"},
    "no error": {"residual": "none"},
    "recovery": {"residual": "recovery"},
    "narrow": {
        "mu_dtype": "bfloat16",
        "nu_dtype": "bfloat16",
        "projector_dtype": "bfloat16",
    },
    "8 bits": {"mu_dtype": "int8", "nu_dtype": "int8"},
    "long side": {"side": "long"},
    "the rest": {"b1": 0.9, "eps": 1e-6, "weight_decay": 0.1, "mask": lambda p: p},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_total_is_what_is_allocated(options):
    params = mixed_params()
    report = memory_report(params, RANK, **options, weight_dimension_numbers=SPECS)
    options = {**options, "mask": None}
    tx = ldadamw(1e-2, RANK, **options, weight_dimension_numbers=SPECS)
    state = tx.init(params)
    assert report.total.state == allocated(state)
    assert report.total.parameter == allocated(params)
    ours = ldadam_state(state)
    rows = [row for row in report.rows if row.route == "LDAdam"]
    for field in ("projector", "residual_norm", "mu", "nu"):
        in_rows = sum(getattr(row, field) for row in rows)
        scales = getattr(ours, f"{field}_scale", None)
        assert in_rows == allocated((getattr(ours, field), scales)), field
    assert report.total.error == allocated((ours.error, ours.error_scale))


@pytest.mark.parametrize("peer", PEERS)
def test_peers_are_what_they_allocate(peer):
    params = mixed_params()
    report = memory_report(params, RANK, weight_dimension_numbers=SPECS)
    assert getattr(report.total, peer) == allocated(PEERS[peer].init(params))


def test_galore_is_what_it_allocates():
    """On the same matrices; a stack has to be handed to it layer by layer."""
    params = mixed_params()
    params["stack"] = list(params["stack"])
    params["heads"] = params["heads"].reshape(24, 12)
    groups = {
        "rank 4": optax.contrib.galore(1e-2, rank=4),
        "rank 6": optax.contrib.galore(1e-2, rank=6),
        "adamw": optax.adamw(1e-2),
    }
    labels = dict.fromkeys(params, "rank 4") | {"stack": "rank 6"}
    labels |= {"embedding": "adamw", "bias": "adamw"}
    state = optax.partition(groups, labels).init(params)
    report = memory_report(mixed_params(), RANK, weight_dimension_numbers=SPECS)
    second_group = 8  # the step counts of one more GaLore
    assert report.total.galore == allocated(state) - second_group


def test_rows_add_up():
    report = memory_report(mixed_params(), RANK, weight_dimension_numbers=SPECS)
    assert [row.path for row in report.rows] == sorted(SPECS)
    sums = [
        sum(getattr(row, field.name) for row in report.rows)
        for field in dataclasses.fields(report.total)
        if field.name in ("parameter", "mu", "nu", "projector", "error")
    ]
    total = report.total
    assert sums == [
        total.parameter,
        total.mu,
        total.nu,
        total.projector,
        total.error,
    ]
    assert total.state == sum(row.state for row in report.rows) + total.counters
    assert total.counters == 4 + 4 + 4 + 1  # two counts, c and form


def test_views_and_routes():
    report = memory_report(mixed_params(), RANK, weight_dimension_numbers=SPECS)
    rows = {row.path: (row.route, row.matrix, row.rank) for row in report.rows}
    assert rows == {
        "bias": ("AdamW", None, None),
        "embedding": ("AdamW", None, None),
        "heads": ("LDAdam", (1, 12, 24), 4),
        "stack": ("LDAdam", (3, 128, 130), 6),
        "wide": ("LDAdam", (1, 20, 45), 4),
    }


def test_routing_without_specs_is_that_of_the_optimizer():
    report = memory_report(params_like(), RANK)
    routes = {row.path: row.route for row in report.rows}
    assert routes == {
        "dense/bias": "AdamW",
        "dense/kernel": "LDAdam",
        "embed/embedding": "AdamW",
        "out/kernel": "LDAdam",
    }


def box(kind, array):
    if kind == "Partitioned":
        return nn.Partitioned(array, names=("a", "b"))
    if kind == "Param":
        return nnx.Param(array)
    return array


@pytest.mark.parametrize("kind", ["array", "abstract", "Partitioned", "Param"])
def test_trees_that_users_bring(kind):
    kernel = jnp.zeros((20, 45))
    if kind == "abstract":
        kernel = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    tree = {"w": box(kind, kernel), "none": None, "masked": optax.MaskedNode(), "d": {}}
    report = memory_report(tree, RANK)
    (row,) = report.rows
    assert (row.route, row.shape, row.parameter) == ("LDAdam", (20, 45), 3600)
    assert report.total == memory_report({"w": kernel}, RANK).total


def test_nothing_is_allocated():
    """Parameters larger than any memory: 64 PiB."""
    huge = {"w": jax.ShapeDtypeStruct((2**27, 2**27), jnp.float32)}
    report = memory_report(huge, 128, error_dtype="int4")
    assert report.total.error == 2**54 * 9 // 16
    assert "9216.00 TiB" in str(report)


def test_table():
    report = memory_report(mixed_params(), RANK, weight_dimension_numbers=SPECS)
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 4
    assert len({len(line) for line in lines}) == 1
    assert "residual" not in lines[0]
    stack = next(line for line in lines if line.startswith("stack"))
    assert "3x128x130" in stack
    assert "195.00 KiB" in stack  # the error: 3 x 130 x 128 float32
    recovering = memory_report(
        mixed_params(),
        RANK,
        residual="recovery",
        weight_dimension_numbers=SPECS,
    )
    assert "residual" in str(recovering).splitlines()[0]


def test_bad_options_are_those_of_the_optimizer():
    with pytest.raises(ValueError, match="rank must be >= 1, got rank=0"):
        memory_report(mixed_params(), 0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        memory_report(mixed_params(), ranks=3)
