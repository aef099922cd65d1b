"""A sharded NNX model: names on the kernels, and the state follows by itself.

    python -m examples.sharded_nnx

Eight simulated CPU devices, about 20 seconds. It prints the loss, and how each array
of the optimizer lies on the mesh.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from ldadam_optax import ldadamw


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 64, rngs=rngs, **sharded("fsdp", "tensor"))
        self.down = nnx.Linear(64, 16, rngs=rngs, **sharded("tensor", "fsdp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


def sharded(rows: str, columns: str) -> dict:
    """Initializers of a layer whose kernel and bias carry names of mesh axes."""
    init = nnx.initializers
    return {
        "kernel_init": nnx.with_partitioning(init.lecun_normal(), (rows, columns)),
        "bias_init": nnx.with_partitioning(init.zeros_init(), (columns,)),
    }


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)


def train(mesh: jax.sharding.Mesh, steps: int = 20, **options):
    """Return the losses, the model and the optimizer."""
    x, y = jax.random.normal(jax.random.key(1), (2, 32, 16))
    with jax.set_mesh(mesh):
        model = MLP(nnx.Rngs(0))
        tx = ldadamw(1e-2, rank=4, **options)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model: MLP, optimizer: nnx.Optimizer) -> jax.Array:
            loss_of = lambda model: jnp.mean((model(x) - y) ** 2)
            loss, grads = nnx.value_and_grad(loss_of)(model)
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(steps)]
        return losses, model, optimizer


def main() -> None:
    losses, _, optimizer = train(make_mesh())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    state = nnx.to_pure_dict(nnx.state(optimizer.opt_state))
    for path, array in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"{name}  {array.shape}  {array.sharding.spec}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # few cores, 8 devices
    main()
