"""The chain of ``ldadamw``, and what it refuses: states and parameters of others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from ldadam_optax._state import check_params, names_of


class Link(NamedTuple):
    """One link of the chain, by the option that makes it.

    Attributes:
      option: Name of the option.
      transformation: The link itself.
      fields: What its state has to have.
    """

    option: str
    transformation: optax.GradientTransformation
    fields: tuple[str, ...] = ()


def chain(*links: Link) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` that refuses the state of another one."""
    chained = optax.chain(*(link.transformation for link in links))

    def update_fn(updates, state, params=None, **extra_args):
        _check_links(links, state)
        return chained.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chained.init, update_fn)


def _check_links(links: Sequence[Link], state: Any) -> None:
    """Raise a TypeError that tells which option the state was made without."""
    options = ", ".join(link.option for link in links)
    if not isinstance(state, tuple | list) or len(state) != len(links):
        raise TypeError(
            f"update needs the state that init of this optimizer made, a tuple of "
            f"{len(links)} states, for {options}; got {_kind(state)}."
        )
    for link, found in zip(links, state, strict=True):
        if lacking := [f for f in link.fields if f not in _fields_of(found)]:
            raise TypeError(
                f"The state for {link.option} is {_kind(found)} without "
                f"{', '.join(lacking)}: it was made by another optimizer, or with "
                f"another kind of {link.option} (such as a number in place of a "
                "schedule). Pass the state that init of this optimizer made."
            )


def _kind(state: Any) -> str:
    length = f" of {len(state)}" if isinstance(state, tuple | list) else ""
    return f"{type(state).__name__}{length}"


def _fields_of(state: Any) -> set[str]:
    """Names of the fields of a state and of what ``optax.masked`` holds in it."""
    fields: set[str] = set(getattr(state, "_fields", ()))
    inner = getattr(state, "inner_state", None)
    return fields if inner is None else fields | _fields_of(inner)


def check_leaves(updates: Any, state: Any, params: Any) -> None:
    """Raise a ValueError that names the leaves in which the trees differ."""
    groups: list[Any] = [
        getattr(group, "inner_state", None) for group in _groups(state)
    ]
    moments = [group.mu for group in groups if hasattr(group, "mu")]
    known = {name for moment in moments for name in names_of(moment)}
    given = set(names_of(updates))
    if moments and known != given:
        listed = lambda names: ", ".join(sorted(names)) or "nothing"
        raise ValueError(
            "The optimizer's state was made for other parameters: it lacks "
            f"{listed(given - known)} of the updates, which lack "
            f"{listed(known - given)} of it. Call init for the new parameters, and "
            "copy what is to be kept."
        )
    if params is not None:
        check_params(updates, params)


def _groups(state: Any) -> list[Any]:
    """States of the two groups, LDAdam's and AdamW's."""
    if set(state.inner_states) != {"ldadam", "adamw"}:
        raise ValueError(
            "The optimizer's state must have the groups 'ldadam' and 'adamw', got "
            f"{sorted(state.inner_states)}: pass the state that init made."
        )
    return list(state.inner_states.values())
