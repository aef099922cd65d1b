"""The main job tried by hand: options, folders and disks that do not fit, and more."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from examples.flax_lm import files as files_of_runs
from examples.flax_lm import folder as run_folder
from examples.flax_lm import report
from examples.flax_lm.checkpoints import Checkpoints
from examples.flax_lm.command_line import parse
from examples.flax_lm.config import Config, ConfigError
from examples.flax_lm.optimizers import learning_rate
from examples.flax_lm.presets import SIZES, VARIANTS, preset, sized, with_variant
from examples.flax_lm.train import main

pytestmark = pytest.mark.usefixtures("compile_once")
MODEL = ["--d-model=16", "--n-layers=1", "--n-heads=2", "--n-kv-heads=2", "--d-mlp=24"]
SMALL = [
    *MODEL,
    *("--steps=4", "--batch-size=4", "--context=16", "--optimizer=adamw"),
    *("--mesh=data=1",),
    *("--eval-every=2", "--eval-tokens=64", "--log-every=1", "--sample-tokens=4"),
    "--diagnostics-every=0",
    *("--checkpoint-every=2", "--no-progress"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i in range(21):
        (folder / f"{i:02}.txt").write_text(f"{i} is a number, as is {i * i}.\n" * 9)
    return f"--data={folder}"


@pytest.fixture(scope="module")
def whole(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main([*SMALL, text, "--out", str(folder)])
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(whole, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# Options.


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"context": 0}, "context is at least 1"),
        ({"n_layers": 0}, "n_layers is at least 1"),
        ({"rank": 0}, "rank is at least 1"),
        ({"eval_tokens": 0}, "eval_tokens is at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is positive"),
        ({"b1": 1.0}, r"b1 lies in \[0, 1\)"),
        ({"seed": -1}, "seed is at least 0"),
        ({"residual": "recovery", "error_dtype": "int8"}, "error_dtype is for"),
        ({"num_processes": 2}, "coordinator HOST:PORT"),
        ({"bathc_size": 4}, "no option bathc_size"),
    ],
)
def test_options_are_refused_by_their_rule(option, rule):
    with pytest.raises(ConfigError, match=rule):
        Config().replace(**option)


def test_recovery_is_one_option():
    config = parse(["--residual", "recovery"])
    assert config.optim == with_variant(Config(), "ldadamw-recovery").optim


def test_every_variant_and_size_makes_a_config():
    names = {with_variant(Config(), name).optim for name in VARIANTS}
    assert len(names) == len(VARIANTS)
    for name, size in SIZES.items():
        model = sized(Config(), name).model
        assert (model.d_model, model.n_layers) == (size.d_model, size.n_layers)
    # A variant is the same whatever the config was before.
    before = with_variant(Config(), "ldadamw-recovery")
    assert with_variant(before, "ldadamw-int8") == with_variant(
        Config(), "ldadamw-int8"
    )


def test_presets_have_the_published_settings():
    config = preset("llama-350m")
    assert config.train.tokens == 512 * 256
    optim = config.optim
    assert (optim.learning_rate, optim.b1, optim.b2) == (1e-3, 0.908, 0.99)
    assert (optim.rho, optim.weight_decay, optim.clip_norm) == (0.908, 0.0, 0.0)
    rate = learning_rate(config.optim, config.train)
    warm = config.train.steps // 10
    np.testing.assert_allclose(rate(warm), 1e-3)
    np.testing.assert_allclose(rate(config.train.steps), 1e-4, rtol=1e-6)
    assert config.model.dtype == "bfloat16"


def test_help_is_grouped_and_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = capsys.readouterr().out
    headings = re.findall(r"^\W+(\w+) options \W+$", told, re.MULTILINE)
    assert headings == list(Config.sections())
    assert max(map(len, told.splitlines()[1:])) <= 80
    for section in Config.sections():
        for name in vars(getattr(Config(), section)):
            assert f"{name.replace('_', '-')}" in told


# Folders.


def test_overwrite_deletes_what_a_run_has_written(finished, text):
    before = files(finished)
    assert all(map(run_folder._WRITTEN.fullmatch, before.keys() - {"flax_lm.run"}))
    main([*SMALL, text, "--out", str(finished), "--overwrite", "--steps=2"])
    after = files(finished)
    assert {n.split("/")[1] for n in after if n.startswith("checkpoints")} == {"2"}
    assert len(report.read_metrics(finished / "metrics.csv")) == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "notes/thesis.txt",
        "checkpoints/best/weights.npz",
        "checkpoints/4/state/d/weights.npz",
        "tensorboard/curve.png",
    ],
)
def test_overwrite_deletes_nothing_beside_a_file_of_others(finished, text, name):
    (finished / name).parent.mkdir(parents=True, exist_ok=True)
    (finished / name).write_text("mine")
    before = files(finished)
    with pytest.raises(SystemExit, match=rf"{name} was not written by a run"):
        main([*SMALL, text, "--out", str(finished), "--overwrite"])
    assert files(finished) == before


def test_a_folder_with_a_config_is_not_a_run(tmp_path, text):
    """A Hugging Face model has a config.json as well."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = files(tmp_path)
    with pytest.raises(SystemExit, match="holds files but no run"):
        main([*SMALL, text, "--out", str(tmp_path), "--overwrite"])
    with pytest.raises(SystemExit, match="is not a saved config"):
        main([*SMALL, text, "--out", str(tmp_path), "--resume"])
    with pytest.raises(run_folder.FolderError, match="holds no run to resume"):
        run_folder.prepare_folder(Config().replace(out=str(tmp_path), resume=True))
    assert files(tmp_path) == before


def test_overwrite_follows_no_link(finished, text, tmp_path):
    """A link to a folder of the user's is not the run's, whatever its name."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "events.out.tfevents.1").write_text("mine")
    for path in (finished / "tensorboard").iterdir():
        path.unlink()
    (finished / "tensorboard").rmdir()
    (finished / "tensorboard").symlink_to(precious)
    with pytest.raises(SystemExit, match="tensorboard was not written by a run"):
        main([*SMALL, text, "--out", str(finished), "--overwrite"])
    assert (precious / "events.out.tfevents.1").exists()


def test_an_interrupted_deletion_leaves_a_run(finished, text, monkeypatch):
    unlink, seen = Path.unlink, []

    def stops(path, **options):
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stops)
        with pytest.raises(KeyboardInterrupt):
            main([*SMALL, text, "--out", str(finished), "--overwrite"])
    main([*SMALL, text, "--out", str(finished), "--overwrite"])
    assert (finished / "result.json").exists()


def test_out_on_a_file_or_below_one_is_refused(tmp_path, text):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        with pytest.raises(SystemExit, match=r"--out must be a folder: .*file is a"):
            main([*SMALL, text, "--out", str(tmp_path / out)])
    assert (tmp_path / "file").read_text() == "mine"


# Full disks.


def test_an_interrupted_writing_leaves_the_old_file(finished, text):
    path = finished / "result.json"
    before = path.read_bytes()

    def stopped_on_the_way():
        with files_of_runs.whole(path) as beside:
            beside.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_on_the_way()
    assert path.read_bytes() == before
    main([*SMALL, text, "--out", str(finished), "--overwrite", "--steps=2"])
    assert not list(finished.glob("*.tmp"))
    assert json.loads(path.read_text())["validation"][-1]["step"] == 2


def test_a_full_disk_ends_in_one_message(text, tmp_path, monkeypatch):
    """`/dev/full` in place of the metrics: writing there fails as on a full disk."""
    start = report.Metrics.__init__

    def on_full_disk(self, folder, at):
        start(self, folder, at)
        self.losses.path = Path("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(report.Metrics, "__init__", on_full_disk)
        with pytest.raises(SystemExit, match=r"No space left.*make room.*--resume"):
            main([*SMALL, text, "--out", str(tmp_path / "run")])


def test_a_checkpoint_that_cannot_be_written_tells_the_last_whole_one(
    text, tmp_path, monkeypatch
):
    out = str(tmp_path / "run")
    save = Checkpoints._save

    def full(self, step, args):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", full)
        with pytest.raises(
            SystemExit, match=r"(?s)checkpoints/4 cannot be written.*step 2 is whole"
        ):
            main([*SMALL, text, "--out", out])
    main(["--resume", "--out", out])
    assert (tmp_path / "run" / "result.json").exists()


# How far a run goes.


def test_without_evaluation_on_the_way_the_end_has_one(text, tmp_path):
    main([*SMALL, text, "--out", str(tmp_path / "run"), "--eval-every=0"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = result["validation"]
    assert row["step"] == 4
    assert 0 < row["valid_loss"] < 10


def test_a_run_that_is_done_goes_on_with_more_steps(finished, capsys):
    """At the last rate of its schedule, which is not stretched unless asked for."""
    main(["--resume", "--out", str(finished), "--steps=6"])
    rows = report.read_metrics(finished / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 7))
    last = rows[3]["learning_rate"], rows[4]["learning_rate"], rows[5]["learning_rate"]
    assert last[0] > last[1] == last[2] == pytest.approx(1e-3)
    saved = Config.load(finished / "config.json")
    assert (saved.train.steps, saved.train.decay_steps) == (6, 4)
    # A schedule over all steps, where it is asked for.
    main(["--resume", "--out", str(finished), "--steps=8", "--decay-steps=8"])
    rows = report.read_metrics(finished / "metrics.csv")
    assert rows[6]["learning_rate"] > rows[5]["learning_rate"]
    with pytest.raises(SystemExit, match="at least the steps it was started with, 8"):
        main(["--resume", "--out", str(finished), "--steps=4"])
    with pytest.raises(SystemExit, match=r"train\.decay_steps was 8 and is now 5"):
        main(["--resume", "--out", str(finished), "--decay-steps=5"])


def test_the_allocator_is_set_by_the_script_and_told(finished, capsys, text):
    main(["--resume", "--out", str(finished), "--steps=5"])
    assert "freed pages are kept (M_MMAP_MAX 0" in capsys.readouterr().out
    main(["--resume", "--out", str(finished), "--steps=6", "--no-keep-freed-memory"])
    assert "Allocator: the system's own setting" in capsys.readouterr().out
