"""The scripts for frameworks that the test environment has; .ci/frameworks has all."""

import importlib

import jax.numpy as jnp
import pytest

from examples.frameworks import common
from ldadam_optax import ldadamw

pytestmark = pytest.mark.usefixtures("any_rank_promotion")


@pytest.mark.parametrize("script", ["nnx_mlp", "linen_mlp", "haiku_mlp", "equinox_mlp"])
def test_script(script):
    importlib.import_module(f"examples.frameworks.{script}").main()


def test_the_check_can_fail():
    params = {"w": jnp.ones((16, 64)), "embedding": jnp.ones((64, 16))}
    state = ldadamw(1e-2, rank=4).init(params)
    common.check([1.0, 0.5], params, state, on_adamw=("embedding",))
    with pytest.raises(AssertionError, match="the loss went"):
        common.check([1.0, 0.9], params, state, on_adamw=("embedding",))
    with pytest.raises(AssertionError, match="LDAdam took"):
        common.check([1.0, 0.5], params, state, on_adamw=())
    _, split, _ = common.train_sharded(params, lambda p: jnp.sum(p["w"] ** 2), steps=1)
    with pytest.raises(AssertionError, match="1 parts, the parameter has 8"):
        common.check([1.0, 0.5], split, state, on_adamw=("embedding",))
