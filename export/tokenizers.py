"""Tokenizers for the runtime: one JSON file each, with padding and truncation inside.

Stand-ins are for random weights, where there is no real vocabulary. They are valid and deterministic, with special
tokens in their usual places, so that every id has a row in the network's table of embeddings.
"""

import json
import string
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

__all__ = ["clip", "put", "stand_in_clip", "stand_in_t5", "t5"]

WORDS = ["the", "of", "and", "a", "in", "with", "photo", "image", "sharp", "clean", "detailed", "high", "quality"]
CLIP_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|unk|>",  # the real one is EOS, but the network pools at the first EOS
}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # flags of a special token
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def t5(folder: Path, length: int) -> str:
    """The JSON of a T5 tokenizer that pads to `length`. Longer prompts stay long, and the runtime refuses them."""
    from tokenizers.processors import TemplateProcessing

    _check_least("length", length, 1)
    tokenizer = _read_t5(folder)
    ids = _special_ids(folder, tokenizer, "</s>", "<pad>")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=length, pad_id=ids["<pad>"], pad_token="<pad>")
    return tokenizer.to_str()


def _read_t5(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    _check_files(folder, ("tokenizer.json",), ("spiece.model",))
    if (folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises nothing more special
            raise _unreadable(folder, error) from error
    from transformers import T5Tokenizer

    try:
        tokenizer: Tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # without sentencepiece it is tiktoken that is missed
        advice = "pip install sentencepiece protobuf, or put the model's tokenizer.json beside it"
        raise InputError(f"tokenizer {folder}: spiece.model cannot be converted; {advice}") from error
    return tokenizer


def clip(folder: Path, length: int, pad_id: int | None = None, rows: int | None = None) -> str:
    """The JSON of a CLIP tokenizer that cuts texts to `length` with EOS at the end, and pads.

    Padding uses `pad_id`, or the token that the folder names. `rows` is the size of the network's table of embeddings,
    which must have a row for every id.
    """
    from tokenizers.processors import RobertaProcessing

    _check_least("length", length, 2)
    _check_files(folder, ("tokenizer.json",), ("vocab.json", "merges.txt"))
    try:
        named = _clip_tokens(folder)
        tokenizer = _read_clip(folder, named["unk_token"].content)
    except Exception as error:  # the package raises nothing more special
        raise _unreadable(folder, error) from error
    bos, eos, padding = (named[f"{name}_token"].content for name in ("bos", "eos", "pad"))
    ids = _special_ids(folder, tokenizer, bos, eos, padding)
    if rows is not None and tokenizer.get_vocab_size() > rows:
        raise InputError(
            f"tokenizer {folder}: has {tokenizer.get_vocab_size()} ids, the network's table has {rows} rows; is it the"
            " tokenizer of this encoder?"
        )
    tokenizer.add_special_tokens(list(named.values()))
    tokenizer.post_processor = RobertaProcessing((eos, ids[eos]), (bos, ids[bos]), False, False)
    tokenizer.enable_truncation(length)
    pad = padding if pad_id is None else str(tokenizer.id_to_token(pad_id))
    tokenizer.enable_padding(length=length, pad_id=ids[pad] if pad_id is None else pad_id, pad_token=pad)
    return tokenizer.to_str()


def _clip_tokens(folder: Path) -> dict[str, "AddedToken"]:
    """The special tokens of a folder, or else CLIP's; each with its flags from the folder."""
    from tokenizers import AddedToken

    tokens: dict[str, Any] = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokens["bos_token"] = "<|startoftext|>"
    flagged: list[dict[str, Any]] = []
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        document = json.loads((folder / name).read_bytes()) if (folder / name).is_file() else {}
        flagged += [*document.get("added_tokens", []), *document.get("added_tokens_decoder", {}).values()]
        tokens |= {token: document[token] for token in tokens if document.get(token)}
    flagged += [token for token in tokens.values() if isinstance(token, dict)]
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    flags = {token["content"]: {flag: token[flag] for flag in FLAGS if flag in token} for token in reversed(flagged)}
    return {name: AddedToken(text, special=True, **flags.get(text, {})) for name, text in contents.items()}


def _read_clip(folder: Path, unknown: str) -> "Tokenizer":
    """CLIP's rules with the folder's vocabulary and merges."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
        vocabulary, merges = model["vocab"], model["merges"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    else:
        vocabulary = json.loads((folder / "vocab.json").read_bytes())
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>"))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _check_files(folder: Path, *choices: tuple[str, ...]) -> None:
    missing = [[name for name in names if not (folder / name).is_file()] for names in choices]
    if all(missing):
        needed = ", or ".join(" and ".join(names) for names in choices)
        lacks = ", ".join(name for names in missing for name in names)
        raise InputError(f"tokenizer {folder}: {lacks} missing; give the folder with {needed}")


def _special_ids(folder: Path, tokenizer: "Tokenizer", *names: str) -> dict[str, int]:
    """The ids of special tokens. They must be in the vocabulary, as the network has no rows for added tokens."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if missing := sorted({*names} - vocabulary.keys()):
        raise InputError(
            f"tokenizer {folder}: its vocabulary has no {', '.join(missing)}; is it the tokenizer of this encoder?"
        )
    return {name: vocabulary[name] for name in names}


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(one_line(f"tokenizer {folder} cannot be read ({error}); copy its files again"))


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name}={value} is too small for a tokenizer; use {least} or more")


def stand_in_t5(vocab: int) -> str:
    """The tokenizer.json of a T5 with `vocab` ids that knows ASCII, or as much of it as fits."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace, Sequence, WhitespaceSplit

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*special, "▁", *string.ascii_lowercase]
    _check_least("vocab", vocab, len(pieces))
    pieces += [f"▁{word}" for word in WORDS] + [*string.digits, *string.punctuation, *string.ascii_uppercase]
    vocabulary = [*pieces, *_unused(len(pieces), vocab)][:vocab]
    tokenizer = Tokenizer(Unigram([(piece, -1 - i / vocab) for i, piece in enumerate(vocabulary)], 2, False))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Metaspace("▁", "always")])
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


def put(folder: Path, files: Mapping[str, str]) -> Path:
    """Write these files into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def stand_in_clip(vocab: int, *, pads_with_first: bool = False) -> dict[str, str]:
    """The files of a CLIP tokenizer with `vocab` ids that knows all bytes, or at least letters. EOS has the last id."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = string.ascii_lowercase
    special = list(dict.fromkeys(CLIP_TOKENS[f"{name}_token"] for name in ("unk", "bos", "eos")))
    room = vocab - len(special)
    merges = list(dict.fromkeys(pair for word in WORDS for pair in _merges(word)))
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    _check_least("vocab", vocab, len(symbols) + len(special))
    merges = merges[: room - len(symbols)]  # each makes one new token from earlier ones
    others = sorted(set(ByteLevel.alphabet()) - {*letters})
    ordinary = [*symbols, *map("".join, merges), *others, *(symbol + "</w>" for symbol in others)]
    tokens = [*ordinary, *_unused(len(ordinary), room)][:room] + special
    named = CLIP_TOKENS | ({"pad_token": tokens[0]} if pads_with_first else {})  # SDXL's second pads with id 0
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        "tokenizer_config.json": json.dumps({**named, "model_max_length": 77}, indent=2),
        "special_tokens_map.json": json.dumps(named, indent=2),
    }


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that join a word from left to right."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    return [(before, joined[len(before) :]) for before, joined in pairwise(accumulate(parts))]


def _unused(start: int, end: int) -> list[str]:
    """Tokens that fill gaps in the vocabulary. They contain a blank, so no text becomes one."""
    return [f"unused {i}" for i in range(start, end)]
