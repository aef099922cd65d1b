"""Programs that are compiled and, for a chip that is not here, never run.

`libtpu` compiles for TPU targets on any x86 Linux machine. It asks for its place in
a cluster first; the variables below answer.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ldadam_optax
from examples.flax_lm.config import Config
from examples.flax_lm.data import Batch
from examples.flax_lm.model import init_params
from examples.flax_lm.optimizers import make_optimizer
from examples.flax_lm.presets import with_variant
from examples.flax_lm.program import TrainState, make_train_step
from examples.flax_lm.sharding import AXES, param_specs, shardings

_CLUSTER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held: others may compile as well
}


# One NVIDIA H100: what the compiler asks of a device, from NVIDIA's data sheet.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 84929347584
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
"""


GPU_FLAGS = {"xla_gpu_autotune_level": 0}  # autotuning would run on the device


class Compiled(NamedTuple):
    """A program, with the time that tracing, lowering and compiling it took."""

    program: Any
    seconds: float
    cpu_seconds: float  # what all threads spent: less moved by a busy machine


def tpu_devices(topology: str = "v5e:2x2x1") -> list[Any]:
    """Devices to compile for, of a slice such as `v5e:2x2x1` or `v5p:2x2x2`."""
    from jax.experimental import topologies

    os.environ.update(_CLUSTER)
    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(found.devices)


def gpu_devices() -> list[Any]:
    """A GPU to compile for; jax's CUDA plugin needs no driver for that."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_H100, topology="1x1x1"
    )
    return list(found.devices)


def compile_bare_step(
    tx: optax.GradientTransformation,
    shapes: Any,
    dtype: str,
    device: Any,
    options: Any = None,
    consume_gradients: bool = False,
) -> tuple[Compiled, Any]:
    """Compile `update` and `apply_updates` for one device; also the parameters."""
    from . import common

    here = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    params = common.abstract_tree(shapes, dtype)
    trees = (params, jax.eval_shape(tx.init, params), params)
    trees = jax.tree.map(lambda x: _placed(x, here), trees)
    step = common.optimizer_step(tx, consume_gradients)
    return timed_compile(step, *trees, options=options), params


def make_mesh(devices: Sequence[Any], fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The first `fsdp * tensor` devices under the main job's axes."""
    grid = np.array(devices[: fsdp * tensor]).reshape(1, fsdp, tensor)
    return Mesh(grid, AXES)


def memory_target(variant: str, **options: Any) -> Config:
    """The model of the memory targets, its options and those of the run changed.

    Width 768, MLP 2048, vocabulary 8000, 8 layers, gradient checkpointing.
    """
    sizes = {"d_model": 768, "d_mlp": 2048, "n_heads": 12, "n_kv_heads": 12}
    sizes |= {"vocab_size": 8000, "n_layers": 8, "remat": True}
    return with_variant(Config(), variant).replace(**sizes | options)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state; nothing is allocated."""
    params = jax.eval_shape(partial(init_params, config.model, 0))
    tx = make_optimizer(config.optim, config.train)
    specs = param_specs(params, mesh)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params)
    )
    state_specs = ldadam_optax.state_specs(tx, params, specs, mesh)
    layout = shardings(mesh, TrainState(P(), specs, state_specs))
    return jax.tree.map(_placed, state, layout)


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_training_step(config: Config, mesh: Mesh) -> tuple[Compiled, TrainState]:
    """Compile the main job's step, with the state donated."""
    state = abstract_state(config, mesh)
    layout = jax.tree.map(lambda x: x.sharding, state)
    tokens = (config.train.batch_size, config.train.context + 1)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    batch = Batch(jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=rows))
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    step = jax.jit(
        make_train_step(config, specs if mesh.size > 1 else None),
        donate_argnums=0,
        out_shardings=(layout, NamedSharding(mesh, P())),
    )
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        return timed_compile(step, state, batch), state


def timed_compile(step: Any, *args: Any, options: Any = None) -> Compiled:
    """Lower and compile, and tell how long it took."""
    start, cpu_start = time.perf_counter(), time.process_time()
    program = step.lower(*args).compile(compiler_options=options)
    seconds = time.perf_counter() - start
    return Compiled(program, seconds, time.process_time() - cpu_start)


def memory(program: Any) -> dict[str, int]:
    """Bytes on one device, as the compiler counts them."""
    found = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "code": found.generated_code_size_in_bytes,
        "peak": arguments + temporaries + kept,
        "compiler_peak": found.peak_memory_in_bytes,
    }


def nbytes(tree: Any) -> int:
    """Bytes of a tree, concrete or abstract."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def nbytes_on_one_device(tree: Any) -> int:
    """Bytes of a sharded abstract tree on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
