"""Which leaves LDAdam takes: by default, by names that users match, by their specs.

A name is a leaf's path, ``'layers/0/attention/query/kernel'``, without the component
that a box adds to it.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ldadam_optax._checks import ARRAYS
from ldadam_optax._dimension_numbers import (
    LDAdamDimensionNumbers,
    WeightDimensionNumbers,
    is_dimension_numbers,
    rank_of_side,
    resolve_dimension_numbers,
)

# What embeddings and output heads are called, as a whole component of the path. Seen in
# Flax (Embed_0, embedding), Haiku (embeddings), Tunix and gemma (embedder,
# input_embedding), MaxText (token_embedder, logits_dense), Levanter (embeddings,
# lm_head), EasyDeL and Hugging Face (embed_tokens, wte, wpe, word_embeddings,
# lm_head), axlearn (emb, token_emb).
_EMBEDDING = re.compile(
    r"(\w+_)?(emb|embed(s|der|ding|dings|_tokens|_positions)?)(_\d+)?|wte|wpe",
    re.IGNORECASE,
)
_HEAD = re.compile(r"lm_head|logits|logits_dense|unembed|unembedding", re.IGNORECASE)


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Components of a leaf's path, without that of a box."""
    name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
    names = tuple(name.split("/"))
    return names[:-1] if names[-1:] == ("value",) else names


def is_head(names: Iterable[str]) -> bool:
    """True for a leaf of an output head, by what heads are called."""
    return any(_HEAD.fullmatch(name) for name in names)


def is_embedding(names: Iterable[str]) -> bool:
    """True for a leaf of an embedding, by what embeddings are called."""
    return any(_EMBEDDING.fullmatch(name) for name in names)


def route(
    params: Any, weight_dimension_numbers: WeightDimensionNumbers, rank: int | float
) -> list[Any]:
    """Return the spec of each leaf that ``ldadamw`` follows, None for AdamW."""
    if weight_dimension_numbers is not None:
        return resolve_dimension_numbers(weight_dimension_numbers, params)
    return [
        _default_spec(path, leaf, rank)
        for path, leaf in jax.tree.leaves_with_path(params)
    ]


def tell_if_nothing_is_compressed(
    params: Any, specs: Sequence[Any], rank: int | float
) -> None:
    """Warn where the default finds no matrix for LDAdam in a model that has some."""
    paths = [path for path, leaf in jax.tree.leaves_with_path(params) if _matrix(leaf)]
    if paths and not any(spec is not None for spec in specs):
        warnings.warn(
            f"ldadamw found no leaf for LDAdam, and all take AdamW: it takes leaves of "
            f"two axes that both exceed rank={rank} and that are no embedding or head "
            f"by their name. {_listed(paths)} have two axes or more: lower the rank, "
            "or name the axes that form the matrix in weight_dimension_numbers.",
            stacklevel=2,
        )


def checked_mask(mask: Any) -> Callable[[Any], Any]:
    """The mask of the weight decay as a callable that checks it against the parameters.

    Raises:
      TypeError: if a leaf of the mask is no bool.
      ValueError: if it is no prefix tree of the parameters.
    """
    leaves = jax.tree.leaves(mask)
    is_function = bool(leaves) and all(map(callable, leaves))  # as optax.masked has it

    def check(path: Any, keep: Any, _: Any) -> None:
        array = isinstance(keep, ARRAYS)
        if not isinstance(keep, bool) and not (
            array and keep.ndim == 0 and keep.dtype == np.bool_
        ):
            raise TypeError(
                f"mask{jax.tree_util.keystr(path)} must be a bool, True for what "
                f"decays, got {keep!r}."
            )

    def mask_of(params: Any) -> Any:
        tree = mask(params) if is_function else mask
        try:
            jax.tree.map_with_path(check, tree, params)
        except ValueError as error:
            raise ValueError(
                "mask must be a bool or a prefix tree of the parameters with bools; "
                f"the trees differ: {error}"
            ) from error
        return tree

    return mask_of


def dimension_numbers_by_name(
    rules: Sequence[tuple[str, LDAdamDimensionNumbers | None]],
) -> Callable[[Any], Any]:
    """Return dimension numbers by the names of leaves; the first match wins.

    Args:
      rules: Pairs of a regular expression, searched for in the leaf's path
        (``'layers/0/query/kernel'``), and the spec of the leaves that it finds: a
        :class:`LDAdamDimensionNumbers`, with a rank of its own if wanted, or None
        for AdamW.

    Returns:
      A callable of the parameters, to be given as ``weight_dimension_numbers``. Leaves
      that no rule matches take AdamW. Those among them that have two axes or more, and
      rules that match no leaf, are told in one warning, at the first call.

    Raises:
      TypeError: if a rule is not such a pair.
      ValueError: if a regular expression is not valid.

    Example:
      >>> import jax.numpy as jnp
      >>> specs = dimension_numbers_by_name([
      ...     ('embed|lm_head', None),
      ...     ('down_proj', LDAdamDimensionNumbers(rank=64)),
      ...     ('(q|k|v)_proj/w$', LDAdamDimensionNumbers(0, (1, 2))),
      ...     ('kernel$', LDAdamDimensionNumbers()),
      ... ])
      >>> params = {'embed': {'kernel': jnp.zeros((50, 8))}, 'scale': jnp.zeros(8),
      ...           'q_proj': {'w': jnp.zeros((8, 2, 4))},
      ...           'down_proj': {'kernel': jnp.zeros((16, 8))},
      ...           'up_proj': {'kernel': jnp.zeros((8, 16))}}
      >>> found = specs(params)
      >>> found['down_proj']['kernel'].rank, found['up_proj']['kernel'].rank
      (64, None)
      >>> found['embed']['kernel'] is None, found['q_proj']['w'].output_axis
      (True, (1, 2))
    """
    compiled = [_compiled(rule) for rule in rules]
    told = False

    def specs_of(params: Any) -> Any:
        nonlocal told
        leaves, treedef = jax.tree.flatten_with_path(params)
        first = [_first_match(compiled, path) for path, _ in leaves]
        if not told:
            told = True
            unused = [
                pattern.pattern
                for i, (pattern, _) in enumerate(compiled)
                if i not in first
            ]
            unmatched = [
                path
                for (path, leaf), i in zip(leaves, first, strict=True)
                if i is None and _matrix(leaf)
            ]
            _tell(unmatched, unused if leaves else [])
        return treedef.unflatten([None if i is None else compiled[i][1] for i in first])

    return specs_of


def _default_spec(
    path: Any, leaf: Any, rank: int | float
) -> LDAdamDimensionNumbers | None:
    """A spec for a matrix larger than the rank on both sides, no embedding or head."""
    names = path_names(path)
    is_matrix = len(leaf.shape) == 2 and min(leaf.shape) > rank_of_side(
        rank, min(leaf.shape)
    )
    if not is_matrix or is_embedding(names) or is_head(names):
        return None
    return LDAdamDimensionNumbers()


def _compiled(rule: Any) -> tuple[re.Pattern[str], Any]:
    if not (
        isinstance(rule, tuple | list)
        and len(rule) == 2
        and isinstance(rule[0], str)
        and (rule[1] is None or is_dimension_numbers(rule[1]))
    ):
        raise TypeError(
            "A rule must be a pair (regular expression, LDAdamDimensionNumbers or "
            f"None), got {rule!r}."
        )
    try:
        return re.compile(rule[0]), rule[1]
    except re.error as error:
        raise ValueError(
            f"{rule[0]!r} is not a regular expression: {error}."
        ) from error


def _first_match(
    compiled: Sequence[tuple[re.Pattern[str], Any]], path: Any
) -> int | None:
    """Number of the first rule whose pattern the leaf's name has."""
    name = "/".join(path_names(path))
    found = (i for i, (pattern, _) in enumerate(compiled) if pattern.search(name))
    return next(found, None)


def _tell(unmatched: Sequence[Any], unused: Sequence[str]) -> None:
    """Warn of leaves without a rule and of rules without a leaf."""
    parts = []
    if unmatched:
        parts.append(
            f"no rule matches {_listed(unmatched)}, which take AdamW: add one, or "
            "('.*', None) at the end"
        )
    if unused:
        parts.append(f"no leaf is first matched by {', '.join(map(repr, unused))}")
    if parts:
        text = "; ".join(parts)
        warnings.warn(f"dimension_numbers_by_name: {text}.", stacklevel=3)


def _listed(paths: Sequence[Any], most: int = 5) -> str:
    names = [repr("/".join(path_names(path))) for path in paths]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _matrix(leaf: Any) -> bool:
    return len(leaf.shape) >= 2
