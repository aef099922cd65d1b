"""One optimizer for each name, all under the same routing.

The matrices of attention and MLP take the optimizer that was asked for. Embedding,
head and norms take AdamW in every case, so that a comparison compares what happens
to the same matrices. `adamw` and `adafactor` need no routing: one rule for all.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ldadam_optax

from .config import ConfigError, OptimConfig, TrainConfig
from .model import Params

GROUPS: tuple[str, ...] = ("embedding", "attention", "mlp", "norm", "head", "other")


def group_of(path: tuple[Any, ...]) -> str:
    """The group of a parameter, or of an optimizer state leaf that belongs to it."""
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    if "scale" in names:
        return "norm"
    groups = {"embed": "embedding", "attention": "attention", "mlp": "mlp"}
    groups["head"] = "head"
    return next((groups[name] for name in names if name in groups), "other")


def is_routed(path: tuple[Any, ...]) -> bool:
    """Whether a parameter takes the optimizer asked for rather than AdamW."""
    return group_of(path) in ("attention", "mlp")


def leaf_path(path: tuple[Any, ...]) -> str:
    """`layers/0/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def learning_rate(optim: OptimConfig, train: TrainConfig) -> optax.Schedule:
    """Linear warm-up from the first step on, then a cosine."""
    warmup = round(optim.warmup * train.schedule)
    return optax.warmup_cosine_decay_schedule(
        init_value=optim.learning_rate / (warmup + 1),
        peak_value=optim.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(train.schedule, warmup + 1),
        end_value=optim.learning_rate * optim.final_learning_rate,
    )


def make_optimizer(
    optim: OptimConfig, train: TrainConfig
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run, with its schedule and clipping."""
    make = {
        "ldadamw": _ldadamw,
        "adamw": _adamw,
        "adafactor": _adafactor,
        "galore": _galore,
        "muon": _muon,
    }[optim.optimizer]
    clip = (optax.clip_by_global_norm(optim.clip_norm),) if optim.clip_norm else ()
    return optax.chain(*clip, make(optim, learning_rate(optim, train)))


def _ldadamw(
    optim: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    return ldadam_optax.ldadamw(schedule, **ldadam_options(optim))


def ldadam_options(optim: OptimConfig) -> dict[str, Any]:
    """What `ldadamw` and `memory_report` take."""
    return {
        "rank": optim.rank,
        "b1": optim.b1,
        "b2": optim.b2,
        "eps": optim.eps,
        "rho": optim.rho,
        "weight_decay": optim.weight_decay,
        "mask": _decayed,
        "residual": optim.residual,
        "side": optim.side,
        "subspace": optim.subspace,
        "subspace_init": optim.subspace_init,
        "subspace_interval": optim.subspace_interval,
        "precision": optim.precision,
        "factorizations": optim.factorizations,
        "mu_dtype": optim.mu_dtype,
        "nu_dtype": optim.nu_dtype,
        "projector_dtype": optim.projector_dtype,
        "stochastic_rounding": optim.stochastic_rounding,
        "error_dtype": _error_dtype(optim),
        "weight_dimension_numbers": partial(_dimension_numbers, optim.rank_of_leaf),
    }


def _error_dtype(optim: OptimConfig) -> str | None:
    """Storage of the error buffer; None where there is none."""
    return optim.error_dtype if optim.residual == "error_feedback" else None


def _adamw(
    optim: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=_decayed,
    )


def _adafactor(
    optim: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Without the parameters' scale, so that learning rates mean what Adam's do."""
    return optax.adafactor(
        schedule,
        multiply_by_parameter_scale=False,
        weight_decay_rate=lambda count: optim.weight_decay * schedule(count),
        weight_decay_mask=_decayed,
    )


def _galore(
    optim: OptimConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """optax's GaLore on the same matrices as LDAdam; it would compress embeddings."""
    galore = optax.contrib.galore(
        schedule,
        rank=optim.rank,
        update_proj_gap=optim.galore_gap,
        scale=optim.galore_scale,
        base_optimizer=optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        weight_decay=optim.weight_decay,
    )
    return optax.partition(
        {"galore": _layer_by_layer(galore), "adamw": _adamw(optim, schedule)},
        lambda params: _on_routed(params, "galore", "adamw"),
    )


def _muon(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax's Muon with updates of Adam's size, so that learning rates compare.

    It has no mask for the rest, so weight decay is for its matrices only.
    """
    return optax.contrib.muon(
        schedule,
        weight_decay=optim.weight_decay,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        adam_weight_decay=0.0,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_muon_dimension_numbers,
    )


def _dimension_numbers(ranks: dict[str, int], params: Params) -> Any:
    """Rows and columns of the routed matrices; a stack axis in front is a batch."""
    spec = ldadam_optax.LDAdamDimensionNumbers(reduction_axis=-2, output_axis=-1)
    routed = [
        leaf_path(p) for p, _ in jax.tree.leaves_with_path(params) if is_routed(p)
    ]
    if params and (unknown := sorted(ranks.keys() - set(routed))):
        raise ConfigError(f"ranks: {unknown[0]} is none of {', '.join(routed)}.")
    return jax.tree.map_with_path(
        lambda path, _: (
            spec._replace(rank=ranks.get(leaf_path(path))) if is_routed(path) else None
        ),
        params,
    )


def _muon_dimension_numbers(params: Params) -> Any:
    """The same for Muon."""
    return _on_routed(params, optax.contrib.MuonDimensionNumbers(-2, -1), None)


def _on_routed(params: Params, value: Any, otherwise: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: value if is_routed(path) else otherwise, params
    )


def _decayed(params: Params) -> Any:
    """Weight decay acts on matrices, also stacked ones, and not on norms."""
    return jax.tree.map_with_path(lambda path, _: group_of(path) != "norm", params)


def _layer_by_layer(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Hand each matrix of a stack to `tx` as its own, for want of batch axes."""

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: list(x) if x.ndim > 2 else x, tree)

    def init(params: Any) -> optax.OptState:
        return tx.init(split(params))

    def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
        steps, state = tx.update(split(updates), state, split(params))
        joined = jax.tree.map(
            lambda x, step: jnp.stack(step) if x.ndim > 2 else step, updates, steps
        )
        return joined, state

    return optax.GradientTransformation(init, update)
