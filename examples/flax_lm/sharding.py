"""Devices: processes, the mesh, and how parameters, state and data lie on it.

Axes of the mesh: `data` splits the batch; `fsdp` splits the batch and the weights;
`tensor` splits the weights along heads and hidden units. The axes are automatic:
GSPMD places what is in between.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import ConfigError, DevicesConfig

AXES = ("data", "fsdp", "tensor")

ROWS, COLUMNS = 0, 1
# The axis of a matrix that is split along `tensor`, by the name of its layer. Rows are
# the layer's input; a stack of layers puts one more, unsplit axis in front.
TENSOR_AXIS = {
    "embed": ROWS,
    "query": COLUMNS,
    "key": COLUMNS,
    "value": COLUMNS,
    "out": ROWS,
    "gate": COLUMNS,
    "up": COLUMNS,
    "down": ROWS,
    "head": COLUMNS,
}


def start_processes(devices: DevicesConfig) -> None:
    """Join the other processes; to be called before any device is used."""
    if devices.coordinator:
        jax.distributed.initialize(
            devices.coordinator,
            devices.num_processes,
            devices.process_id,
            heartbeat_timeout_seconds=devices.heartbeat_timeout,
        )


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; every process gets the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def make_mesh(text: str) -> Mesh:
    """Build the mesh that `--mesh data=2,fsdp=4,tensor=1` describes."""
    sizes = _axis_sizes(text)
    count = math.prod(sizes)
    if count > jax.device_count() or (count < jax.device_count() and _several()):
        raise ConfigError(
            f"--mesh {text} takes {count} devices; there are {jax.device_count()}. "
            f"Let one axis be -1 to take those that are left."
        )
    devices = jax.devices()[:count]
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3, devices=devices)


def _several() -> bool:
    return jax.process_count() > 1


def _axis_sizes(text: str) -> tuple[int, ...]:
    try:
        given = {k: int(v) for k, v in (item.split("=") for item in text.split(","))}
    except ValueError:
        given = {"": 0}
    sizes = [given.get(axis, 1) for axis in AXES]
    allowed = all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1
    if set(given) - set(AXES) or not allowed:
        raise ConfigError(
            f"--mesh must look like data=2,fsdp=4,tensor=1 (at most one of them -1), "
            f"got {text!r}."
        )
    left = max(1, jax.device_count() // abs(math.prod(sizes)))
    return tuple(left if size == -1 else size for size in sizes)


def batch_sharding(mesh: Mesh, batch_size: int, accumulate: int) -> NamedSharding:
    """Rows of a batch over data and fsdp, also within each micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // accumulate) % parts:
        raise ConfigError(
            f"batch_size / accumulate must be a multiple of data * fsdp, got "
            f"{batch_size} / {accumulate} and {parts}. Change --batch-size or --mesh."
        )
    return NamedSharding(mesh, P(("data", "fsdp")))


def param_specs(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """One spec for each parameter, by `TENSOR_AXIS`; vectors are replicated."""

    def spec(path: tuple[Any, ...], param: jax.Array) -> P:
        layer = next((name for name in _names(path) if name in TENSOR_AXIS), None)
        if layer is None:
            return P()
        stack = (None,) * (param.ndim - 2)
        return P(*stack, *_matrix_spec(layer, param.shape[-2:], mesh))

    return jax.tree.map_with_path(spec, params)


def _matrix_spec(layer: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """`tensor` on its axis and `fsdp` on the other, as far as they divide them.

    Without `tensor`, the weights of a block are split along their longer axis: LDAdam
    compresses the other one, and sends least if that is whole.
    """
    tensor, fsdp = TENSOR_AXIS[layer], 1 - TENSOR_AXIS[layer]
    divides = lambda name, axis: shape[axis] % mesh.shape[name] == 0
    if mesh.shape["tensor"] == 1 and layer not in ("embed", "head"):
        longer = ROWS if shape[ROWS] > shape[COLUMNS] else COLUMNS
        fsdp = longer if divides("fsdp", longer) else 1 - longer
        tensor = 1 - fsdp
    names: list[str | None] = [None, None]
    for name, axis in (("tensor", tensor), ("fsdp", fsdp)):
        names[axis] = name if divides(name, axis) else None
    return P(*names)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys on the way to a leaf."""
    return tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The same tree with the mesh put to each spec."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)
