"""optax's own tests of contributed optimizers, all of them, run on ours.

The wheel ships ``optax/contrib/_common_test.py`` and ``optax/_src/sharding_test.py``,
whose lists of optimizers feed test classes as these are defined. Each file is
executed here up to its class, the lists are exchanged, and the rest is executed.
"""

import ast
import importlib.util
import inspect
import pathlib
import warnings

import jax
import optax
import pytest
from absl.testing import parameterized

import ldadam_optax
from ldadam_optax import LDAdamDimensionNumbers, ldadam, ldadamw

# The targets are vectors and 2 x 2 matrices: rank 1 is the largest at which the
# default routing compresses the latter.


def by_hand(params):
    """Compress every 2-D leaf: a rank above its sides is clipped."""
    as_matrix = lambda p: LDAdamDimensionNumbers() if p.ndim == 2 else None
    return jax.tree.map(as_matrix, params)


def case(opt_name, wrapper_name=None, wrapper_kwargs=None, **opt_kwargs):
    return {
        "opt_name": opt_name,
        "opt_kwargs": opt_kwargs,
        "wrapper_name": wrapper_name,
        "wrapper_kwargs": wrapper_kwargs,
    }


MAIN = (
    case("ldadamw", learning_rate=1e-2, rank=1),
    case("ldadamw", learning_rate=1e-2),
    case("ldadam", learning_rate=1e-2, rank=1),
    case("ldadamw", learning_rate=1e-2, rank=1, weight_decay=1e-4, side="right"),
    case("ldadam", learning_rate=1e-2, rank=1, residual="none"),
    case("ldadamw", "schedule_free", {"learning_rate": 1e-2}, learning_rate=1e-2, b1=0),
)
ALL = (
    *MAIN,
    case("ldadamw", learning_rate=1e-2, weight_dimension_numbers=by_hand),
    case("ldadamw", "mechanize", {"weight_decay": 0.0}, learning_rate=1.0, rank=1),
)


def execute(module_name: str, test_class: str, exchange) -> type:
    """The class of a test file, defined after ``exchange(namespace)``."""
    path = pathlib.Path(importlib.util.find_spec(module_name).origin)
    body = ast.parse(path.read_text()).body
    (at,) = [i for i, node in enumerate(body) if getattr(node, "name", 0) == test_class]
    namespace = {"__name__": __name__, "__file__": str(path)}
    run = lambda part: exec(compile(ast.Module(part, []), path, "exec"), namespace)
    with warnings.catch_warnings():
        # optax's own lists of optimizers warn of what optax is about to change.
        warnings.simplefilter("ignore")
        run(body[:at])
    exchange(namespace)
    run(body[at:])
    return namespace[test_class]


def exchange_contrib(namespace):
    namespace["_MAIN_OPTIMIZERS_UNDER_TEST"] = MAIN
    namespace["_ALL_OPTIMIZERS_UNDER_TEST"] = ALL
    namespace["_get_opt_factory"] = lambda name: getattr(ldadam_optax, name)


class _JaxWithComparableVersion:
    """jax, whose version optax compares as a string: "0.10.2" < "0.7.2"."""

    __version__ = "1.0"

    def __getattr__(self, name):
        return getattr(jax, name)


def exchange_sharding(namespace):
    namespace["jax"] = _JaxWithComparableVersion()
    stack = LDAdamDimensionNumbers(1, 2)
    namespace["OPTIMIZERS"].clear()
    namespace["OPTIMIZERS"].update(
        ldadam=ldadam(1.0),
        ldadamw=ldadamw(1.0),
        ldadamw_matrices=ldadamw(1.0, rank=2, weight_dimension_numbers=stack),
    )


# optax's own objectives broadcast freely.
free_ranks = pytest.mark.usefixtures("any_rank_promotion")
ContribTest = free_ranks(
    execute("optax.contrib._common_test", "ContribTest", exchange_contrib)
)
ShardingTest = free_ranks(
    execute("optax._src.sharding_test", "ShardingTest", exchange_sharding)
)
# Leaves no larger than the default rank: ldadamw says that AdamW takes them.
small_leaves = pytest.mark.filterwarnings("ignore:ldadamw found no leaf")
ContribTest, ShardingTest = small_leaves(ContribTest), small_leaves(ShardingTest)


# Its last test is of `optax.microbatching` alone, with no optimizer in it.
for _name in [name for name in vars(ShardingTest) if name.startswith("test_micro")]:
    delattr(ShardingTest, _name)


def test_the_lists_were_exchanged():
    for suite in (ContribTest, ShardingTest):
        assert issubclass(suite, parameterized.TestCase)
    count = lambda suite, start: sum(name.startswith(start) for name in vars(suite))
    per_target, extra_arguments = 4 * len(ALL), 2 * len(ALL)
    assert count(ContribTest, "test_optimizers") >= per_target + extra_arguments
    assert count(ContribTest, "test_state_shape_dtype_shard_stability") == 4 * len(ALL)
    assert count(ShardingTest, "test_init") == 3


@pytest.mark.parametrize("factory", [ldadam, ldadamw])
def test_learning_rate_is_annotated_as_optax_asks(factory):
    """Without this, optax's schedule test skips itself in silence."""
    annotation = inspect.signature(factory).parameters["learning_rate"].annotation
    assert annotation is optax.ScalarOrSchedule
