"""The optimizers of a comparison: each on the kernels of attention and MLP.

Embeddings, norms, biases, pooler and head take AdamW in every case; `adamw` and
`adafactor` are one rule for all. All are made for the learning rate 1, and the step
multiplies by the rate of the schedule: every one of them is linear in it, and so one
compiled step serves all rates.
"""

from typing import Any

import jax
import optax

import ldadam_optax

from .config import OptimConfig

# Options of `ldadamw` by variant; the other names are optimizers of optax.
LDADAM: dict[str, dict[str, Any]] = {
    "ldadamw": {},
    "ldadamw-int8": {"error_dtype": "int8"},
    "ldadamw-recovery": {"residual": "recovery"},
}


def is_routed(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is, or belongs to, a kernel of attention or MLP."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1:] == ["kernel"] and ("attention" in names or "mlp" in names)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer at the learning rate 1."""
    name = optim.optimizer
    clip = (optax.clip_by_global_norm(optim.clip_norm),) if optim.clip_norm else ()
    if name in LDADAM:
        tx = ldadam_optax.ldadamw(1.0, **ldadam_options(optim))
    else:
        make = {"adamw": _adamw, "galore": _galore, "adafactor": _adafactor}
        tx = make[name](optim)
    return optax.chain(*clip, tx)


def ldadam_options(optim: OptimConfig) -> dict[str, Any]:
    """What `ldadamw` takes."""
    return {
        "rank": optim.rank,
        "b1": optim.b1,
        "b2": optim.b2,
        "eps": optim.eps,
        "rho": optim.rho,
        "weight_decay": optim.weight_decay,
        "mask": _decayed,
        "weight_dimension_numbers": _dimension_numbers,
        **LDADAM[optim.optimizer],
    }


def _adamw(optim: OptimConfig) -> optax.GradientTransformation:
    return optax.adamw(
        1.0,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=_decayed,
    )


def _adafactor(optim: OptimConfig) -> optax.GradientTransformation:
    """Without the parameters' scale, so that learning rates mean what Adam's do."""
    return optax.adafactor(
        1.0,
        multiply_by_parameter_scale=False,
        weight_decay_rate=optim.weight_decay or None,
        weight_decay_mask=_decayed,
    )


def _galore(optim: OptimConfig) -> optax.GradientTransformation:
    galore = optax.contrib.galore(
        1.0,
        rank=optim.rank,
        update_proj_gap=optim.galore_gap,
        scale=optim.galore_scale,
        base_optimizer=optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        weight_decay=optim.weight_decay,
    )
    return optax.partition(
        {"galore": galore, "adamw": _adamw(optim)},
        lambda params: _on_routed(params, "galore", "adamw"),
    )


def _dimension_numbers(params: Any) -> Any:
    return _on_routed(params, ldadam_optax.LDAdamDimensionNumbers(0, 1), None)


def _on_routed(params: Any, value: Any, otherwise: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: value if is_routed(path) else otherwise, params
    )


def _decayed(params: Any) -> Any:
    """Weight decay acts on matrices, not on norms and biases."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def state_bytes(optim: OptimConfig, params: Any) -> dict[str, int]:
    """Bytes of the optimizer's state, and those of it for attention and MLP kernels."""
    state = jax.eval_shape(make_optimizer(optim).init, params)
    leaves = [
        (path, leaf.size * leaf.dtype.itemsize)
        for path, leaf in jax.tree.leaves_with_path(state)
    ]
    return {
        "all": sum(size for _, size in leaves),
        "matrices": sum(size for path, size in leaves if is_routed(path)),
    }
