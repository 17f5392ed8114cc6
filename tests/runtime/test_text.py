"""A prompt's ids by a tokenizer of known words, and every text or file that gives none refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError
from tilewright.runtime.text import token_ids

tokenizers = pytest.importorskip("tokenizers", reason="a text input needs them")

VOCABULARY = {"<pad>": 0, "</s>": 1, "?": 2, "a": 3, "sharp": 4, "photo": 5}


@pytest.fixture
def file(tmp_path):
    """Write a tokenizer of words that ends with </s> and pads to 6, and say where it is."""

    def write(truncated: bool = False, unknown: str = "?") -> Path:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token=unknown))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        made.enable_padding(length=6, pad_id=0, pad_token="<pad>")
        if truncated:
            made.enable_truncation(6)
        made.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    return write


def refusal(kind: type[Exception], *arguments) -> str:
    with pytest.raises(kind) as caught:
        token_ids(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [1, 0, 0, 0, 0, 0]),
        ("a sharp photo", [3, 4, 5, 1, 0, 0]),
        ("  a\n é \U0001f600\0 ", [3, 2, 2, 1, 0, 0]),
        ("a a a a a", [3, 3, 3, 3, 3, 1]),
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_a_text_becomes_one_row_of_ids_padded_as_the_file_says(file, truncated, text, ids):
    row = token_ids(file(truncated), text, 6)
    assert (row.dtype, row.tolist()) == (np.int64, [ids])


def test_a_file_is_read_once_until_it_changes(file, monkeypatch):
    reads = []

    class Counted:
        def from_file(path):
            reads.append(path)
            return tokenizer.from_file(path)

    tokenizer = tokenizers.Tokenizer
    path = file()
    document = json.loads(path.read_text())
    document["model"]["vocab"] |= {"sharp": 5, "photo": 4}
    monkeypatch.setattr(tokenizers, "Tokenizer", Counted)
    for text, number in (("sharp", 4), ("photo", 5), ("sharp", 4)):
        assert token_ids(path, text, 6)[0, 0] == number
    assert reads == [str(path)]
    path.write_text(json.dumps(document))
    assert token_ids(path, "sharp", 6)[0, 0] == 5 and len(reads) == 2


def test_a_long_text_is_cut_where_the_file_says(file):
    assert token_ids(file(truncated=True), "sharp " * 1000, 6).tolist() == [[4, 4, 4, 4, 4, 1]]


def test_a_long_text_is_refused_where_the_file_does_not_cut(file):
    assert refusal(UsageError, file(), "a sharp photo a sharp photo", 6) == (
        "the text 'a sharp photo a sharp photo' has 7 tokens, the network takes 6; use a shorter one"
    )


def test_only_the_first_words_of_a_refused_text_are_shown(file):
    said = refusal(UsageError, file(), "a sharp\nphoto of " + "something " * 1000, 6)
    assert said.startswith(
        r"the text 'a sharp\nphoto of something something som...' has 1005 tokens, the network takes 6"
    )


def test_a_file_that_pads_to_less_than_the_network_takes_is_no_matter_of_the_text(file):
    said = refusal(UsageError, file(), "a photo", 77)
    assert said == "the text 'a photo' has 6 tokens, the network takes 77; rebuild the bundle"


def test_bytes_that_are_no_unicode_are_refused(file):
    said = refusal(UsageError, file(), b"caf\xe9".decode(errors="surrogateescape"), 6)
    assert said == r"the text 'caf\udce9' is not valid Unicode; write it in UTF-8"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "Unigram"}}', None])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    said = refusal(BundleError, path, "a photo", 6)
    assert said.startswith(f"{path} is no tokenizer that can be used (")
    assert said.endswith("); rebuild the bundle")


def test_a_tokenizer_that_fails_on_a_text_is_refused(file):
    path = file(unknown="<none>")
    assert token_ids(path, "a", 6).tolist() == [[3, 1, 0, 0, 0, 0]]
    assert "is no tokenizer that can be used (WordLevel error" in refusal(BundleError, path, "unheard", 6)


def test_without_the_package_a_text_says_what_to_install(file, monkeypatch):
    path = file()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = refusal(EnvironmentMismatch, path, "a photo", 6)
    assert said == "a text input needs tokenizers: pip install 'tilewright[text]'"


def test_the_package_is_loaded_when_a_text_is_encoded_and_no_sooner(file):
    code = (
        "import sys; from pathlib import Path; from tilewright.runtime.text import token_ids\n"
        f"print('tokenizers' in sys.modules); token_ids(Path({str(file())!r}), 'a', 6)\n"
        "print('tokenizers' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "True"]
