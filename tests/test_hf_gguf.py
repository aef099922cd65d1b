"""GGUF files: weights decoded and put in order, the tokenizer cuts as before."""

import json

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
import sentencepiece
import tokenizers
from hf_files import SMALL, TEXT, byte_pairs, small_params, tensors_of
from safetensors.numpy import load_file

from examples.hf import architectures, from_gguf
from examples.hf.checkpoints import FormatError
from examples.hf.gguf_tokenizer import make_tokenizer
from examples.hf.tokenizer import load_tokenizer

SENTENCES = [*TEXT, "naïve café 日本 🙂", "  two  spaces\n\nand\ttabs", "x=12345.6"]
# transformers' name of a tensor -> GGUF's
NAMES = {name: own for own, name in from_gguf.tensor_names(SMALL).items()}


def permuted(weight, heads):
    """What llama.cpp does to the rows of queries and keys when it converts."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(path, tensors, kind="F32", arch="llama", tokenizer=None, left_out=()):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(SMALL.n_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(SMALL.d_model)
    writer.add_feed_forward_length(SMALL.d_mlp)
    writer.add_head_count(SMALL.n_heads)
    writer.add_head_count_kv(SMALL.n_kv_heads)
    writer.add_layer_norm_rms_eps(SMALL.norm_eps)
    writer.add_rope_freq_base(SMALL.rope_theta)
    (tokenizer or add_byte_pairs)(writer)
    for name, array in tensors.items():
        if name in left_out:
            continue
        heads = {"q_proj": SMALL.n_heads, "k_proj": SMALL.n_kv_heads}
        for part, count in heads.items():
            if part in name:
                array = permuted(array, count)
        quantized = gguf.GGMLQuantizationType[kind]
        if array.ndim == 1 or array.shape[-1] % 32:
            quantized = gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(array), quantized)
        writer.add_tensor(NAMES[name], data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_pairs(writer):
    model = json.loads(byte_pairs().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)


def convert(file, out, *more):
    from_gguf.main([str(file), "--out", str(out), *more])
    return out


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0.0), ("F16", 5e-4), ("Q8_0", 5e-3), ("Q4_1", 0.05)]
)
def test_weights_are_decoded_and_rows_put_back(tmp_path, kind, error):
    tensors = tensors_of(small_params())
    file = write_gguf(tmp_path / "small.gguf", tensors, kind)
    out = convert(file, tmp_path / "out")
    _, config, params = architectures.load(out)
    assert config == SMALL
    read = tensors_of(params)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        span = np.abs(array).max()
        assert np.abs(read[name] - array).max() <= error * 2 * span, name
    if kind == "F32":  # so that the order matters
        q = "model.layers.0.self_attn.q_proj.weight"
        assert not np.array_equal(permuted(tensors[q], 4), tensors[q])


def test_bfloat16_files_are_half_as_large(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", tensors_of(small_params()))
    out = convert(file, tmp_path / "out", "--dtype", "bfloat16")
    read = load_file(out / "model.safetensors")
    assert {x.dtype.name for x in read.values()} == {"bfloat16"}


def test_a_byte_pair_tokenizer_cuts_as_before(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", tensors_of(small_params()))
    out = convert(file, tmp_path / "out")
    ours, theirs = load_tokenizer(out), byte_pairs()
    for text in (*SENTENCES, "a<end>b"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert 0 in ours.encode("a<end>b")


def test_a_sentencepiece_tokenizer_cuts_as_before(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=SMALL.vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    count = theirs.vocab_size()
    assert count == SMALL.vocab_size

    def add(writer):
        kind = lambda i: 2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(i) for i in range(count)])
        writer.add_token_scores([theirs.get_score(i) for i in range(count)])
        special = lambda i: (
            theirs.is_unknown(i) or theirs.is_control(i) or theirs.is_byte(i)
        )
        writer.add_token_types([kind(i) if special(i) else 1 for i in range(count)])
        writer.add_bos_token_id(theirs.bos_id())
        writer.add_eos_token_id(theirs.eos_id())
        writer.add_unk_token_id(theirs.unk_id())

    tensors = tensors_of(small_params())
    file = write_gguf(tmp_path / "small.gguf", tensors, tokenizer=add)
    ours = load_tokenizer(convert(file, tmp_path / "out"))
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm.model").rename(tmp_path / "spm" / "tokenizer.model")
    loaded = load_tokenizer(tmp_path / "spm")  # the same by sentencepiece itself
    for text in SENTENCES:
        ids = ours.encode(text)
        assert ids == [theirs.bos_id(), *theirs.encode(text)]
        assert ids == loaded.encode(text)
        assert ours.decode(ids) == loaded.decode(ids) == text
    with pytest.raises(FormatError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_files_that_are_not_a_llama_are_refused(tmp_path):
    tensors = tensors_of(small_params())
    name = "model.layers.1.mlp.down_proj.weight"
    cases = {
        "the architecture must be 'llama'": {"arch": "gpt2"},
        f"missing: {NAMES[name]}": {"left_out": (name,)},
    }
    for i, (told, options) in enumerate(cases.items()):
        file = write_gguf(tmp_path / f"{i}.gguf", tensors, **options)
        with pytest.raises(SystemExit, match=f"(?i){told}"):
            convert(file, tmp_path / "out")
    for bytes_, path in ((b"GGUF", "short"), (b"not a model" * 9, "text")):
        (tmp_path / path).write_bytes(bytes_)
        with pytest.raises(SystemExit, match="not a whole GGUF file"):
            convert(tmp_path / path, tmp_path / "out")
    whole = write_gguf(tmp_path / "whole.gguf", tensors)
    whole.write_bytes(whole.read_bytes()[:-5000])
    with pytest.raises(SystemExit, match="not a whole GGUF file"):
        convert(whole, tmp_path / "out")
    with pytest.raises(SystemExit, match="there is none"):
        convert(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_another_kind_is_refused(tmp_path):
    def add(writer):
        add_byte_pairs(writer)
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "unheard-of"

    tensors = tensors_of(small_params())
    file = write_gguf(tmp_path / "small.gguf", tensors, tokenizer=add)
    with pytest.raises(SystemExit, match=r"pre must be one of .*'unheard-of'"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digits_stand_alone_where_the_file_says_so():
    model = json.loads(byte_pairs().to_str())["model"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }
    made = make_tokenizer(fields)
    assert isinstance(made, tokenizers.Tokenizer)
    assert made.encode("in 1999").tokens[-4:] == list("1999")
    assert byte_pairs().encode("in 1999").tokens[-4:] != list("1999")
