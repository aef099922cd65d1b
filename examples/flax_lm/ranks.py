"""Ranks of single leaves: what spectra of gradients make of the bytes of one rank.

    python -m examples.flax_lm.train --rank-gradients 4
    python -m examples.flax_lm.train --rank-gradients 4 --rank-run runs/short

The gradients are those of the first batches, at the first parameters or at the last of
a shorter run. The ranks become options of the run (`--ranks`), so that its config, its
checkpoints and its result have them, and a resumed run does not look again.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import ldadam_optax

from .checkpoints import Checkpoints, identity
from .config import Config, ConfigError
from .data import Data, DataError
from .model import Params, graph
from .optimizers import ldadam_options, leaf_path
from .program import Program, loss_fn


def with_proposed_ranks(program: Program, data: Data, console: Console) -> Config:
    """The config with ranks that take the bytes of its one rank, saved as the run's."""
    config = program.config
    if data.position is not None:
        raise DataError("rank_gradients is for text: of shards, batches are read once.")
    run = config.optim.rank_run
    params = last_params(Path(run), data) if run else program.init().params
    loss = partial(loss_fn, model=graph(config.model))
    with jax.set_mesh(program.mesh):
        grad = jax.jit(jax.grad(loss))
        batches = (program.batch(data, i) for i in range(config.optim.rank_gradients))
        gradients = [grad(params, batch) for batch in batches]
        ranked = proposed(config, gradients)
    console.print(f"Ranks, by {len(gradients)} gradients: {ranked.optim.ranks}")
    if jax.process_index() == 0:
        ranked.save(config.folder / "config.json")
    return ranked


def last_params(folder: Path, data: Data) -> Params:
    """The parameters in the last checkpoint of a run on the same data."""
    config = Config.load(folder / "config.json")
    with Checkpoints(folder, identity(config, data.fingerprint)) as saved:
        state, _ = saved.restore(Program(config).abstract_state)
    return state.params


def proposed(config: Config, gradients: list[Any]) -> Config:
    """The config with the ranks that `propose_ranks` finds at equal bytes."""
    options = ldadam_options(config.optim)
    budget = ldadam_optax.memory_report(gradients[0], **options).total.state
    del options["rank"]
    try:
        specs = ldadam_optax.propose_ranks(gradients, budget, **options)
    except ValueError as error:
        raise ConfigError(f"rank_gradients: {error}") from error
    is_spec = lambda spec: isinstance(spec, ldadam_optax.LDAdamDimensionNumbers)
    named = jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    ranks = ",".join(f"{leaf_path(path)}={spec.rank}" for path, spec in named)
    return config.replace(ranks=ranks)
