"""Runs over several sittings: they stop, go on, and are drawn from what they left."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common, evidence
from benchmarks.evidence_runs import EVERY_TENTH, PLANS, RANKS, Run
from benchmarks.evidence_tables import (
    TIMED,
    changes_table,
    chosen,
    draw,
    key,
    lengths_table,
    table,
)
from examples.flax_lm import train
from examples.flax_lm.config import Config, ConfigError
from ldadam_optax import scale_by_ldadam

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def job(tmp_path, monkeypatch) -> list[str]:
    """A plan of two runs on some text, and the arguments of a sitting."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(21):
        (text / f"{i:02}.txt").write_text(f"{i} is a number, as is {i * i}.\n" * 9)
    plan = [
        {"variant": "ldadamw-none", "rate": 0.01, "b2": 0.95, "steps": 4, "rank": 2}
        | {"options": options}
        for options in ({}, {"subspace_interval": 3, "transport": False})
    ]
    (tmp_path / "plan").write_text("\n".join(map(json.dumps, plan)) + "\n\n")
    small = Config().replace(
        **{"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 24},
        **{"batch_size": 4, "context": 16, "mesh": "data=1", "progress": False},
        **{"eval_every": 2, "eval_tokens": 64, "log_every": 1, "sample_tokens": 0},
    )
    names = ("evidence-main", "evidence-main-changes")
    marks = "\n".join(f"<!-- {name} --><!-- /{name} -->" for name in names)
    (tmp_path / "page.md").write_text(marks)
    monkeypatch.setitem(RANKS, "main", 2)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "FIGURES", tmp_path)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(evidence, "base", lambda job, data: small.replace(data=data))
    out = ["--out", str(tmp_path / "runs"), "--plan", str(tmp_path / "plan")]
    return [*out, "--data", str(text)]


def test_a_sitting_goes_on_where_the_last_one_stopped(job, tmp_path, monkeypatch):
    """The time of the first is over after a step or two of the first run."""
    first, second = Run.read(tmp_path / "plan")
    with pytest.raises(SystemExit, match="no results yet"):
        evidence.main([*job, "--hours", "1e-9"])
    folder = tmp_path / "results" / "evidence" / "main"
    assert not folder.exists()
    saved = tmp_path / "runs" / "main" / first.name / "checkpoints"
    assert any(saved.glob("[0-9]*"))
    evidence.main(job)
    whole = [
        json.loads((folder / f"{run.name}.json").read_text()) for run in (first, second)
    ]
    assert [run["steps_of_curve"] for run in whole] == [[2, 4]] * 2
    assert whole[0]["perplexity"][-1] != whole[1]["perplexity"][-1]
    assert whole[0]["b2"] == 0.95
    assert (tmp_path / "evidence-main.png").stat().st_size > 1000
    page = (tmp_path / "page.md").read_text()
    assert "| ldadamw-none | 2 | 0.01 | 0.95 |  | 4 | 1 |" in page
    changed = "| 0.01 | 0.95 | subspace_interval 3, transport False | 4 | 1 |"
    assert f"| ldadamw-none {changed}" in page
    # All is done: nothing is trained, what is there is drawn.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    evidence.main(job)
    # The time of a step is measured apart; seconds are so many steps of it.
    monkeypatch.setattr(evidence, "ROUNDS", 2)
    evidence.main([*job, "--time"])
    (times,) = evidence.step_times("main").values()
    assert times > 0
    page = (tmp_path / "page.md").read_text()
    assert page.split("seconds |")[1].splitlines()[2].endswith(f" | {4 * times:.0f} |")


def write_plan(path: Path, runs: list[Run]) -> None:
    path.write_text("".join(json.dumps(vars(run)) + "\n" for run in runs))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("ldadamw-recovery", {"subspace_interval": 3, "transport": False}),
        ("adafactor", {"weight_decay": 0.1}),
    ],
)
def test_runs_side_by_side_are_those_of_each_alone(job, tmp_path, variant, options):
    """Rates and seeds in one program: another rate or seed would show, rounding not."""
    runs = [
        Run(variant, rate, 0.95, 2, seed, 6, options)
        for rate, seed in ((0.01, 0), (0.03, 1))
    ]
    write_plan(tmp_path / "plan", runs)
    folder = tmp_path / "results" / "evidence" / "main"
    found = []
    for more in (["--together", "2"], []):
        evidence.main([*job, *more])
        paths = [folder / f"{run.name}.json" for run in runs]
        found.append([json.loads(path.read_text()) for path in paths])
        for path in paths:
            path.unlink()
    side_by_side, alone = found
    for one, other in zip(side_by_side, alone, strict=True):
        for name in ("state_bytes", "parameters", "steps_of_curve", "tokens_a_step"):
            assert one[name] == other[name]
        np.testing.assert_allclose(one["perplexity"], other["perplexity"], rtol=2e-4)
    first, second = (one["perplexity"][-1] for one in alone)
    assert abs(first - second) > 2e-3 * first
    assert not (tmp_path / "runs" / "main" / "sweep-0" / "checkpoints").exists()


def test_sweeps_hold_runs_that_differ_in_rate_and_seed_alone():
    one, other = Run("adamw", 0.01), Run("muon", 0.01)
    alike = [dataclasses.replace(one, rate=rate, seed=1) for rate in (0.02, 0.03)]
    changes: list[Any] = [
        {"b2": 0.9},
        {"rank": 8},
        {"steps": 9},
        {"options": {"b1": 0.5}},
    ]
    others = [other, *(dataclasses.replace(one, **change) for change in changes)]
    runs = [others[0], one, *others[1:], *alike]
    singles = [[run] for run in others]
    together = [singles[0], [one, *alike], *singles[1:]]
    assert evidence.sweeps(runs, 3) == together
    assert evidence.sweeps(runs, 2)[1] == [one, alike[0]]
    assert evidence.sweeps(runs, 1) == [[run] for run in runs]


def test_a_sweep_refuses_weights_that_are_rounded_stochastically(job, tmp_path):
    options = {"param_dtype": "bfloat16", "stochastic_rounding": True}
    runs = [Run("ldadamw-none", x, 0.95, 2, 0, 6, options) for x in (0.1, 0.2)]
    write_plan(tmp_path / "plan", runs)
    with pytest.raises(SystemExit, match="stochastic_rounding must be off"):
        evidence.main([*job, "--together", "2"])


def result(variant: str, rate: float, seed: int, end: float | None) -> dict:
    run = {"variant": variant, "rate": rate, "b2": 0.99, "rank": 16, "seed": seed}
    run |= {"options": {}, "steps": 2, "state_bytes": 8}
    return run | {"steps_of_curve": [1, 2], "perplexity": [9.0, end]}


def test_the_best_setting_is_that_of_the_mean_over_seeds(tmp_path):
    found = [
        result("adamw", 1e-2, 0, 4.0),
        result("adamw", 1e-2, 1, None),  # diverged
        result("adamw", 1e-3, 0, 5.0),
        result("adamw", 1e-3, 1, 5.5),
        result("adamw", 3e-3, 0, 3.0),  # lucky, as far as one seed tells
        result("muon", 1e-2, 0, 4.5),
    ]
    muon, adamw = chosen(found, rank=16)
    assert [run["rate"] for run in adamw] == [1e-3, 1e-3]
    assert muon[0]["variant"] == "muon"
    row = "| adamw | 16 | 0.001 | 0.99 |  | 2 | 2 | 1.657 | 0.095 | 5.250 |"
    assert row in table(found, 16, {})
    times = {key(adamw[0], TIMED): 1.5}  # Muon was not measured
    lines = [line.split("|") for line in table(found, 16, times).splitlines()[2:]]
    assert [line[-2].strip() for line in lines] == ["", "3"]
    draw(found, 16, tmp_path / "figure.png", times)


def test_a_basis_that_moves_every_tenth_step_stands_beside_the_plain_one():
    tenth = {"options": EVERY_TENTH}
    found = [
        result("ldadamw-recovery", 1e-2, 0, 4.0),
        result("ldadamw-recovery", 3e-3, 0, 3.0) | tenth | {"rank": 32},
        result("ldadamw-recovery", 1e-2, 0, 5.0) | tenth,
        result("ldadamw-recovery", 6e-3, 0, 6.0) | tenth,
        result("ldadamw-recovery", 1e-2, 0, 2.0) | {"options": {"rho": 0.5}},
    ]
    assert [runs[0]["perplexity"][-1] for runs in chosen(found, 16)] == [3, 4]
    row = "| ldadamw-recovery | 32 | 0.003 | 0.99 | subspace_interval 10 | 2 | 1 |"
    assert row in table(found, 16, {})
    lines = changes_table(found, 16).splitlines()[2:]
    told = [[cell.strip() for cell in line.split("|")[4:7:2]] for line in lines]
    assert told == [
        ["subspace_interval 10", "1"],  # beside the plain one of its rate
        ["rank 16, rate 0.006", "1"],  # beside the best that moves so
        ["rho 0.5", "1"],
    ]


def test_a_changed_option_is_held_against_the_same_seeds():
    found = [result("ldadamw-recovery", 1e-2, seed, 4.0 + seed) for seed in (0, 1, 2)]
    found += [
        result("ldadamw-recovery", 1e-2, 1, 6.0) | {"options": {"rho": 0.5}},
        result("ldadamw-recovery", 1e-2, 0, 2.0) | {"rank": 8, "b2": 0.9},
        result("ldadamw-recovery", 1e-3, 0, 5.0),
        result("ldadamw-recovery", 1e-3, 0, 6.0) | {"options": {"rho": 0.5}},
    ]
    assert len(chosen(found, rank=16)) == 1
    row = "| ldadamw-recovery"
    assert changes_table(found, 16).splitlines()[2:] == [
        f"{row} | 0.01 | 0.99 | rho 0.5 | 2 | 1 | 1.792 | +0.182 | +11.3 | 0.0 |",
        f"{row} | 0.01 | 0.9 | rank 8, b2 0.9 | 2 | 1 | 0.693 | -0.693 | -50.0 | 0.0 |",
        f"{row} | 0.001 | 0.99 | rate 0.001 | 2 | 1 | 1.609 | +0.223 | +16.1 | 0.0 |",
        f"{row} | 0.001 | 0.99 | rho 0.5 | 2 | 1 | 1.792 | +0.182 | +11.3 | 0.0 |",
    ]


def test_lengths_stand_beside_each_other():
    longer = {"steps": 6, "steps_of_curve": [3, 6]}
    found = [
        *(result("adamw", 1e-2, seed, 4.0) for seed in (0, 1)),
        result("adamw", 1e-2, 0, 3.0) | longer,
        result("ldadamw-recovery", 1e-2, 0, 5.0) | {"options": {"rho": 0}},
        result("ldadamw-recovery", 1e-2, 0, 2.0) | longer | {"options": {"rho": 0}},
        result("ldadamw-recovery", 1e-2, 0, 1.0),  # one length alone
    ]
    assert lengths_table(found).splitlines()[2:] == [
        "| ldadamw-recovery | 16 | 0.01 | 0.99 | rho 0 | 1.609 (1) | 0.693 (1) | 0.0 |",
        "| adamw | 16 | 0.01 | 0.99 |  | 1.386 (2) | 1.099 (1) | 0.0 |",
    ]


def test_moments_that_stay_as_they_were_change_the_second_step(key):
    """Not the first, which has none to carry."""

    def updates() -> list[Any]:
        tx = scale_by_ldadam(2, residual="recovery")
        params = jnp.zeros((6, 8))
        state, found = tx.init(params), []
        for grads in jax.random.normal(key, (2, 6, 8)):
            update, state = tx.update(grads, state, params)
            found.append(update)
        return found

    carried = updates()
    with evidence.moments_as_they_were():
        kept = updates()
    np.testing.assert_allclose(carried[0], kept[0], rtol=1e-5)
    assert np.abs(carried[1] - kept[1]).max() > 0.1
    np.testing.assert_allclose(carried, updates(), rtol=1e-5)
    with pytest.raises(ConfigError, match="without an error buffer"):
        Run("ldadamw-int8", 1e-2, options={"transport": False})


def test_a_plan_with_a_wrong_line_is_refused(tmp_path):
    plan = tmp_path / "plan"
    for line, told in (('{"variant": "sgd", "rate": 1}', "sgd"), ("{}", "variant")):
        plan.write_text('{"variant": "adamw", "rate": 1}\n' + line)
        with pytest.raises(ConfigError, match=f"line 2: .*{told}"):
            Run.read(plan)


@pytest.mark.parametrize("job", PLANS)
def test_a_plan_tunes_adamw_over_b2_and_names_each_run_once(job):
    plan = PLANS[job]
    assert len({run.name for run in plan}) == len(plan)
    assert {run.b2 for run in plan if run.variant == "adamw"} == {0.95, 0.99, 0.999}


@pytest.mark.parametrize("job", PLANS)
def test_each_result_in_the_repository_is_of_its_plan(job):
    """So that the command makes it again."""
    made = {path.stem for path in evidence.result_folder(job).glob("*.json")}
    assert made
    assert made <= {run.name for run in PLANS[job]}
