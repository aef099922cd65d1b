"""Small models and tokenizers in the formats that users have on disk."""

from pathlib import Path

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.flax_lm.config import ModelConfig
from examples.flax_lm.model import Params, init_params
from examples.hf import architectures, checkpoints, llama
from examples.hf.checkpoints import write_json

TEXT = [
    "Question: Anna has 3 apples and buys 4 more. How many has she now?",
    "Answer: She has 3 + 4 = <<3+4=7>>7 apples.",
    "#### 7",
    "The quick brown fox, it's said, jumps over 12 lazy dogs in 1999.",
]
SMALL = ModelConfig(
    vocab_size=320,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=48,
    tied_head=True,
    norm_eps=1e-5,
    scan_layers=True,
)


def byte_pairs(size: int = SMALL.vocab_size) -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose first tokens are <end> and <begin>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


def small_params(config: ModelConfig = SMALL, seed: int = 0) -> Params:
    return jax.jit(init_params, static_argnums=(0, 1))(config, seed)


def tensors_of(params: Params) -> dict[str, np.ndarray]:
    """The parameters by transformers' names, as transformers has them."""
    leaves = {
        tuple(key.key for key in path): x
        for path, x in jax.tree.leaves_with_path(params)
    }
    entries = llama.entries(SMALL)
    return {e.tensor: checkpoints._tensor_of(e, leaves[e.path]) for e in entries}


def save_small(folder: Path, config: ModelConfig = SMALL) -> Params:
    """A folder with a random model and a tokenizer; returns the parameters."""
    params = small_params(config)
    architectures.save(folder, llama, config, params)
    byte_pairs().save(str(folder / "tokenizer.json"))
    json = llama.to_json(config) | {"eos_token_id": 0, "bos_token_id": 1}
    write_json(folder / "config.json", json)
    return params
