"""Folders in transformers' format: read in parts, refused by name, written whole."""

import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")

from hf_files import SMALL, save_small, small_params
from safetensors.numpy import load_file, save_file

from examples.flax_lm import sharding
from examples.gsm8k.loading import abstract_params
from examples.hf import architectures, checkpoints, llama, logits
from examples.hf.checkpoints import FormatError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    save_small(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def read_nothing(monkeypatch):
    """Let the test fail where a tensor is read."""
    monkeypatch.setattr(
        checkpoints, "_read_leaf", lambda *_: pytest.fail("a tensor was read")
    )


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_written_is_read_back(folder):
    _, config, params = architectures.load(folder)
    assert config == SMALL
    jax.tree.map(np.testing.assert_array_equal, params, small_params())


def test_large_models_are_cut_into_files_with_an_index(folder, tmp_path):
    module, config, params = architectures.load(folder)
    config_of = {"files_from": folder, "shard_bytes": 10_000}
    architectures.save(tmp_path / "cut", module, config, params, **config_of)
    names = sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert (tmp_path / "cut" / "tokenizer.json").exists()
    assert checkpoints.read_config(tmp_path / "cut")["eos_token_id"] == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        architectures.load(tmp_path / "cut")[2],
        params,
    )
    (tmp_path / "cut" / names[1]).unlink()
    with pytest.raises(FormatError, match=f"lacks {names[1]}, which .*index.json"):
        architectures.load(tmp_path / "cut")


def test_each_device_reads_its_part_alone(folder, monkeypatch):
    """A mesh of eight gets the values of one, and no read is larger than a part."""
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    like = abstract_params(SMALL, mesh, "bfloat16")
    sizes = []
    read = checkpoints._Safe.read
    monkeypatch.setattr(
        checkpoints._Safe,
        "read",
        lambda *args: sizes.append((part := read(*args)).size) or part,
    )
    params = checkpoints.read_params(folder, llama.entries(SMALL), like)
    assert max(sizes) == SMALL.vocab_size * SMALL.d_model // 8
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype("bfloat16")),
        params,
        small_params(),
    )


def test_missing_surplus_and_misshapen_tensors_are_named(copy, monkeypatch):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    change_tensors(copy, change)
    read_nothing(monkeypatch)
    with pytest.raises(FormatError) as told:
        architectures.load(copy)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight;",
        "surplus: model.layers.0.self_attn.q_proj.bias;",
        "misshapen: model.norm.weight is (31,) and must be (32,).",
    ):
        assert part in str(told.value)


def test_old_buffers_and_the_head_of_a_tied_model_are_left_alone(copy):
    def change(tensors):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = np.zeros((320, 32), np.float32)

    change_tensors(copy, change)
    jax.tree.map(
        np.testing.assert_array_equal, architectures.load(copy)[2], small_params()
    )
    change_config(copy, tie_word_embeddings=False)
    head = architectures.load(copy)[2]["head"]["kernel"]
    np.testing.assert_array_equal(head, np.zeros((32, 320)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"one of .*LlamaForCausalLM.*GPT2"),
        ({"architectures": None}, "architectures=\\[\\]"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be .*'yarn'"),
        ({"num_attention_heads": 5}, "n_kv_heads divides n_heads"),
    ],
)
def test_models_of_other_kinds_are_refused(copy, monkeypatch, changes, told):
    read_nothing(monkeypatch)
    change_config(copy, **changes)
    with pytest.raises(FormatError, match=told):
        architectures.load(copy)


def test_a_config_without_a_size_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["intermediate_size"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="lacks 'intermediate_size'"):
        architectures.load(copy)


def test_broken_folders_are_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be read"):
        architectures.load(copy)
    path.unlink()
    with pytest.raises(FormatError, match="has no weights"):
        architectures.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        architectures.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config\.json"):
        architectures.load(copy)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")

    params = small_params()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            architectures.save(tmp_path / "new", llama, SMALL, params)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("all my work")
    with pytest.raises(FormatError, match="already exists"):
        architectures.save(tmp_path / "new", llama, SMALL, params)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["thesis.txt"]


def test_logits_of_the_last_position_are_printed_as_json(folder, capsys):
    logits.main(["--model", str(folder), "--tokens", "1 2 3"])
    printed = json.loads(capsys.readouterr().out)
    direct = llama.logits(SMALL, small_params(), np.asarray([[1, 2, 3]]))
    np.testing.assert_allclose(printed, direct[0, -1], rtol=1e-6)
    for tokens in ("1 two", "", "1 320", "-1"):
        with pytest.raises(SystemExit, match="from 0 to 319"):
            logits.main(["--model", str(folder), f"--tokens={tokens}"])


def test_layers_apart_or_stacked_are_the_same_files(folder, tmp_path):
    import dataclasses

    apart = dataclasses.replace(SMALL, scan_layers=False)
    like = llama.abstract_params(apart)
    params = checkpoints.read_params(folder, llama.entries(apart), like)
    architectures.save(tmp_path / "apart", llama, apart, params)
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "apart"))
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
