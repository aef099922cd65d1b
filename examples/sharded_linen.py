"""A sharded Linen model: ``nn.get_partition_spec`` reads the whole ``TrainState``.

    python -m examples.sharded_linen

Eight simulated CPU devices, about 20 seconds. It prints the loss, and how each array
of the optimizer lies on the mesh.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldadam_optax import ldadamw


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(64, kernel_init=sharded("fsdp", "tensor"))(x)
        return nn.Dense(16, kernel_init=sharded("tensor", "fsdp"))(jax.nn.gelu(x))


def sharded(rows: str, columns: str):
    """An initializer whose kernel carries names of mesh axes."""
    return nn.with_partitioning(nn.initializers.lecun_normal(), (rows, columns))


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)


def train(mesh: jax.sharding.Mesh, steps: int = 20, **options):
    """Return the losses and the last ``TrainState``."""
    x, y = jax.random.normal(jax.random.key(1), (2, 32, 16))
    model, tx = MLP(), ldadamw(1e-2, rank=4, **options)

    def create(key: jax.Array) -> TrainState:
        params = model.init(key, x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss_of(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    with jax.set_mesh(mesh):
        specs = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
        step = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
        losses = []
        for _ in range(steps):
            state, loss = step(state)
            losses.append(float(loss))
        return losses, state


def main() -> None:
    losses, state = train(make_mesh())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    for path, array in jax.tree.leaves_with_path(state.opt_state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"{name}  {array.shape}  {array.sharding.spec}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # few cores, 8 devices
    main()
