"""eformer, EasyDeL's optimizers: ``register_optimizer`` and then ``ldadamw`` by name.

    python -m examples.frameworks.eformer_factory

Weight decay, clipping and accumulation are the factory's own; give them to ``create``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from eformer.optimizers import OptimizerFactory, SchedulerConfig
from eformer.optimizers._base import OptimizerBuilder, register_optimizer
from eformer.optimizers._config import SerializationMixin

from examples.frameworks import common
from ldadam_optax import ldadamw


@dataclasses.dataclass
class LDAdamConfig(SerializationMixin):
    rank: int = 16
    b1: float = 0.908
    b2: float = 0.99
    error_dtype: str | None = None


@register_optimizer("ldadamw")
@dataclasses.dataclass
class LDAdamBuilder(OptimizerBuilder):
    config: LDAdamConfig

    def build(self, scheduler: optax.Schedule) -> optax.GradientTransformation:
        return ldadamw(scheduler, **dataclasses.asdict(self.config))


def init(key: jax.Array) -> dict:
    """A model with the names that EasyDeL's have."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return {
        "embed_tokens": {"embedding": normal(keys[0], common.VOCABULARY, 64)},
        "mlp": {
            "up_proj": {"kernel": normal(keys[1], 64, 128)},
            "down_proj": {"kernel": normal(keys[2], 128, 64)},
        },
        "norm": {"kernel": jnp.ones(64)},
        "lm_head": {"kernel": jnp.zeros((64, common.VOCABULARY))},
    }


def loss_of(params: dict, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token, told by the one before."""
    x = params["embed_tokens"]["embedding"][tokens[:, :-1]]
    hidden = jax.nn.gelu(x @ params["mlp"]["up_proj"]["kernel"])
    x = x + hidden @ params["mlp"]["down_proj"]["kernel"]
    logits = x * params["norm"]["kernel"] @ params["lm_head"]["kernel"]
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(logits, tokens[:, 1:]).mean()


def main() -> None:
    tx, _ = OptimizerFactory.create(
        "ldadamw",
        SchedulerConfig("cosine", 1e-2, steps=60, warmup_steps=5),
        LDAdamConfig(rank=8),
        weight_decay=0.01,
        clip_grad=1.0,
    )
    tokens = jnp.asarray(next(common.token_batches(1)))
    params = init(jax.random.key(0))
    losses, params, state = common.train_sharded(
        params, lambda params: loss_of(params, tokens), tx
    )
    common.check(losses, params, state, on_adamw=("embed_tokens", "lm_head"))
    common.save_and_restore((params, state))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
