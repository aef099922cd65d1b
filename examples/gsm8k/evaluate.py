"""Answer loss, and exact match by greedy decoding with a key-value cache.

    python -m examples.gsm8k.evaluate --model DIR --data GSM8K_DIR

prints one line of JSON; `--predictions FILE` keeps what the model wrote.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples.flax_lm import sharding
from examples.flax_lm.config import ConfigError, Dtype, ModelConfig
from examples.flax_lm.model import Params, empty_cache, graph
from examples.hf.tokenizer import Tokenizer

from .data import Batch, Problem, batches_by_length, number_of, put
from .loading import Loaded, load


def summed_loss(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """Negative log-likelihood of the answers' tokens, each with its weight, in nats."""
    logits_btv = nnx.merge(graph(config), params)(batch.tokens[:, :-1])
    losses_bt = optax.softmax_cross_entropy_with_integer_labels(
        logits_btv, batch.tokens[:, 1:]
    )
    return jnp.sum(losses_bt * batch.weights)


_summed_loss = jax.jit(summed_loss, static_argnums=2)


def answer_loss(
    config: ModelConfig,
    params: Params,
    problems: list[Problem],
    batch_size: int,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> float:
    """Mean loss of the answers' tokens over all problems, in nats a token."""
    rows = sharding.batch_sharding(mesh, batch_size, 1)
    lengths = [len(problem.tokens) - 1 for problem in problems]
    parts = batches_by_length(problems, batch_size, lengths)
    total = 0.0
    with jax.set_mesh(mesh):
        for places, length in _bar(parts, "answer loss", progress):
            chosen = [problems[i] for i in places]
            batch = put(chosen, (batch_size, length), rows)
            total += float(_summed_loss(params, batch, config))
    return total / sum(len(p.tokens) - p.start for p in problems)


@partial(jax.jit, static_argnames=("config", "new", "ends"))
def greedy(
    params: Params,
    prompts_bt: jax.Array,
    lengths_b: jax.Array,
    *,
    config: ModelConfig,
    new: int,
    ends: tuple[int, ...],
) -> jax.Array:
    """Go on with each prompt by the likeliest token, all of them side by side.

    Args:
      params: The model's parameters.
      prompts_bt: Prompts, filled up on the right.
      lengths_b: Their lengths; each at least 1.
      config: The model's config.
      new: Tokens that are added at most.
      ends: Tokens that end an answer.

    Returns:
      The new tokens, shape (b, new); after an end there are only ends.
    """
    b, t = prompts_bt.shape
    model = graph(config)
    places_bt = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    logits_bv, cache = nnx.merge(model, params).decode(
        prompts_bt, places_bt, empty_cache(config, b, t + new), lengths_b - 1
    )
    first_b = jnp.zeros(b, jnp.int32)

    def ended(tokens_b: jax.Array) -> jax.Array:
        return jnp.isin(tokens_b, jnp.asarray(ends))

    def go_on(carry: Any) -> jax.Array:
        i, _, _, done_b, _ = carry
        return (i < new) & ~done_b.all()

    def step(carry: Any) -> Any:
        i, logits_bv, cache, done_b, made_bn = carry
        token_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        token_b = jnp.where(done_b, ends[0], token_b)
        made_bn = made_bn.at[:, i].set(token_b)
        logits_bv, cache = nnx.merge(model, params).decode(
            token_b[:, None], (lengths_b + i)[:, None], cache, first_b
        )
        return i + 1, logits_bv, cache, done_b | ended(token_b), made_bn

    made_bn = jnp.full((b, new), ends[0], jnp.int32)
    start = (0, logits_bv, cache, jnp.zeros(b, bool), made_bn)
    return jax.lax.while_loop(go_on, step, start)[-1]


def solve(
    config: ModelConfig,
    params: Params,
    problems: list[Problem],
    tokenizer: Tokenizer,
    ends: tuple[int, ...],
    batch_size: int,
    new: int,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> list[str]:
    """What the model writes after each prompt."""
    rows = sharding.batch_sharding(mesh, batch_size, 1)
    whole = NamedSharding(mesh, P())
    lengths = [problem.start for problem in problems]
    solutions = [""] * len(problems)
    with jax.set_mesh(mesh):
        parts = batches_by_length(problems, batch_size, lengths)
        for places, length in _bar(parts, "solving", progress):
            prompts = np.zeros((batch_size, length), np.int32)
            counts = np.ones(batch_size, np.int32)
            for row, i in enumerate(places):
                counts[row] = lengths[i]
                prompts[row, : counts[row]] = problems[i].tokens[: counts[row]]
            made = greedy(
                params,
                jax.device_put(prompts, rows),
                jax.device_put(counts, rows),
                config=config,
                new=new,
                ends=ends,
            )
            made = np.asarray(jax.device_put(made, whole))
            for row, i in enumerate(places):
                tokens = made[row].tolist()
                stop = next((n for n, x in enumerate(tokens) if x in ends), new)
                solutions[i] = tokenizer.decode(tokens[:stop])
    return solutions


def exact_match(problems: list[Problem], solutions: list[str]) -> float:
    """Share of the problems whose number after `####` is the solution's."""
    return float(
        np.mean(
            [
                number_of(solution) == number_of(problem.answer)
                for problem, solution in zip(problems, solutions, strict=True)
            ]
        )
    )


def _bar(parts: list[Any], name: str, progress: bool) -> Any:
    shown = progress and jax.process_index() == 0
    return tqdm(parts, desc=name, unit="batch", disable=not shown, leave=False)


@dataclasses.dataclass(frozen=True)
class Options:
    model: Path
    """Folder of the model, as transformers writes it."""
    data: Path
    """Folder with train.jsonl and test.jsonl."""
    problems: int = 0
    """Test problems, the first ones; 0: all."""
    batch_size: int = 32
    """Problems side by side."""
    max_new_tokens: int = 256
    """Tokens of a solution at most; 0: the answer loss only."""
    dtype: Dtype = "float32"
    """Dtype of weights, activations and products."""
    predictions: Path | None = None
    """File for the solutions, a line of JSON for each."""
    mesh: str = "data=1,fsdp=-1,tensor=1"
    """Devices along each axis; -1: those that are left."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        numbers = self.problems, self.batch_size - 1, self.max_new_tokens
        if min(numbers) < 0:
            raise ConfigError(
                "Rule: problems and max_new_tokens are not negative, batch_size is at "
                f"least 1. Given: {self}."
            )


def evaluate(options: Options) -> dict[str, Any]:
    """Answer loss and exact match of a folder's model."""
    mesh = sharding.make_mesh(options.mesh)
    loaded: Loaded = load(
        options.model,
        options.data,
        mesh,
        dtype=options.dtype,
        param_dtype=options.dtype,
        progress=options.progress,
    )
    test = loaded.problems.test[: options.problems or None]
    shared = {"mesh": mesh, "progress": options.progress}
    size, config, params = options.batch_size, loaded.config, loaded.params
    result = {
        "problems": len(test),
        "answer_loss": answer_loss(config, params, test, size, **shared),
    }
    if options.max_new_tokens:
        solutions = solve(
            config,
            params,
            test,
            loaded.tokenizer,
            loaded.ends,
            size,
            options.max_new_tokens,
            **shared,
        )
        result["exact_match"] = exact_match(test, solutions)
        if options.predictions is not None:
            write_solutions(options.predictions, test, solutions)
    return result


def write_solutions(path: Path, problems: list[Problem], solutions: list[str]) -> None:
    """One line of JSON for each problem."""
    lines = [
        json.dumps(
            {
                "solution": solution,
                "answer": problem.answer,
                "right": number_of(solution) == number_of(problem.answer),
            }
        )
        for problem, solution in zip(problems, solutions, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        print(json.dumps(evaluate(options)))
    except (ValueError, OSError) as error:  # those of this project among them
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
