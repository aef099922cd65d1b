"""Tunix: ``PeftTrainer`` on all weights and on LoRA's, with save and restore.

    python -m examples.frameworks.tunix_peft

Tunix 0.1.7 cannot restore the state of ``optax.partition`` as ``ldadamw`` (and
``optax.contrib.muon``) have it: it puts a sharding into each box, also into the one
around ``MaskedNode``. :func:`without_empty_boxes` keeps no such box.
"""

import tempfile
import warnings

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils

from examples.frameworks import common
from ldadam_optax import LDAdamDimensionNumbers as Dims
from ldadam_optax import dimension_numbers_by_name, einsum_dimension_numbers, ldadamw

STEPS = 40
CONFIG = llama3.ModelConfig(
    num_layers=2,
    vocab_size=common.VOCABULARY,
    embed_dim=64,
    hidden_dim=128,
    num_heads=4,
    head_dim=16,
    num_kv_heads=4,
    rope_theta=10_000,
    norm_eps=1e-5,
)


# LoRA's weights have the axes of the Einsum layers that they stand beside.
LORA = dimension_numbers_by_name(
    [
        ("q_proj/w_lora_b", Dims(0, (1, 2))),
        ("o_proj/w_lora_a", Dims((0, 1), 2)),
        ("lora", Dims()),
    ]
)


def optimizer(lora: bool) -> optax.GradientTransformation:
    numbers = LORA if lora else einsum_dimension_numbers
    return ldadamw(1e-2, rank=8, weight_dimension_numbers=numbers)


def without_empty_boxes(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose state is the list of what holds an array."""
    tx = optax.with_extra_args_support(tx)
    is_box = lambda node: isinstance(node, nnx.Variable)

    def init(params):
        boxes = jax.tree.leaves(tx.init(params), is_leaf=is_box)
        return [box for box in boxes if jax.tree.leaves(box)]

    def update(updates, state, params=None, **extra):
        whole = jax.tree.structure(jax.eval_shape(tx.init, params))
        whole_state = whole.unflatten(jax.tree.leaves(state))
        updates, whole_state = tx.update(updates, whole_state, params, **extra)
        kept = jax.tree.structure(state)
        return updates, kept.unflatten(jax.tree.leaves(whole_state))

    return optax.GradientTransformationExtraArgs(init, update)


def sharded_model(lora: bool) -> nnx.Module:
    """A Llama, as Tunix's examples place it on the mesh around."""
    model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
    if lora:
        provider = qwix.LoraProvider(
            module_path=".*q_proj|.*o_proj|.*gate_proj|.*down_proj|lm_head",
            rank=16,
            alpha=32,
        )
        inputs = model.get_model_input()
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **inputs)
    state = nnx.state(model)
    specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
    return model


def trainer_of(lora: bool, folder: str) -> peft_trainer.PeftTrainer:
    """A trainer that goes on from what the folder holds."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10_000,
        max_steps=STEPS,
        checkpoint_root_directory=folder,
        pbar_description=None,
    )
    tx = without_empty_boxes(optimizer(lora))
    trainer = peft_trainer.PeftTrainer(sharded_model(lora), tx, config)
    return trainer.with_gen_model_input_fn(model_input)


def model_input(example: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(example.input_mask),
        "attention_mask": utils.make_causal_attn_mask(example.input_mask),
    }


def examples() -> list[peft_trainer.TrainingInput]:
    return [
        peft_trainer.TrainingInput(tokens, np.ones(tokens.shape, bool))
        for tokens in common.token_batches(STEPS)
    ]


def run(lora: bool) -> None:
    """Train, check, and start a second trainer from what the first has saved."""
    kind = nnx.LoRAParam if lora else nnx.Param
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(lora, folder)
        trainer.train(examples())
        trainer.close()
        losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
        params = nnx.state(trainer.model, kind)
        whole = jax.tree.structure(jax.eval_shape(optimizer(lora).init, params))
        state = whole.unflatten(jax.tree.leaves(trainer.optimizer.opt_state))
        on_adamw = () if lora else ("embedder", "lm_head")
        common.check(losses, params, state, on_adamw, fall=0.8 if lora else 0.4)
        restored = trainer_of(lora, folder)
        assert restored.train_steps == STEPS
        # The compiled step has moved the moments of the norms, which are small.
        common.assert_same(
            nnx.state(restored.optimizer), nnx.state(trainer.optimizer), placed=False
        )


def main() -> None:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(8, 1), ("fsdp", "tp"))
    with mesh:
        for lora in (False, True):
            run(lora)


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # Tunix's own
    common.use_simulated_devices()
    main()
