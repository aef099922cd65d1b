"""BERT and RoBERTa against transformers' torch models, and what is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")

from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.hf import architectures, encoder, logits
from examples.hf.checkpoints import FormatError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,  # far from linear, so that an error shows
}
TOKENS = np.array([[5, 17, 3, 60, 9, 8, 22], [7, 4, 30, 12, 0, 0, 0]])
TYPES = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool)
CASES = {
    "bert": ("BertModel", {}),
    "bert-tanh-gelu": (
        "BertModel",
        {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3},
    ),
    "bert-classes": ("BertForSequenceClassification", {"num_labels": 3}),
    "bert-regression": (
        "BertForSequenceClassification",
        {"num_labels": 1, "problem_type": "regression", "hidden_act": "relu"},
    ),
    "roberta": ("RobertaModel", {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-classes": (
        "RobertaForSequenceClassification",
        {"num_labels": 2, "type_vocab_size": 1, "pad_token_id": 3, "hidden_size": 16},
    ),
    "roberta-regression": (
        "RobertaForSequenceClassification",
        {"num_labels": 1, "pad_token_id": 1},
    ),
}


def inputs(config: encoder.EncoderConfig) -> tuple[np.ndarray, ...]:
    tokens = np.where(MASK, TOKENS, config.pad_token_id)
    types = np.minimum(TYPES, config.type_vocab_size - 1)
    return tokens, types, MASK


def run(config: encoder.EncoderConfig, params: Any) -> encoder.Output:
    model = nnx.merge(encoder.graph(config), params)
    return jax.jit(model.__call__)(*inputs(config))


def torch_model(name: str, options: dict[str, Any]):
    """A random model of transformers; skip where it or torch is not there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config_class = {"B": "BertConfig", "R": "RobertaConfig"}[name[0]]
    config = getattr(transformers, config_class)(**{**SIZES, **options})
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which hides errors
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def torch_output(model: Any, config: encoder.EncoderConfig) -> np.ndarray:
    import torch

    tokens, types, mask = (torch.tensor(x) for x in inputs(config))
    with torch.no_grad():
        out = model(tokens, attention_mask=mask.long(), token_type_ids=types)
    return (out.logits if config.labels else out.pooler_output).numpy()


def our_output(config: encoder.EncoderConfig, params: Any) -> np.ndarray:
    out = run(config, params)
    return np.asarray(out.logits_bc if config.labels else out.pooled_bd)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_transformers(case: str, tmp_path: Path):
    """Forwards, and again after our files are read by transformers."""
    name, options = CASES[case]
    model = torch_model(name, options)
    model.save_pretrained(tmp_path / "theirs")
    module, config, params = architectures.load(tmp_path / "theirs")
    expected = torch_output(model, config)
    got = our_output(config, params)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected) > 0.05  # constants would agree, too
    architectures.save(tmp_path / "ours", module, config, params)
    again, told = type(model).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    np.testing.assert_allclose(torch_output(again.eval(), config), expected, atol=1e-6)


@pytest.mark.parametrize("case", ["bert-classes", "roberta-regression"])
def test_gradients_are_those_of_transformers(case: str, tmp_path: Path):
    """Of every parameter, through GLUE's loss: what fine-tuning goes by."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")
    torch = pytest.importorskip("torch")
    from examples.glue.data import Batch
    from examples.glue.program import loss_fn

    name, options = CASES[case]
    model = torch_model(name, options)
    model.save_pretrained(tmp_path)
    _, config, params = architectures.load(tmp_path)
    regression = len(config.labels) == 1
    labels = np.array([1.5, 4.0], np.float32) if regression else np.array([2, 0])
    tokens, types, mask = inputs(config)
    given = {"attention_mask": mask.astype(int), "token_type_ids": types}
    given |= {"input_ids": tokens, "labels": labels}
    expected = model(**{k: torch.tensor(x) for k, x in given.items()}).loss
    expected.backward()
    still = dataclasses.replace(
        config, dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0
    )
    loss = functools.partial(loss_fn, model=encoder.graph(still), regression=regression)
    # A third row that only pads counts for nothing.
    rows = (np.concatenate([x, x[:1]]) for x in (tokens, types, mask, labels))
    batch = Batch(*rows, np.array([1.0, 1.0, 0.0], np.float32))
    got, grads = jax.jit(jax.value_and_grad(loss))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(got, expected.item(), rtol=1e-4)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for entry in encoder.entries(config):
        ours = grads
        for key in entry.path:
            ours = ours[key]
        ours = np.asarray(ours).T if entry.transposed else np.asarray(ours)
        np.testing.assert_allclose(
            ours, theirs[entry.tensor], rtol=1e-3, atol=1e-4, err_msg=entry.tensor
        )


def test_hidden_states_are_those_of_transformers(tmp_path: Path):
    """At every position that is not padding, not only at the first one."""
    torch = pytest.importorskip("torch")

    model = torch_model("RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1})
    model.save_pretrained(tmp_path / "theirs")
    _, config, params = architectures.load(tmp_path / "theirs")
    tokens, types, mask = (torch.tensor(x) for x in inputs(config))
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask.long(), token_type_ids=types)
    got = np.asarray(run(config, params).hidden_btd)
    np.testing.assert_allclose(
        got[MASK], expected.last_hidden_state.numpy()[MASK], atol=1e-4
    )


def test_a_masked_language_model_becomes_a_classifier(tmp_path: Path):
    """As roberta-base is on the hub: prefixed tensors and a head of pre-training."""
    model = torch_model("RobertaForMaskedLM", {"pad_token_id": 1})
    model.save_pretrained(tmp_path)
    config, params = encoder.load_classifier(tmp_path, ("no", "yes"), seed=0)
    assert config.architecture == "RobertaForSequenceClassification"
    import torch

    tokens, types, mask = (torch.tensor(x) for x in inputs(config))
    with torch.no_grad():
        expected = model.roberta(
            tokens, attention_mask=mask.long(), token_type_ids=types
        )
    np.testing.assert_allclose(
        np.asarray(run(config, params).hidden_btd)[MASK],
        expected.last_hidden_state.numpy()[MASK],
        atol=1e-4,
    )
    assert our_output(config, params).shape == (2, 2)


# Without torch: files that this module writes itself.


def bert_json(**changes: Any) -> dict[str, Any]:
    json = {"architectures": ["BertModel"], "model_type": "bert", **SIZES}
    return {**json, "hidden_dropout_prob": 0.1, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertModel on disk."""
    config = encoder.from_json(bert_json())
    params = jax.jit(encoder.init_params, static_argnums=0)(config, jax.random.key(0))
    path = tmp_path_factory.mktemp("models") / "bert"
    architectures.save(path, encoder, config, params)
    return path


def test_a_round_trip_changes_no_bit(folder: Path, tmp_path: Path):
    module, config, params = architectures.load(folder)
    architectures.save(tmp_path / "again", module, config, params)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_padding_changes_nothing(folder: Path):
    """What stands at padded positions does not reach the others."""
    _, config, params = architectures.load(folder)
    model = nnx.merge(encoder.graph(config), params)
    tokens, types, mask = inputs(config)
    run_it = jax.jit(model.__call__)
    before = run_it(tokens, types, mask).hidden_btd
    after = run_it(np.where(mask, tokens, 44), types, mask).hidden_btd
    np.testing.assert_array_equal(before[mask], after[mask])
    alone = run_it(tokens[1:, :4], types[1:, :4], mask[1:, :4]).hidden_btd
    np.testing.assert_allclose(before[1, :4], alone[0], atol=1e-5)


def test_dropout_follows_its_key(folder: Path):
    _, config, params = architectures.load(folder)
    model = nnx.merge(encoder.graph(config), params)
    run_it = jax.jit(model.__call__)
    keys = [None, jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    outs = [np.asarray(run_it(*inputs(config), key).pooled_bd) for key in keys]
    np.testing.assert_array_equal(outs[1], outs[2])
    assert np.abs(outs[1] - outs[3]).max() > 1e-3
    assert np.abs(outs[1] - outs[0]).max() > 1e-3


def test_positions_of_roberta_skip_padding():
    """From pad_token_id + 1 on; padding keeps pad_token_id."""
    json = bert_json(architectures=["RobertaModel"], model_type="roberta")
    config = encoder.from_json({**json, "pad_token_id": 1})
    got = encoder.positions(config, jnp.array([[1, 5, 6, 1, 7, 1]]))
    np.testing.assert_array_equal(got, [[1, 2, 3, 1, 4, 1]])
    assert config.longest == SIZES["max_position_embeddings"] - 2


def test_the_first_names_of_layer_norm_are_read(folder: Path, tmp_path: Path):
    """bert-base-uncased calls them gamma and beta, and everything `bert.`."""
    tensors = load_file(folder / "model.safetensors")
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace(
            "Norm.bias", "Norm.beta"
        ): x
        for name, x in tensors.items()
    }
    old["cls.predictions.bias"] = np.zeros(61, np.float32)
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    json_ = bert_json(architectures=["BertForMaskedLM"])
    (tmp_path / "old" / "config.json").write_text(json.dumps(json_))
    config, params = encoder.load_classifier(tmp_path / "old", ("a", "b"), seed=0)
    _, plain, expected = architectures.load(folder)
    np.testing.assert_array_equal(
        run(config, params).pooled_bd, run(plain, expected).pooled_bd
    )
    names = [entry.tensor for entry in encoder.entries(config)]
    assert not any("gamma" in name for name in names)  # and are not written


def test_the_fresh_head_follows_the_seed(folder: Path):
    heads = [
        encoder.load_classifier(folder, ("a", "b", "c"), seed)[1]["head"]["out"]
        for seed in (0, 0, 1)
    ]
    assert heads[0]["kernel"].shape == (24, 3)
    np.testing.assert_array_equal(heads[0]["kernel"], heads[1]["kernel"])
    assert np.abs(heads[0]["kernel"] - heads[2]["kernel"]).max() > 0.01


def test_logits_prints_the_pooled_output(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    logits.main(["--model", str(folder), "--tokens", "5 17 3"])
    printed = json.loads(capsys.readouterr().out)
    _, config, params = architectures.load(folder)
    model = jax.jit(nnx.merge(encoder.graph(config), params).__call__)
    tokens = np.array([[5, 17, 3, 0]])
    out = model(tokens, np.zeros_like(tokens), tokens > 0)
    np.testing.assert_allclose(printed, np.asarray(out.pooled_bd)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPT2Model"]}, "architectures=\\['GPT2Model'\\]"),
        ({"model_type": "roberta"}, "model_type='roberta'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"num_attention_heads": 5}, "5 and 24"),
        ({"num_hidden_layers": 0}, "'n_layers': 0"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(FormatError, match=told):
        encoder.from_json(bert_json(**changes))


def test_a_missing_size_is_named():
    json = bert_json()
    del json["hidden_size"]
    with pytest.raises(FormatError, match="hidden_size"):
        encoder.from_json(json)


@pytest.mark.parametrize("fault", ["missing", "surplus", "misshapen"])
def test_tensors_that_do_not_fit_are_named(folder: Path, tmp_path: Path, fault: str):
    name = "encoder.layer.1.output.dense.weight"
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors[name]
    elif fault == "surplus":
        name = "encoder.layer.2.output.dense.weight"
        tensors[name] = np.zeros((24, 40), np.float32)
    else:
        tensors[name] = np.zeros((24, 41), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FormatError, match=f"{fault}: {name}"):
        encoder.load_classifier(tmp_path, ("a", "b"), seed=0)
