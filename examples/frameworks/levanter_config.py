"""Levanter: ``OptimizerConfig.register_subclass``, and then ``type: ldadamw`` in YAML.

    python -m examples.frameworks.levanter_config

A GPT-2 and Levanter's ``TrainerState`` on an fsdp mesh. The rank is no argument of what
``inject_hyperparams`` wraps: it would be traced there.
"""

import dataclasses
import functools

import equinox as eqx
import haliax as hax
import jax
import optax
from levanter.models.gpt2 import Gpt2Config
from levanter.models.lm_model import LmExample
from levanter.optim import OptimizerConfig
from levanter.trainer_state import TrainerState

from examples.frameworks import common
from ldadam_optax import haliax_dimension_numbers, ldadamw

STEPS = 40
MODEL = Gpt2Config(max_seq_len=common.CONTEXT, hidden_dim=64, num_layers=2, num_heads=4)
# As in Levanter's trainer: one mapping for what is kept, one for what is computed.
KEPT, COMPUTED = {"embed": "fsdp"}, {"batch": "fsdp"}


@OptimizerConfig.register_subclass("ldadamw")
@dataclasses.dataclass(frozen=True)
class LDAdamConfig(OptimizerConfig):
    rank: int = 128
    beta1: float = 0.908
    beta2: float = 0.99

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        optimizer = functools.partial(
            ldadamw,
            rank=self.rank,
            b1=self.beta1,
            b2=self.beta2,
            weight_decay=self.weight_decay,
            mask=self.build_weight_decay_mask(),
            weight_dimension_numbers=haliax_dimension_numbers,
        )
        schedule = self.lr_scheduler(num_train_steps)
        return optax.inject_hyperparams(lambda learning_rate: optimizer(learning_rate))(
            learning_rate=schedule
        )


def main() -> None:
    config = LDAdamConfig(learning_rate=1e-2, rank=8, lr_schedule="constant")
    tx = config.build(STEPS)
    vocabulary = hax.Axis("vocab", common.VOCABULARY)
    batch = hax.Axis("batch", common.BATCH)

    @hax.named_jit(axis_resources=KEPT)
    def init(key):
        model = MODEL.build(vocabulary, key=key)
        return TrainerState.init(tx, model, key=key, is_trainable=True)

    @hax.named_jit(axis_resources=COMPUTED, out_axis_resources=KEPT)
    def step(state, tokens):
        def loss_of(model):
            one = lambda tokens: model.compute_next_token_loss(
                LmExample.causal(tokens), key=None
            )
            return hax.mean(hax.vmap(one, batch)(tokens)).scalar()

        loss, grads = eqx.filter_value_and_grad(loss_of)(state.trainable_model)
        state, _ = state.take_step(grads, key=state.training_key)
        return state, loss

    with hax.partitioning.set_mesh(common.fsdp_mesh()):
        state, losses = init(jax.random.key(0)), []
        for tokens in common.token_batches(STEPS):
            state, loss = step(state, hax.named(tokens, (batch, MODEL.max_Pos)))
            losses.append(float(loss))
    params = state.trainable_model
    # Of stacked layers biases and norms have two axes.
    on_adamw = ("embeddings", "lm_head", "bias", "ln_")
    common.check(losses, params, state.opt_state, on_adamw)
    common.save_and_restore((params, state.opt_state))


if __name__ == "__main__":
    common.use_simulated_devices()
    main()
