"""Haiku: parameters are a plain tree, which ``state_specs`` lays out on a mesh.

python -m examples.frameworks.haiku_mlp
"""

import haiku as hk
import jax

from examples.frameworks import common


def forward(x: jax.Array) -> jax.Array:
    x = jax.nn.gelu(hk.Linear(64)(x))
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    return hk.Linear(16)(x)


def main() -> None:
    x, y = common.regression()
    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), x)
    loss_of = lambda params: common.mean_square(model.apply(params, x), y)
    losses, params, state = common.train_sharded(params, loss_of)
    common.check(losses, params, state, on_adamw=())
    common.save_and_restore((params, state))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
