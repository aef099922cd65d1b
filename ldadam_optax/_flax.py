"""Dimension numbers read off the names and shapes that Flax gives its parameters.

Flax is not imported: its layers call their weight ``kernel`` and their table
``embedding``, in Linen and in NNX alike, and a box (``nn.Partitioned``,
``nnx.Variable``) adds one component, ``value``, to the path of what it holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ldadam_optax._dimension_numbers import LDAdamDimensionNumbers, leaf_name
from ldadam_optax._routing import is_head, path_names

# Modules whose kernel is (d, heads, head_dim), also with ``_proj`` behind the name:
# Flax's attention calls them by the first three.
_ATTENTION_INPUTS = ("query", "key", "value", "q", "k", "v", "qkv")
# Modules whose weight is (heads, head_dim, d), also with ``_proj`` or ``_einsum``.
_ATTENTION_OUTPUTS = ("attn_vec", "o", "out")


def flax_dimension_numbers(
    params: Any, *, scan_axes: Mapping[str, int] | None = None
) -> Any:
    """Return the dimension numbers of a Flax model's parameters.

    A leaf called ``kernel`` with two axes or more is a matrix; any other leaf, such
    as ``bias``, ``scale``, ``embedding``, ``lora_a``, ``lora_b``, is None, for AdamW:

    ====================================  =======================  =========  ======
    layer                                 kernel                   reduction  output
    ====================================  =======================  =========  ======
    Dense, Linear, recurrent cells        (in, out)                0          1
    attention's query, key, value         (d, heads, head_dim)     0          1, 2
    attention's out                       (heads, head_dim, d)     0, 1       2
    Conv, ConvTranspose, 1-D to 3-D       (taps.., in, out)        all else   last
    DenseGeneral, LinearGeneral, Einsum   (batch.., in.., out..)   in         out
    ====================================  =======================  =========  ======

    Three axes can be attention as well as a convolution. What decides, in order:

    1. The bias beside the kernel, where there is one: its axes are the kernel's
       batch and output axes, so they tell where the input axes lie.
    2. The module's name: in ``query``, ``key``, ``value``, ``qkv``, ``q_proj`` and
       their like the first axis is the input and all others are the output.
    3. Else the last axis is the output and all others are the input.

    A DenseGeneral of several output axes, or with batch axes, that has no bias and
    another name is therefore read as a convolution: give its spec by hand. So is a
    stack of layers whose axis is not named in ``scan_axes``. An output head is None
    if it is called by a name of heads (``lm_head``, ``logits_dense``); else it is a
    Dense layer like any other: to train it with AdamW, as the paper does, put None in
    its place. ``print(memory_report(params, ...))`` shows what was understood.

    Args:
      params: Parameters of a Linen or NNX model: dict, ``FrozenDict`` or
        ``nnx.State``, with or without boxes, of arrays or of abstract values.
      scan_axes: The stack axis that ``nn.scan``, ``nnx.scan`` or ``nnx.vmap`` adds to
        each leaf below a module, by the module's name: ``{'layers': 0}``. It counts
        matrices. Of nested stacks each axis counts without those further out.

    Returns:
      Tree like ``params`` of :class:`LDAdamDimensionNumbers` and None. As the
      function is a callable of the parameters, it can itself be passed as
      ``weight_dimension_numbers``; ``functools.partial`` binds ``scan_axes``.

    Raises:
      ValueError: if a kernel, or the bias beside it, lacks the axis that
        ``scan_axes`` names.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {
      ...     'layers': {'query': {'kernel': jnp.zeros((2, 8, 4, 3))}},
      ...     'head': {'kernel': jnp.zeros((8, 50)), 'bias': jnp.zeros(50)},
      ... }
      >>> specs = flax_dimension_numbers(params, scan_axes={'layers': 0})
      >>> specs['layers']['query']['kernel']
      LDAdamDimensionNumbers(reduction_axis=1, output_axis=(2, 3), rank=None)
      >>> specs['head']['kernel']
      LDAdamDimensionNumbers(reduction_axis=0, output_axis=1, rank=None)
      >>> specs['head']['bias'] is None
      True
    """
    leaves, treedef = jax.tree.flatten_with_path(params)
    axes, sizes = {}, {}
    for path, leaf in leaves:
        names = path_names(path)
        if names[-1:] in (("kernel",), ("bias",)):
            axes[names] = _unstacked_axes(path, leaf.shape, scan_axes or {})
            sizes[names] = tuple(leaf.shape[axis] for axis in axes[names])
    return treedef.unflatten(
        [_kernel_spec(path_names(path), axes, sizes) for path, _ in leaves]
    )


def einsum_dimension_numbers(
    params: Any, *, scan_axes: Mapping[str, int] | None = None
) -> Any:
    """Return the dimension numbers of a Flax model that has Einsum layers.

    As in Tunix and in gemma, whose Einsum layers call their weight ``w``. Leaves of
    another name are those of :func:`flax_dimension_numbers`.

    ==============================  ============================  =========  ======
    module                          w                             reduction  output
    ==============================  ============================  =========  ======
    any, but an output head         (in, out)                     0          1
    q_proj, k_proj, v_proj          (d, heads, head_dim)          0          1, 2
    o_proj, attn_vec_einsum         (heads, head_dim, d)          0, 1       2
    q_einsum                        (heads, d, head_dim)          1          0, 2
    kv_einsum, qkv_einsum           (2 or 3, heads, d, head_dim)  2          1, 3
    ==============================  ============================  =========  ======

    The last has a matrix for each of key and value, of query, key and value. A weight
    of more than two axes in a module of another name is None, for AdamW: its axes
    cannot be told. Give its spec with :func:`dimension_numbers_by_name`.

    Args:
      params: As for :func:`flax_dimension_numbers`.
      scan_axes: As for :func:`flax_dimension_numbers`.

    Returns:
      Tree like ``params`` of :class:`LDAdamDimensionNumbers` and None.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {'attn': {'q_einsum': {'w': jnp.zeros((4, 64, 16))},
      ...                    'kv_einsum': {'w': jnp.zeros((2, 4, 64, 16))}}}
      >>> specs = einsum_dimension_numbers(params)['attn']
      >>> specs['q_einsum']['w']
      LDAdamDimensionNumbers(reduction_axis=1, output_axis=(0, 2), rank=None)
      >>> specs['kv_einsum']['w']
      LDAdamDimensionNumbers(reduction_axis=2, output_axis=(1, 3), rank=None)
    """
    of_flax = flax_dimension_numbers(params, scan_axes=scan_axes)
    leaves, treedef = jax.tree.flatten_with_path(params)
    specs = treedef.flatten_up_to(of_flax)
    for i, (path, leaf) in enumerate(leaves):
        if path_names(path)[-1:] == ("w",):
            axes = _unstacked_axes(path, leaf.shape, scan_axes or {})
            specs[i] = _einsum_spec(path_names(path), axes)
    return treedef.unflatten(specs)


def _einsum_spec(
    names: tuple[str, ...], axes: list[int]
) -> LDAdamDimensionNumbers | None:
    """Spec of the weight of an Einsum layer, by its module's name."""
    module = "".join(names[-2:-1])
    kind = module.removesuffix("_proj").removesuffix("_einsum")
    if len(axes) == 2 and not is_head(names):
        return LDAdamDimensionNumbers(*axes)
    if module.endswith("_einsum") and kind in ("q", "kv", "qkv") and len(axes) > 2:
        heads, d, head_dim = axes[-3:]
        return LDAdamDimensionNumbers(d, (heads, head_dim))
    if kind in _ATTENTION_OUTPUTS and len(axes) == 3:
        return LDAdamDimensionNumbers(tuple(axes[:2]), axes[2])
    if kind in _ATTENTION_INPUTS and len(axes) == 3:
        return LDAdamDimensionNumbers(axes[0], tuple(axes[1:]))
    return None


def _unstacked_axes(
    path: Sequence[Any], shape: tuple[int, ...], scan_axes: Mapping[str, int]
) -> list[int]:
    """Axes of a leaf that are no stack axes, the outermost stack taken off first."""
    axes = list(range(len(shape)))
    for name in path_names(path)[:-1]:
        if name not in scan_axes:
            continue
        axis = scan_axes[name]
        if not -len(axes) <= axis < len(axes):
            raise ValueError(
                f"{leaf_name(path)} has shape {shape}: no stack axis {axis}, which "
                f"scan_axes names for {name!r}. Name another, or leave {name!r} out."
            )
        del axes[axis]
    return axes


def _kernel_spec(
    names: tuple[str, ...],
    axes: Mapping[tuple[str, ...], list[int]],
    sizes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> LDAdamDimensionNumbers | None:
    """Spec of one leaf, None unless it is a kernel that is a matrix."""
    if names[-1:] != ("kernel",) or len(axes[names]) < 2 or is_head(names):
        return None
    kernel = axes[names]
    split = _split_by_bias(sizes[names], sizes.get((*names[:-1], "bias"), ()))
    if split is None:
        module = "".join(names[-2:-1]).removesuffix("_proj")
        split = (0, 1 if module in _ATTENTION_INPUTS else len(kernel) - 1)
    start, stop = split
    return LDAdamDimensionNumbers(
        _one_or_all(kernel[start:stop]), _one_or_all(kernel[stop:])
    )


def _split_by_bias(
    kernel: tuple[int, ...], bias: tuple[int, ...]
) -> tuple[int, int] | None:
    """Where a kernel's input axes start and stop, as its bias is ``batch + output``."""
    inputs = len(kernel) - len(bias)
    for batch in range(len(bias)):
        if inputs > 0 and kernel[:batch] + kernel[batch + inputs :] == bias:
            return batch, batch + inputs
    return None


def _one_or_all(axes: list[int]) -> int | tuple[int, ...]:
    return axes[0] if len(axes) == 1 else tuple(axes)
