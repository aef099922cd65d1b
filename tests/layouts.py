"""Every layout in which users keep matrices, and its matrices one by one."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ldadam_optax import LDAdamDimensionNumbers


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf and how to read its matrices off it.

    Attributes:
        shape: Shape of the leaf.
        spec: Its dimension numbers.
        matrices: From a leaf to its matrices, shape ``(batch, rows, cols)``,
            written with NumPy alone.
        batch: The batch axes' sizes, as the state carries them.
    """

    shape: tuple[int, ...]
    spec: LDAdamDimensionNumbers
    matrices: Callable[[np.ndarray], np.ndarray]
    batch: tuple[int, ...]


LAYOUTS = {
    "stack_on_axis_0": Layout(
        (3, 5, 8), LDAdamDimensionNumbers(1, 2), lambda x: x, (3,)
    ),
    "stack_on_axis_1": Layout(
        (5, 3, 8),
        LDAdamDimensionNumbers(0, 2),
        lambda x: x.transpose(1, 0, 2),
        (3,),
    ),
    "stack_last_and_output_before_reduction": Layout(
        (8, 5, 3),
        LDAdamDimensionNumbers(1, 0),
        lambda x: x.transpose(2, 1, 0),
        (3,),
    ),
    "attention_in": Layout(  # (d, heads, head_dim)
        (6, 2, 4),
        LDAdamDimensionNumbers(0, (1, 2)),
        lambda x: x.reshape(1, 6, 8),
        (),
    ),
    "attention_out": Layout(  # (heads, head_dim, d)
        (2, 4, 6),
        LDAdamDimensionNumbers((0, 1), 2),
        lambda x: x.reshape(1, 8, 6),
        (),
    ),
    "stacked_attention_in": Layout(  # (d, layers, heads, head_dim)
        (6, 3, 2, 4),
        LDAdamDimensionNumbers(0, (2, 3)),
        lambda x: x.transpose(1, 0, 2, 3).reshape(3, 6, 8),
        (3,),
    ),
    "attention_per_head": Layout(  # (d, heads, head_dim), a matrix a head
        (6, 2, 5),
        LDAdamDimensionNumbers(0, 2),
        lambda x: x.transpose(1, 0, 2),
        (2,),
    ),
    "convolution_merged": Layout(  # (kh, kw, in, out)
        (2, 3, 2, 7),
        LDAdamDimensionNumbers((0, 1, 2), 3),
        lambda x: x.reshape(1, 12, 7),
        (),
    ),
    "convolution_per_tap": Layout(
        (2, 2, 5, 7),
        LDAdamDimensionNumbers(2, 3),
        lambda x: x.reshape(4, 5, 7),
        (2, 2),
    ),
    "experts": Layout((3, 5, 8), LDAdamDimensionNumbers(-2, -1), lambda x: x, (3,)),
    "layers_of_experts": Layout(
        (2, 3, 8, 5),
        LDAdamDimensionNumbers(2, 3),
        lambda x: x.reshape(6, 8, 5),
        (2, 3),
    ),
}
