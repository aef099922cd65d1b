"""Flax NNX: names on the parameters, and the state follows by itself.

    python -m examples.frameworks.nnx_mlp

The model and the loop are those of ``examples/sharded_nnx.py``.
"""

from flax import nnx

from examples import sharded_nnx
from examples.frameworks import common


def main() -> None:
    losses, model, optimizer = sharded_nnx.train(common.fsdp_mesh(), steps=60)
    params = nnx.state(model, nnx.Param)
    common.check(losses, params, optimizer.opt_state, on_adamw=())
    common.save_and_restore((params, nnx.state(optimizer)))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
