"""The JSON files against transformers' own tokenizers, against a BPE written out here, and against SentencePiece."""

import base64
import json
import re
import shutil
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import CLIPTokenizer, T5Tokenizer

from tilewright.export.tokenizers import clip, stand_in_clip, stand_in_t5, t5
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.text import token_ids

PROMPTS = [
    "",
    " ",
    "a",
    "the photo of a sharp image",
    "The  QUICK   brown\tfox,\n\njumps; over -- the (lazy) dog!?...",
    " leading and trailing ",
    "it's what they'd said: we'll see, they've won't I'm",
    "naïve café Ünïcödé ẞ ÇA e\u0301",
    "🙂 👩‍👩‍👧 smiles 🎉🎉",
    "图片 清晰 фото высокого качества",
    "4k 8K 1920x1080 50% $9.99 #1 a_b",
    "non\u00a0breaking\u3000blanks ﬁne \uff41",
    "<|endoftext|> inside <|startoftext|> a </s> b <pad> <unk>",
    "x" * 200,
    "high quality, detailed, " * 12,
]
LONG = 600  # tokens: none of the prompts has more

# Some of T5's rules as SentencePiece compiles them: tab, newline, U+00A0, U+3000 to blank, ﬁ to fi, wide a to a
CHARACTERS = (
    "eNol0wmwT1UcB/Df+88zDTM1isSErEmFhCyRXdREKKle9iWyFrKVZy1LiyW0WIoULVSvLJWyL2PNvpUsQ1OyU/bP5c587vfM/f3OOXfmnhvpEVEo"
    "Inv2iBzZIrky10UqBt8ccZPx9Fvd0lORWTLiy+R5gQhTMpN6St5igpbISS5u43Zycwd5yEde7uTnjFRYIvJzFwUpfOMVoihFKE4xSnA3to57uI97"
    "KcX9lKE0ZXmAcjxIBcpTkYeoTCUepgrVqEp1HqEmNahNLepSh0epRwPq8ziP8UTSkzsVjWRDGvMkTWnC0zzFMzTjWZrzPM/xAhm0pAWtaUVb2tCe"
    "dnSkA514kZfoTFe60J1u9KQHr/AyvenFq/ShH30ZQH9eYyCDeJ3ByUdnKEMYzjDeYAQjeZPRjOItxvAObzOWdxnPON5jApOYyPtM5kM+YAofMY2p"
    "fMx0ZvAJnzKTz5jFbD7nC+bwVSRnMWIuX/MN8/iOb/meLObzAwtZwI8sSs4gP/ELi1nCryxjKStYzipWsobVSS0rLdbK9axjIxvYzCa28Bvb2MoO"
    "trOLnexhN/vYyx/8zp/s5yAHOMwhjnA8PS3+kkf5O+kZkxbH5D9JjX85yQlOc4qznOE85/if/7jIBS5ziatcuf7vtY4OnWLZyLgGtFqLaw=="
)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model" / "tokenizer"
    path.mkdir(parents=True)
    return path


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def encoder(folder: Path, text: str) -> Callable[[str, int], list[int]]:
    """The ids as the runtime makes them of this JSON."""
    path = folder.parent / "made.json"
    path.write_text(text)
    return lambda prompt, length: token_ids(path, prompt, length)[0].tolist()


def refusal(kind: type[Exception], act, *arguments) -> str:
    with pytest.raises(kind) as caught:
        act(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700
    return text


# --- CLIP

CLIP_FORMS = ["files", "bare files", "one file", "published"]


def clip_folder(folder: Path, vocab: int, form: str) -> Path:
    """A stand-in's folder in one of the forms that tokenizers are published in."""
    write(folder, stand_in_clip(vocab))
    if form == "one file":
        CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    elif form == "bare files":
        (folder / "tokenizer_config.json").unlink()
        (folder / "special_tokens_map.json").unlink()
    elif form == "published":  # as in FLUX.1, with another token for padding, as in SDXL's second tokenizer
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        token = {name: {"content": f"<|{name}oftext|>", **flags} for name in ("start", "end")}
        config = {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(vocab - 2): {**token["start"], "special": True},
                str(vocab - 1): {**token["end"], "special": True},
            },
            "bos_token": "<|startoftext|>",
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": "<|endoftext|>",
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": "z</w>",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": "<|endoftext|>",
        }
        special = {"bos_token": token["start"], "eos_token": token["end"], "unk_token": token["end"]}
        files = {"tokenizer_config.json": config, "special_tokens_map.json": special | {"pad_token": "z</w>"}}
        write(folder, {name: json.dumps(value) for name, value in files.items()})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", CLIP_FORMS)
@pytest.mark.parametrize("vocab", [64, 49408])
def test_clip_has_the_ids_of_transformers(folder, vocab, form):
    theirs = CLIPTokenizer.from_pretrained(clip_folder(folder, vocab, form))
    for length in (2, 16, 77, 300):
        ours = encoder(folder, clip(folder, length))
        for prompt in PROMPTS:
            wanted = theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            assert ours(prompt, length) == wanted, (length, prompt)


def byte_level_bpe(files: dict[str, str], prompt: str, length: int) -> list[int]:
    """CLIP's tokenizer as its paper's code has it: lower case, byte symbols, the earliest merge first."""
    vocabulary = json.loads(files["vocab.json"])
    ranks = {tuple(line.split()): i for i, line in enumerate(files["merges.txt"].splitlines()[1:])}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbol = {b: chr(b) for b in visible}
    symbol |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in visible)}
    text = " ".join(unicodedata.normalize("NFC", prompt).split()).lower()
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", text):
        parts = [symbol[b] for b in word.encode()]
        parts[-1] += "</w>"
        while joined := ranks.keys() & pairwise(parts):
            at = list(pairwise(parts)).index(min(joined, key=ranks.__getitem__))
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        ids += [vocabulary.get(part, vocabulary["<|unk|>"]) for part in parts]
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    row = [start, *ids[: length - 2], end]
    return row + [end] * (length - len(row))


@pytest.mark.parametrize("vocab", [64, 300, 49408])
def test_clip_has_the_ids_of_a_byte_level_bpe(folder, vocab):
    files = stand_in_clip(vocab)
    ours = encoder(folder, clip(write(folder, files), 77))
    for prompt in PROMPTS:
        if "<|" not in prompt:
            assert ours(prompt, 77) == byte_level_bpe(files, prompt, 77), prompt


@pytest.mark.slow
def test_clip_keeps_eos_when_it_cuts(folder):
    ours = encoder(folder, clip(write(folder, stand_in_clip(49408)), 77))
    long, short = ours("photo " * 100, 77), ours("photo", 77)
    assert (long[0], long[-1], short[0], short[-1]) == (49406, 49407, 49406, 49407)
    assert long[1:-1] == [short[1]] * 75
    assert short[2:] == [49407] * 75


# --- T5


def t5_folder(folder: Path, form: str) -> Path:
    """A T5 tokenizer.json: a stand-in's, or as SentencePiece's converters have written them."""
    if form.startswith("stand-in"):
        return write(folder, {"tokenizer.json": stand_in_t5(int(form.split()[1]))})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -2.5), ("fi", -3.5), ("É", -7.0)]
    pieces += [(letter, -4.0 - i / 8) for i, letter in enumerate("etaoinshrdlucmfwypvbgkqjxz")]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in (1, 0)]
    made = Tokenizer(Unigram(pieces, unk_id=2))
    made.add_special_tokens([AddedToken(name, normalized=False) for name, score in pieces if score == 0])
    characters = normalizers.Precompiled(zlib.decompress(base64.b64decode(CHARACTERS)))
    if form == "earlier":
        strip, blanks = normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")
        made.normalizer = normalizers.Sequence([characters, strip, blanks])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        made.normalizer = characters
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(512)  # such settings of a file are not ours
    made.enable_padding(length=16, pad_id=2, pad_token="<unk>")
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("form", ["stand-in 64", "stand-in 32128", "earlier", "present"])
def test_t5_has_the_ids_of_transformers(folder, form):
    theirs = T5Tokenizer.from_pretrained(t5_folder(folder, form), extra_ids=0)
    ours = encoder(folder, t5(folder, LONG))
    for prompt in [*PROMPTS, "<extra_id_1>y", "a \x7f\x00 b"]:
        wanted = theirs(prompt, padding="max_length", max_length=LONG, truncation=False)
        assert ours(prompt, LONG) == wanted.input_ids, prompt
        assert wanted.input_ids[sum(wanted.attention_mask) - 1 :] == [1] + [0] * (LONG - sum(wanted.attention_mask))


def test_t5_leaves_a_long_prompt_long(folder):
    ours = encoder(folder, t5(t5_folder(folder, "present"), 512))
    assert ours("the " * 511, 512) == [4] * 511 + [1]
    said = refusal(UsageError, ours, "the " * 512, 512)
    assert "has 513 tokens, the network takes 512; use a shorter one" in said


def test_t5_is_converted_from_sentencepiece(folder):
    sentencepiece = pytest.importorskip("sentencepiece", reason="transformers reads spiece.model with it")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    ours = encoder(folder, t5(folder, LONG))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for prompt in PROMPTS:
        if "</s>" not in prompt:
            row = [*reference.encode(prompt), 1]
            assert ours(prompt, LONG) == row + [0] * (LONG - len(row)), prompt


# --- the stand-ins


@pytest.mark.slow
def test_stand_ins_are_the_same_on_every_call():
    assert stand_in_t5(32128) == stand_in_t5(32128)
    assert stand_in_clip(49408) == stand_in_clip(49408)


@pytest.mark.parametrize("vocab", [30, 64, 100, 32128])
def test_a_t5_stand_in_fills_the_networks_table(vocab):
    made = Tokenizer.from_str(stand_in_t5(vocab))
    assert sorted(made.get_vocab().values()) == list(range(vocab))
    assert [made.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]


@pytest.mark.parametrize("vocab", [55, 64, 100, 49408])
def test_a_clip_stand_in_fills_the_networks_table(vocab, folder):
    made = Tokenizer.from_str(clip(write(folder, stand_in_clip(vocab)), 77))
    assert sorted(made.get_vocab().values()) == list(range(vocab))
    special = ["<|unk|>", "<|startoftext|>", "<|endoftext|>"]
    assert [made.id_to_token(i) for i in range(vocab - 3, vocab)] == special


def test_tiny_stand_ins_tell_prompts_apart(folder):
    """A network on them reads more than unknowns, and words as well as letters."""
    ours = encoder(folder, clip(write(folder, stand_in_clip(64)), 16))
    the, photo = ours("the", 16), ours("photo", 16)
    assert the[2:] == [63] * 14
    assert len(set(photo)) == 7  # BOS, p, h, o, t, o</w>, EOS
    assert ours("é", 16)[1:3] == [61, 61]
    ours = encoder(folder, t5(write(folder, {"tokenizer.json": stand_in_t5(64)}), 16))
    assert ours("the photo", 16)[2:] == [1] + [0] * 13
    assert ours("é", 16)[:3] == [3, 2, 1]


@pytest.mark.slow
def test_the_full_clip_stand_in_knows_every_byte(folder):
    ours = encoder(folder, clip(write(folder, stand_in_clip(49408)), 77))
    assert not any(49405 in ours(prompt, 77) for prompt in PROMPTS)


# --- what is refused


def test_folders_without_their_files_are_refused(tmp_path):
    assert refusal(InputError, t5, tmp_path, 16) == (
        f"tokenizer {tmp_path}: tokenizer.json, spiece.model missing;"
        " give the folder with tokenizer.json, or spiece.model"
    )
    write(tmp_path, {"vocab.json": "{}"})
    assert refusal(InputError, clip, tmp_path, 16) == (
        f"tokenizer {tmp_path}: tokenizer.json, merges.txt missing;"
        " give the folder with tokenizer.json, or vocab.json and merges.txt"
    )
    assert "missing; give the folder" in refusal(InputError, clip, tmp_path / "nowhere", 16)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("merges.txt", "#version: 0.2\nq z x\n"),
        ("merges.txt", "#version: 0.2\n図 a\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", stand_in_t5(64)),
    ],
)
def test_damaged_clip_files_are_refused(folder, name, content):
    write(folder, stand_in_clip(64) | {name: content})
    said = refusal(InputError, clip, folder, 16)
    assert said.startswith(f"tokenizer {folder}")


def test_a_vocabulary_without_the_special_tokens_is_refused(folder, tmp_path):
    """transformers would add them behind it, where the network has no embedding."""
    write(folder, stand_in_clip(64) | {"vocab.json": json.dumps({"a": 0, "b": 1}), "merges.txt": "#version: 0.2\n"})
    said = refusal(InputError, clip, folder, 16)
    assert "its vocabulary has no <|endoftext|>, <|startoftext|>; is it the tokenizer of" in said
    shutil.rmtree(folder)
    folder.mkdir()
    CLIPTokenizer.from_pretrained(write(tmp_path, stand_in_clip(64))).backend_tokenizer.save(
        str(folder / "tokenizer.json")
    )
    assert "its vocabulary has no </s>, <pad>; is it" in refusal(InputError, t5, folder, 16)


def test_damaged_t5_files_are_refused(folder):
    write(folder, {"tokenizer.json": "{"})
    assert "cannot be read (EOF" in refusal(InputError, t5, folder, 16)


@pytest.mark.parametrize("installed", [False, True])
def test_a_spiece_model_that_cannot_be_converted_says_what_to_do(folder, monkeypatch, installed):
    write(folder, {"spiece.model": "no model"})
    if not installed:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refusal(InputError, t5, folder, 16) == (
        f"tokenizer {folder}: spiece.model cannot be converted;"
        " pip install sentencepiece protobuf, or put the model's tokenizer.json beside it"
    )


def test_more_ids_than_the_network_has_rows_are_refused(folder):
    write(folder, stand_in_clip(64))
    assert clip(folder, 16, rows=64)
    said = refusal(InputError, clip, folder, 16, None, 63)
    assert (
        said == f"tokenizer {folder}: has 64 ids, the network's table has 63 rows; is it the tokenizer of this encoder?"
    )


def test_no_library_of_networks_is_loaded_for_a_tokenizer(folder):
    write(folder, stand_in_clip(64))
    code = f"import sys, pathlib, tilewright.export.tokenizers as t; t.clip(pathlib.Path({str(folder)!r}), 16)"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(*sys.modules)"], capture_output=True, check=True)
    assert not {"torch", "transformers", "diffusers"} & set(done.stdout.decode().split())


def test_sizes_that_cannot_be_are_refused(folder):
    write(folder, stand_in_clip(64) | {"tokenizer.json": stand_in_t5(64)})
    assert refusal(UsageError, clip, folder, 1) == "length=1 is too small for a tokenizer; use 2 or more"
    assert refusal(UsageError, t5, folder, 0) == "length=0 is too small for a tokenizer; use 1 or more"
    assert refusal(UsageError, stand_in_clip, 54) == "vocab=54 is too small for a tokenizer; use 55 or more"
    assert refusal(UsageError, stand_in_t5, 29) == "vocab=29 is too small for a tokenizer; use 30 or more"
