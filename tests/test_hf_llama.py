"""Llama beside transformers' torch model: the same logits, forwards and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from hf_files import save_small

from examples.hf import architectures, llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = np.arange(80).reshape(2, 40) * 7 % 99
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama 2": {},
    "grouped, tied, another base": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-3,
    },
    "llama 3": {"num_key_value_heads": 1, "rope_scaling": LLAMA3},
    "heads of their own width": {"head_dim": 24},
}


def torch_model(**options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,  # logits of several units
    }
    config = transformers.LlamaConfig(**sizes | options)
    return transformers.LlamaForCausalLM(config).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("case", list(CASES))
def test_logits_are_transformers_forwards_and_after_a_round_trip(case, tmp_path):
    theirs = torch_model(**CASES[case])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    expected = torch_logits(theirs)
    module, config, params = architectures.load(tmp_path / "theirs")
    ours = llama.logits(config, params, TOKENS)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    architectures.save(tmp_path / "ours", module, config, params)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), expected, atol=1e-6)


def test_configs_of_transformers_4_are_read(tmp_path):
    """The base of the rotation stood beside its scaling."""
    theirs = torch_model(rope_theta=3e4, rope_scaling=LLAMA3)
    theirs.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    json_now = json.loads(path.read_text())
    rope = json_now.pop("rope_parameters")
    json_now["rope_theta"] = rope.pop("rope_theta")
    json_now["rope_scaling"] = rope
    path.write_text(json.dumps(json_now))
    _, config, params = architectures.load(tmp_path / "model")
    ours = llama.logits(config, params, TOKENS)
    np.testing.assert_allclose(ours, torch_logits(theirs), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickled_weights_are_read(tmp_path, dtype):
    theirs = torch_model()
    theirs.config.save_pretrained(tmp_path)
    saved = {k: v.to(getattr(torch, dtype)) for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(saved)  # rounded; its rotary buffer stays as it is
    torch.save(saved, tmp_path / "pytorch_model.bin")
    change = json.loads((tmp_path / "config.json").read_text())
    change["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(change))
    _, config, params = architectures.load(tmp_path)
    ours = llama.logits(config, params, TOKENS)
    expected = torch_logits(theirs)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(architectures.FormatError, match="cannot be read"):
        architectures.load(tmp_path)


def test_bfloat16_weights_are_saved_and_read_as_such(tmp_path):
    theirs = torch_model()
    theirs.save_pretrained(tmp_path / "theirs")
    module, config, params = architectures.load(tmp_path / "theirs")
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    architectures.save(tmp_path / "half", module, config, half)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    ours = llama.logits(config, half, TOKENS)
    np.testing.assert_allclose(ours, torch_logits(again.float().eval()), atol=1e-4)


def test_a_small_folder_of_ours_is_read_by_transformers(tmp_path):
    params = save_small(tmp_path / "small")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = llama.from_json(json.loads((tmp_path / "small/config.json").read_text()))
    ours = llama.logits(dataclasses.replace(config), params, TOKENS)
    np.testing.assert_allclose(ours, torch_logits(theirs.eval()), atol=1e-4)
