"""The tokenizer inside a GGUF file, written as `tokenizer.json`."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE

from .checkpoints import FormatError, write_json

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(fields: dict[str, Any], folder: Path) -> dict[str, int]:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
      fields: The file's key-value pairs.
      folder: Where to.

    Returns:
      Ids of the special tokens, as `config.json` names them.

    Raises:
      FormatError: if the kind of tokenizer is not known.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{theirs}_token_id"]
        for name, theirs in SPECIAL.items()
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    tokenizer = make_tokenizer(fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.get("llama.context_length", 2048),
        "clean_up_tokenization_spaces": False,
    }
    about |= {name.removesuffix("_id"): tokens[i] for name, i in ids.items()}
    if "tokenizer.chat_template" in fields:
        about["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", about)
    return {name: i for name, i in ids.items() if name != "unk_token_id"}


def make_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer, with its special tokens and what it puts in front of a text."""
    kind = fields.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise FormatError(
            f"tokenizer.ggml.model must be one of {', '.join(makers)}, got {kind!r}."
        )
    tokenizer = makers[kind](fields)
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [])
    for special in (True, False):
        wanted = CONTROL if special else USER_DEFINED
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind == wanted
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    begins = fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if begins and "tokenizer.ggml.bos_token_id" in fields:
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _byte_level(fields: dict[str, Any]) -> Tokenizer:
    """Byte-pair encoding of bytes, as GPT-2's; the files differ in the first cuts."""
    name = fields.get("tokenizer.ggml.pre", "default")
    cuts = {
        "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(False)],
        "gpt-2": [pre.ByteLevel(False)],
        "default": [pre.ByteLevel(False)],
        "llama-bpe": [
            pre.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre.ByteLevel(False, use_regex=False),
        ],
    }
    if name not in cuts:
        raise FormatError(
            f"tokenizer.ggml.pre must be one of {', '.join(cuts)}, got {name!r}."
        )
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    # Llama 3's tokenizer takes a whole word that it has, whatever the merges.
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre.Sequence(cuts[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """Llama 2's: pieces with scores, joined best first; bytes for what is unknown."""
    tokens = fields["tokenizer.ggml.tokens"]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = _merges(ids, fields["tokenizer.ggml.scores"])
    model = BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    starts = fields.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if starts else []
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([*prepend, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if starts else []
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *strip,
        ]
    )
    return tokenizer


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All ways to make a piece out of two, those of the best pieces first."""
    found = [
        (-scores[i], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]
