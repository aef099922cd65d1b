"""Bytes of the optimizer's state, leaf by leaf, beside those of its peers.

Every figure comes from the ``init`` of the optimizer itself under
``jax.eval_shape``: nothing is allocated, and no formula can go stale.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ldadam_optax._adam import scale_by_adam
from ldadam_optax._alias import ldadamw
from ldadam_optax._dimension_numbers import MatrixView, matrix_view
from ldadam_optax._fields import FIELDS
from ldadam_optax._routing import route
from ldadam_optax._sharding import axes_of, fit, leaf_specs, state_specs

_HEADS = {
    "path": "parameter",
    "shape": "shape",
    "route": "route",
    "matrix": "matrix",
    "rank": "rank",
    "mu": "mu",
    "nu": "nu",
    "projector": "projector",
    "error": "error",
    "residual_norm": "residual",
    "state": "state",
    "device": "a device",
    "adamw": "AdamW",
    "adam8bit": "8-bit Adam",
    "muon": "Muon",
    "galore": "GaLore",
    "adafactor": "Adafactor",
    "dropped": "not split",
}
_ADAM_8_BIT = scale_by_adam(0.9, 0.999, 1e-8, "int8", "int8")
_LEFT = ("path", "route", "dropped")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class LeafMemory:
    """What one leaf takes, or all of them; sizes in bytes.

    Attributes:
      path: Path of the leaf.
      shape: Its shape.
      route: ``'LDAdam'`` or ``'AdamW'``.
      matrix: The leaf as matrices, ``(batch, m, n)`` with the axis ``m`` compressed;
        None for AdamW.
      rank: Rank of its subspace; None for AdamW.
      parameter: The leaf itself.
      mu: First moment, with its scales.
      nu: Second moment, with its scales.
      projector: Basis.
      error: Error buffer: codes and scales.
      residual_norm: Norms that ``residual='recovery'`` keeps.
      counters: Step counts; no leaf's own, so 0 but in the sum.
      adamw: State of ``optax.adamw``.
      adam8bit: Adam's moments in 8 bits, blocks of 32 with a bfloat16 scale each.
      muon: State of ``optax.contrib.muon`` on the same matrices, and of
        ``optax.adamw`` elsewhere.
      galore: State of ``optax.contrib.galore`` at the same rank on the same matrices,
        and of ``optax.adamw`` elsewhere. As it knows no batch axes, each matrix of a
        batch is counted as a leaf of its own, which users have to arrange.
      adafactor: State of ``optax.adafactor``.
      device: The state's part on one device; 0 without a mesh.
      dropped: Names of mesh axes that do not divide an axis, which stays whole, and
        the fields where: ``'model (error_scale)'``.
    """

    path: str
    shape: tuple[int, ...] = ()
    route: str = ""
    matrix: tuple[int, int, int] | None = None
    rank: int | None = None
    parameter: int = 0
    mu: int = 0
    nu: int = 0
    projector: int = 0
    error: int = 0
    residual_norm: int = 0
    counters: int = 0
    adamw: int = 0
    adam8bit: int = 0
    muon: int = 0
    galore: int = 0
    adafactor: int = 0
    device: int = 0
    dropped: str = ""

    @property
    def state(self) -> int:
        """Everything that ``ldadamw`` keeps."""
        moments = self.mu + self.nu + self.projector
        return moments + self.error + self.residual_norm + self.counters


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Rows and their sum; ``str()`` is a table.

    Attributes:
      rows: One for each leaf.
      total: Their sum, with the step counts.
    """

    rows: tuple[LeafMemory, ...]
    total: LeafMemory

    def __str__(self) -> str:
        """The rows and their sum as an aligned table."""
        unused = set() if self.total.residual_norm else {"residual_norm"}
        if not self.total.device:
            unused |= {"device", "dropped"}
        heads = {name: head for name, head in _HEADS.items() if name not in unused}
        cells = [
            [_cell(row, name) for name in heads] for row in (*self.rows, self.total)
        ]
        return _table(list(heads), [list(heads.values()), *cells])


def memory_report(
    params: Any,
    rank: int = 16,
    *,
    specs: Any = None,
    mesh: Mesh | AbstractMesh | None = None,
    **options: Any,
) -> MemoryReport:
    """Tell what the state of ``ldadamw`` takes, beside that of its peers.

    Nothing is allocated. The total is what the state takes on all devices together,
    the error buffer included, with a constant learning rate; a schedule keeps one
    more step count of 4 bytes. Peers keep their state in the parameters' dtype, as is
    their default; ``ldadamw`` keeps float32 unless told otherwise.

    Args:
      params: Parameters, or abstract values of their shapes, in any tree and boxes.
      rank: As given to the optimizer.
      specs: ``PartitionSpec`` of each parameter, to learn what one device holds and
        which names were dropped as they do not divide.
      mesh: The mesh whose axes they name.
      **options: All other options of ``ldadamw``, by name, save ``learning_rate``.

    Returns:
      A report that prints as a table and whose rows can be read by programs.

    Raises:
      TypeError: as ``ldadamw`` and its ``init``.
      ValueError: as ``ldadamw`` and its ``init``.

    Example:
      >>> import jax
      >>> kernel, bias = (jax.ShapeDtypeStruct(s, 'float32') for s in [(64, 96), (96,)])
      >>> report = memory_report({'w': kernel, 'b': bias}, rank=8, error_dtype='int8')
      >>> report.total.state, report.total.adamw
      (15502, 49924)
      >>> print(str(report).splitlines()[-1].split()[-2:])  # Adafactor's
      ['24.39', 'KiB']
    """
    if (specs is None) != (mesh is None):
        raise ValueError("specs and mesh go together; got one of them.")
    options["mask"] = None  # Which leaves decay does not change the state.
    dimension_numbers = options.pop("weight_dimension_numbers", None)
    routes = route(params, dimension_numbers, rank)
    param_specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    measured: dict[Any, LeafMemory] = {}  # Layers are alike: each kind is read once.
    rows = []
    for i, ((path, leaf), spec) in enumerate(
        zip(jax.tree.leaves_with_path(params), routes, strict=True)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        view = spec and matrix_view(
            repr(name), leaf.shape, spec, rank, options.get("side", "short")
        )
        tx = ldadamw(0.0, rank, **options, weight_dimension_numbers=[spec])
        place = None if mesh is None else param_specs[i]
        if (leaf, view, place) not in measured:
            row = _measure(tx, leaf, view)
            if mesh is not None:
                row = _on_mesh(row, tx, leaf, view, param_specs[i], mesh)
            measured[leaf, view, place] = row
        rows.append(dataclasses.replace(measured[leaf, view, place], path=name))
    specs_of_all = jax.tree.structure(params).unflatten(routes)
    tx = ldadamw(0.0, rank, **options, weight_dimension_numbers=specs_of_all)
    whole = _bytes(jax.eval_shape(tx.init, params))
    return MemoryReport(tuple(rows), _total(rows, whole))


def state_bytes(tx: optax.GradientTransformation, leaf: jax.ShapeDtypeStruct) -> int:
    """What ``tx`` keeps of one leaf, its counters apart; the ``state`` of a row."""
    return _state_bytes(jax.eval_shape(tx.init, [leaf]))


def _measure(
    tx: optax.GradientTransformation,
    leaf: jax.ShapeDtypeStruct,
    view: MatrixView | None,
) -> LeafMemory:
    """What one leaf takes under ``tx``, whose view is None on AdamW's route."""
    state = jax.eval_shape(tx.init, [leaf])
    adamw = _leaf_bytes(optax.adamw(0.0), leaf)
    size = lambda field: _bytes(_parts(state, field, f"{field}_scale"))
    row = LeafMemory(
        path="",
        shape=leaf.shape,
        route="AdamW",
        parameter=_bytes(leaf),
        mu=size("mu"),
        nu=size("nu"),
        adamw=adamw,
        adam8bit=_leaf_bytes(_ADAM_8_BIT, leaf),
        muon=adamw,
        galore=adamw,
        adafactor=_leaf_bytes(optax.adafactor(0.0), leaf),
    )
    if view is None:
        return row
    batch = math.prod(view.batch_shape)
    matrix = jax.ShapeDtypeStruct((view.m, view.n), leaf.dtype)
    return dataclasses.replace(
        row,
        route="LDAdam",
        matrix=(batch, view.m, view.n),
        rank=view.rank,
        projector=size("projector"),
        error=size("error"),
        residual_norm=size("residual_norm"),
        muon=batch * _leaf_bytes(optax.contrib.muon(0.0), matrix),
        galore=batch * _leaf_bytes(optax.contrib.galore(0.0, view.rank), matrix),
    )


def _on_mesh(
    row: LeafMemory,
    tx: optax.GradientTransformation,
    leaf: jax.ShapeDtypeStruct,
    view: MatrixView | None,
    spec: PartitionSpec,
    mesh: Mesh | AbstractMesh,
) -> LeafMemory:
    """The row with what one device holds and which names were dropped."""
    state = jax.eval_shape(tx.init, [leaf])
    parts = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            NamedSharding(mesh, s).shard_shape(x.shape), x.dtype
        ),
        state,
        state_specs(tx, [leaf], [spec], mesh),
    )
    wanted = {"parameter": (spec, leaf.shape)}
    for field, wish in (leaf_specs(view, spec, mesh) if view else {}).items():
        for array in jax.tree.leaves(_parts(state, field)):
            wanted[field] = (wish, array.shape)
    dropped: dict[str, list[str]] = {}
    for field, (wish, shape) in wanted.items():
        for name, kept in zip(wish, fit(wish, shape, mesh), strict=False):
            for axis in axes_of(name):
                if axis not in axes_of(kept):
                    dropped.setdefault(str(axis), []).append(field)
    text = "; ".join(f"{name} ({', '.join(at)})" for name, at in dropped.items())
    return dataclasses.replace(row, device=_state_bytes(parts), dropped=text)


def _total(rows: Sequence[LeafMemory], state: int) -> LeafMemory:
    """Sum the rows and what each optimizer keeps once; ``state`` is all of ours."""
    names = [f.name for f in dataclasses.fields(LeafMemory) if f.type is int]
    sums = {name: sum(getattr(row, name) for row in rows) for name in names}
    counters = {
        "adamw": (optax.adamw(0.0),),
        "adam8bit": (_ADAM_8_BIT,),
        "muon": (optax.contrib.muon(0.0),),
        "galore": (optax.contrib.galore(0.0), optax.adamw(0.0)),
        "adafactor": (optax.adafactor(0.0),),
    }
    for name, optimizers in counters.items():
        sums[name] += sum(_bytes(jax.eval_shape(o.init, [])) for o in optimizers)
    sums["counters"] = state - sum(row.state for row in rows)
    sums["device"] += sums["counters"] if sums["device"] else 0
    return dataclasses.replace(LeafMemory("all"), **sums)


def _parts(state: Any, *fields: str) -> list[Any]:
    """What a nest of optimizer states keeps under these names."""
    return [
        value
        for field in fields
        for _, value in optax.tree.get_all_with_path(state, field)
    ]


def _state_bytes(state: Any) -> int:
    """What a nest of optimizer states keeps of leaves, by the names of the fields."""
    return _bytes(_parts(state, *(field.name for field in FIELDS)))


def _leaf_bytes(tx: optax.GradientTransformation, leaf: jax.ShapeDtypeStruct) -> int:
    """What an optimizer keeps for one leaf, its counters apart."""
    with_leaf, without = (jax.eval_shape(tx.init, tree) for tree in ([leaf], []))
    return _bytes(with_leaf) - _bytes(without)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cell(row: LeafMemory, name: str) -> str:
    value = getattr(row, name)
    if name == "shape":
        return "x".join(map(str, value))
    if name == "matrix":
        return "x".join(map(str, value if value[0] > 1 else value[1:])) if value else ""
    if name == "rank":
        return str(value or "")
    return value if isinstance(value, str) else _readable(value) if value else "-"


def _readable(size: int) -> str:
    """Bytes in the largest unit of which there is at least 1."""
    power = min((max(size, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.{2 if power else 0}f} {_UNITS[power]}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines: heads, a rule, rows, a rule, the sum."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
