"""Equinox: LDAdam takes the arrays that ``eqx.partition`` leaves of a model.

python -m examples.frameworks.equinox_mlp
"""

import equinox as eqx
import jax

from examples.frameworks import common


def main() -> None:
    x, y = common.regression()
    model = eqx.nn.MLP(16, 16, 64, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(params):
        model = eqx.combine(params, static)
        return common.mean_square(jax.vmap(model)(x), y)

    losses, params, state = common.train_sharded(params, loss_of)
    common.check(losses, params, state, on_adamw=())
    params, state = common.save_and_restore((params, state))
    eqx.combine(params, static)


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
