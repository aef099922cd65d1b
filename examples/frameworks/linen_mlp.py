"""Flax Linen: ``nn.get_partition_spec`` reads the specs of a whole ``TrainState``.

    python -m examples.frameworks.linen_mlp

The model and the loop are those of ``examples/sharded_linen.py``.
"""

from examples import sharded_linen
from examples.frameworks import common


def main() -> None:
    losses, state = sharded_linen.train(common.fsdp_mesh(), steps=60)
    common.check(losses, state.params, state.opt_state, on_adamw=())
    common.save_and_restore((state.params, state.opt_state))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
