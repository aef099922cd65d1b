"""Kauldron: ``FSDPSharding`` for the parameters and for the optimizer's state.

    python -m examples.frameworks.kauldron_fsdp

Its trainer needs TensorFlow for data; here the step is our own, with the constraints
that Kauldron's train step puts on its state. In a configuration:

    cfg.sharding = kd.sharding.ShardingStrategy(
        params=kd.sharding.FSDPSharding(), opt_state=kd.sharding.FSDPSharding()
    )
    cfg.optimizer = ldadamw(1e-3, rank=128)
"""

from typing import Any

import flax.linen as nn
import jax
import optax
from kauldron.utils.sharding_utils import sharding

from examples.frameworks import common
from ldadam_optax import ldadamw


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(jax.nn.gelu(nn.Dense(64)(x)))
        return nn.Dense(16)(x)


def main() -> None:
    x, y = common.regression()
    model: Any = MLP()
    tx = ldadamw(1e-2, rank=8)
    rule = sharding.FSDPSharding(min_size_to_shard_mb=0)
    strategy = sharding.ShardingStrategy(params=rule, opt_state=rule)
    constrain = lambda params, state: (
        sharding.with_sharding_constraint(params, strategy.params),
        sharding.with_sharding_constraint(state, strategy.opt_state),
    )

    @jax.jit
    def init(key):
        params = model.init(key, x)["params"]
        return constrain(params, tx.init(params))

    @jax.jit
    def step(params, state):
        loss_of = lambda params: common.mean_square(
            model.apply({"params": params}, x), y
        )
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return *constrain(optax.apply_updates(params, updates), state), loss

    (params, state), losses = init(jax.random.key(0)), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    common.check(losses, params, state, on_adamw=())
    common.save_and_restore((params, state))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
