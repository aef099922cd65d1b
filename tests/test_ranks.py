"""Ranks from spectra: the best that a budget buys, never more, usable as they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ldadam_state, random_like, with_spectrum
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldadam_optax import (
    LDAdamDimensionNumbers,
    ldadamw,
    memory_report,
    propose_ranks,
)

GENEROUS = 10**9


def ranks_of(specs) -> dict[str, int | None]:
    return {name: spec and spec.rank for name, spec in specs.items()}


def of_spectra(spectra, m=6, n=9):
    """One gradient with these singular values, by leaf."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(with_spectrum(rng, m, n, values), jnp.float32)
        for name, values in spectra.items()
    }


def test_a_gradient_gets_its_rank_and_no_more():
    grads = of_spectra({"two": [1, 1], "five": [5, 4, 3, 2, 1], "all": [2] * 6})
    specs = propose_ranks([grads], GENEROUS, multiple_of=1)
    assert ranks_of(specs) == {"two": 2, "five": 5, "all": 6}


def test_several_gradients_get_the_rank_of_all_their_columns():
    rng = np.random.default_rng(0)
    columns = np.linalg.qr(rng.normal(size=(6, 4)))[0]
    first, same, other = (
        {"w": jnp.asarray(part @ rng.normal(size=(2, 9)), jnp.float32)}
        for part in (columns[:, :2], columns[:, :2], columns[:, 2:])
    )
    ranks = lambda *gradients: propose_ranks(list(gradients), GENEROUS, multiple_of=1)
    assert ranks(first)["w"].rank == ranks(first, same)["w"].rank == 2
    assert ranks(first, other)["w"].rank == 4


SHAPES = {"wide": (4, 30), "tall": (9, 5), "square": (4, 4)}


@pytest.fixture(scope="module")
def grads():
    """Three gradients of uneven spectra."""
    rng = np.random.default_rng(1)
    spectra = {"wide": [5, 4, 3, 2], "tall": [3, 3, 2, 2, 1], "square": [4, 3, 1, 0.1]}
    return {
        name: jnp.asarray(with_spectrum(rng, *SHAPES[name], values), jnp.float32)
        for name, values in spectra.items()
    }


@pytest.fixture(scope="module")
def plan(grads):
    """Bytes and worth of each choice of ranks, in plain NumPy."""
    squares = {
        k: np.linalg.svd(np.asarray(g, np.float64))[1] ** 2 for k, g in grads.items()
    }

    def bytes_and_worth(ranks: dict[str, int]) -> tuple[int, float]:
        size, worth = 0, 0.0
        for name, r in ranks.items():
            m, n = sorted(SHAPES[name])
            size += 4 * (m * n + 2 * r * n + m * r)
            worth += m * n * squares[name][:r].sum() / squares[name].sum()
        return size, worth

    sides = [range(1, min(shape) + 1) for shape in SHAPES.values()]
    choices = [
        dict(zip(SHAPES, ranks, strict=True)) for ranks in itertools.product(*sides)
    ]
    return bytes_and_worth, [bytes_and_worth(choice) for choice in choices]


@pytest.mark.parametrize("budget", [1300, 1500, 1700, 2000])
def test_no_other_choice_of_as_many_bytes_is_worth_more(grads, plan, budget):
    bytes_and_worth, choices = plan
    specs = propose_ranks([grads], budget, multiple_of=1)
    size, worth = bytes_and_worth(ranks_of(specs))
    assert size <= budget
    assert worth >= max(w for s, w in choices if s <= size) - 1e-6


def test_ranks_only_grow_with_the_budget_which_they_keep(grads):
    least = memory_report(
        grads, weight_dimension_numbers=LDAdamDimensionNumbers(rank=1)
    )
    before = dict.fromkeys(grads, 1)
    for budget in range(least.total.state, least.total.state + 1200, 150):
        specs = propose_ranks([grads], budget, multiple_of=1)
        report = memory_report(grads, weight_dimension_numbers=specs)
        assert report.total.state <= budget
        ranks = ranks_of(specs)
        assert all(ranks[name] >= rank for name, rank in before.items())
        before = ranks
    assert sum(before.values()) > 6


def test_the_size_of_a_gradient_does_not_count(grads):
    tiny = {**grads, "wide": 1e-25 * grads["wide"], "tall": 1e25 * grads["tall"]}
    of = lambda tree: ranks_of(propose_ranks([tree], 1700, multiple_of=1))
    assert of(tiny) == of(grads)


@pytest.mark.parametrize(
    "options",
    [
        {"error_dtype": "int4", "mu_dtype": "int8", "nu_dtype": "int8"},
        {"residual": "recovery", "side": "long", "projector_dtype": "bfloat16"},
    ],
    ids=["int8 moments", "recovery"],
)
def test_stacks_and_leaves_of_adamw_count_as_memory_report_counts_them(options):
    spec = LDAdamDimensionNumbers(-2, -1)
    shapes = {"stack": (3, 32, 48), "w": (40, 64), "fixed": (16, 24), "bias": (64,)}
    grads = random_like({k: jnp.zeros(shape) for k, shape in shapes.items()}, 0)
    given = {"stack": spec, "w": spec, "fixed": spec._replace(rank=5), "bias": None}
    at_one_rank = memory_report(grads, 16, weight_dimension_numbers=given, **options)
    budget = at_one_rank.total.state
    specs = propose_ranks([grads], budget, weight_dimension_numbers=given, **options)
    told = {**options, "weight_dimension_numbers": specs}
    report = memory_report(grads, **told)
    # Less than the dearest increment of 8 is left.
    assert 0.9 * budget < report.total.state <= budget
    assert specs["fixed"] == given["fixed"]
    assert specs["bias"] is None
    assert all(specs[name].rank % 8 == 0 for name in ("stack", "w"))
    tx = ldadamw(1e-2, **told)
    _, state = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, grads), grads)
    for name in ("stack", "w", "fixed"):
        rank = ldadam_state(state).projector[name].shape[-1]
        assert rank == specs[name].rank


def test_leaves_are_routed_as_ldadamw_routes_them_and_split_ones_are_read(grads):
    grads = {"w": grads["tall"], "embedding": grads["tall"], "bias": jnp.ones(8)}
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    placed = jax.device_put(grads, NamedSharding(mesh, PartitionSpec("x")))
    found = [propose_ranks([g], GENEROUS, multiple_of=1) for g in (grads, placed)]
    assert ranks_of(found[0]) == {"w": 5, "embedding": None, "bias": None}
    assert found[1] == found[0]


W = jnp.ones((4, 6))


@pytest.mark.parametrize(
    ("gradients", "options", "told"),
    [
        ({"w": W}, {}, r"must be a list of trees.*pass \[grads\]"),
        ([], {}, "at least one gradient"),
        ([{"w": W}, {"v": W}], {}, "gradient 1 and the first differ in 'v'"),
        ([{"w": W}, {"w": W.T}], {}, "gradient 1 and the first differ in 'w'"),
        ([{"w": W * jnp.nan}], {}, "gradient of 'w' is not finite"),
        (
            [{"w": W}],
            {"budget_bytes": 100},
            "budget_bytes=100 is less than the 173 bytes",
        ),
        ([{"w": W}], {"multiple_of": 0}, "multiple_of must be >= 1"),
        ([{"w": W}], {"multiple_of": 0.5}, "multiple_of must be an int"),
        ([{"w": W}], {"error_dtype": "int3"}, "error_dtype must be"),
    ],
)
def test_what_cannot_be_ranked_is_refused(gradients, options, told):
    options = {"budget_bytes": GENEROUS, "multiple_of": 1, **options}
    with pytest.raises((TypeError, ValueError), match=told):
        propose_ranks(gradients, **options)
