"""The scripts for checkpoints of others: bad options, folders and files end in a line.

As ``test_flax_lm_robustness.py`` for the main job. Nothing is trained: each refusal
comes before the model is read, or as it is read.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from examples.flax_lm.folder import FolderError, writing
from examples.glue import compare as glue_compare
from examples.glue import train as glue
from examples.gsm8k import compare as gsm8k_compare
from examples.gsm8k import evaluate, plan
from examples.gsm8k import train as gsm8k
from examples.hf import from_gguf, llama, logits

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_act": "gelu",
}
SCRIPTS = {
    "glue": (glue.main, ["--model", "M", "--data", "D", "--task", "RTE", "--out", "O"]),
    "glue.compare": (glue_compare.main, ["--model", "M", "--data", "D", "--out", "O"]),
    "gsm8k": (gsm8k.main, ["--model", "M", "--data", "D", "--out", "O"]),
    "gsm8k.compare": (gsm8k_compare.main, ["--model", "M", "--data", "D"]),
    "evaluate": (evaluate.main, ["--model", "M", "--data", "D", "--mesh", "data=1"]),
    "plan": (plan.main, ["--model", "M"]),
    "logits": (logits.main, ["--model", "M", "--tokens", "1 2"]),
}


def refusal(capsys, script: str, *more: str) -> str:
    """What is told; a later option counts, in place of an earlier one."""
    main, given = SCRIPTS[script]
    with pytest.raises(SystemExit) as caught:
        main([*given, *more])
    if caught.value.code == 2:  # by tyro or argparse, in a box
        told = capsys.readouterr().err
    else:
        told = str(caught.value.code)
        assert "\n" not in told
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", told).split())


RULES = {
    "batch_size is at least 1": ["--batch-size", "0"],
    "rank is at least 1": ["--rank", "0"],
    "learning_rate is positive and finite": ["--learning-rate", "inf"],
    "b1 and b2 lie in [0, 1)": ["--b1", "1"],
    "eps is positive and finite": ["--eps", "0"],
    "rho lies in [0, 1]": ["--rho", "2"],
    "weight_decay is finite, at least 0": ["--weight-decay", "-1"],
    "clip_norm is finite, at least 0": ["--clip-norm", "inf"],
    "log_every is at least 1": ["--log-every", "0"],
    "resume and overwrite exclude each other": ["--resume", "--overwrite"],
}
OWN_RULES = [
    ("glue", "epochs is positive and finite", ["--epochs", "inf"]),
    ("glue", "seeds lie in [0, 2^32)", ["--seeds", "-1"]),
    ("glue", "checkpoint_every is at least 0", ["--checkpoint-every", "-1"]),
    ("glue", "galore_gap is at least 1", ["--galore-gap", "0"]),
    ("glue", "galore_scale is positive", ["--galore-scale", "nan"]),
    ("gsm8k", "seed lies in [0, 2^32)", ["--seed", "-1"]),
    ("gsm8k", "eval_problems are at least 0", ["--eval-problems", "-1"]),
    ("gsm8k", "generate_problems are at least -1", ["--generate-problems", "-2"]),
    ("gsm8k", "keep_checkpoints is at least 1", ["--keep-checkpoints", "0"]),
    ("gsm8k", "num_processes needs coordinator", ["--num-processes", "2"]),
    ("gsm8k", "--mesh must look like", ["--mesh", "rows"]),
    ("evaluate", "batch_size is at least 1", ["--batch-size", "0"]),
    ("plan", "rank is at least 1", ["--rank", "0"]),
    ("glue.compare", "learning_rate is positive", ["--rates", "0"]),
    *(("glue", rule, options) for rule, options in RULES.items()),
    *(("gsm8k", rule, options) for rule, options in RULES.items()),
]


@pytest.mark.parametrize(("script", "rule", "options"), OWN_RULES)
def test_options_are_refused_by_their_rule(script, rule, options, tmp_path, capsys):
    folder = bert(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert rule in refusal(capsys, script, "--model", str(folder), *options)


def bert(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(BERT | changes))
    return folder


@pytest.mark.parametrize("script", ["glue", "gsm8k", "evaluate", "plan", "logits"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("null", "must hold an object"),
        (json.dumps(BERT | {"architectures": ["T5"], "hidden_act": "?"}), "must be"),
    ],
)
def test_a_broken_model_is_named(script, content, told, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    data = ["--data", str(tmp_path)] if script in ("gsm8k", "evaluate") else []
    out = ["--out", str(tmp_path / "out")] if script in ("glue", "gsm8k") else []
    assert told in refusal(capsys, script, "--model", str(tmp_path), *data, *out)


@pytest.mark.parametrize("size", [0, -3, 1.5, "two", None])
@pytest.mark.parametrize("name", llama.SIZES)
def test_sizes_of_a_llama_are_whole(name, size):
    json = dict.fromkeys(llama.SIZES, 16) | {name: size}
    with pytest.raises(llama.FormatError, match=f"whole and positive.*{name}"):
        llama.from_json(json)


@pytest.mark.parametrize("script", ["glue.compare", "gsm8k", "gsm8k.compare"])
def test_out_on_a_file_or_below_one_is_refused(script, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        told = refusal(capsys, script, "--out", str(tmp_path / out))
        assert "--out must be a folder" in told
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_is_no_gguf_is_named(tmp_path, capsys):
    for content, told in ((None, "must be a GGUF"), (b"GGUF" * 8, "not a whole GGUF")):
        if content is not None:
            (tmp_path / "M").write_bytes(content)
        with pytest.raises(SystemExit, match=told):
            from_gguf.main([str(tmp_path / "M"), "--out", str(tmp_path / "out")])


def test_a_full_disk_tells_the_way_out():
    def write():
        with writing(Path("runs/one")):
            Path("/dev/full").write_text("x")

    with pytest.raises(FolderError, match=r"No space left.*runs/one.*--resume"):
        write()
