"""Runs over several sittings: they stop, go on, and are drawn from what they left."""

import json

import pytest

from benchmarks import common, evidence
from examples.flax_lm import train
from examples.flax_lm.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def job(tmp_path, monkeypatch) -> list[str]:
    """A plan of two runs on some text, and the arguments of a sitting."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(21):
        (text / f"{i:02}.txt").write_text(f"{i} is a number, as is {i * i}.\n" * 9)
    plan = [
        {"variant": "adamw", "rate": 0.01, "b2": 0.95, "steps": 4},
        {"variant": "ldadamw-none", "rate": 0.01, "steps": 4, "rank": 2}
        | {"options": {"subspace_interval": 3}},
    ]
    (tmp_path / "plan").write_text("\n".join(map(json.dumps, plan)) + "\n\n")
    small = Config().replace(
        **{"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 24},
        **{"batch_size": 4, "context": 16, "mesh": "data=1", "progress": False},
        **{"eval_every": 2, "eval_tokens": 64, "log_every": 1, "sample_tokens": 0},
    )
    (tmp_path / "page.md").write_text("<!-- evidence-main --><!-- /evidence-main -->")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "FIGURES", tmp_path)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(evidence, "base", lambda job, data: small.replace(data=data))
    out = ["--out", str(tmp_path / "runs"), "--plan", str(tmp_path / "plan")]
    return [*out, "--data", str(text)]


def test_a_sitting_goes_on_where_the_last_one_stopped(job, tmp_path, monkeypatch):
    """The time of the first is over after a step or two of the first run."""
    first, second = evidence.Run.read(tmp_path / "plan")
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
    assert whole[0]["state_bytes"] > whole[1]["state_bytes"]
    assert whole[0]["b2"] == 0.95
    assert (tmp_path / "evidence-main.png").stat().st_size > 1000
    rows = (tmp_path / "page.md").read_text().splitlines()[3:]
    labels = {row.split(" | ")[0] for row in rows if " | " in row}
    assert labels == {"| adamw", "| ldadamw-none, subspace_interval 3"}
    # All is done: nothing is trained, what is there is drawn.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    evidence.main(job)


def result(variant: str, rate: float, seed: int, end: float | None) -> dict:
    run = {"variant": variant, "rate": rate, "b2": 0.99, "rank": 16, "seed": seed}
    run |= {"options": {}, "steps": 2, "state_bytes": 8, "seconds": [1.0, 2.0]}
    return run | {"steps_of_curve": [1, 2], "perplexity": [9.0, end]}


def test_the_best_setting_is_that_of_the_mean_over_seeds(tmp_path):
    found = [
        result("adamw", 1e-2, 0, 4.0),
        result("adamw", 1e-2, 1, None),  # diverged
        result("adamw", 1e-3, 0, 5.0),
        result("adamw", 1e-3, 1, 5.5),
        result("muon", 1e-2, 0, 4.5),
    ]
    muon, adamw = evidence.best_of_each(found)
    assert [run["rate"] for run in adamw] == [1e-3, 1e-3]
    assert muon[0]["variant"] == "muon"
    row = "| adamw | 16 | 0.001 | 0.99 | 2 | 2 | 1.657 | 0.095 | 5.250 |"
    assert row in evidence.table(found)
    assert "seconds" in evidence.table(found, seconds=True)
    evidence.draw(found, tmp_path / "figure.png", seconds=True)


def test_a_plan_with_a_wrong_line_is_refused(tmp_path):
    plan = tmp_path / "plan"
    for line, told in (('{"variant": "sgd", "rate": 1}', "sgd"), ("{}", "variant")):
        plan.write_text('{"variant": "adamw", "rate": 1}\n' + line)
        with pytest.raises(ConfigError, match=f"line 2: .*{told}"):
            evidence.Run.read(plan)


@pytest.mark.parametrize("job", evidence.PLANS)
def test_a_plan_tunes_adamw_over_b2_and_names_each_run_once(job):
    plan = evidence.PLANS[job]
    assert len({run.name for run in plan}) == len(plan)
    assert {run.b2 for run in plan if run.variant == "adamw"} == {0.95, 0.99, 0.999}
