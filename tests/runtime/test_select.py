"""VICR's best of N against the rule said in another way, and every table that decides nothing refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.select import Choice, best_of, read_scores, select

tables = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(-2, 3), min_size=size[0], max_size=size[0]), min_size=size[1], max_size=size[1]
    )
)


def refusal(kind: type[Exception], act, *arguments) -> str:
    with pytest.raises(kind) as caught:
        act(*arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


def scaled(column: list[int], unit: int) -> list[float]:
    """The same distances on another scale: tenths, tens."""
    return [value / 10 if unit < 0 else float(value * unit) for value in column]


# --- the rule


def by_the_rule(columns: list[list[int]]) -> tuple[int, list[int]]:
    """The rule in whole numbers: mean * (product of all spreads) instead of the mean of fractions."""
    spreads = [max(column) - min(column) or 1 for column in columns]
    product = int(np.prod(spreads))
    sums, heights = [], []
    for i in range(len(columns[0])):
        sums.append(sum(sorted(column, reverse=True).index(column[i]) + 1 for column in columns))
        heights.append(sum((c[i] - min(c)) * product // spread for c, spread in zip(columns, spreads, strict=True)))
    left = [i for i in range(len(sums)) if sums[i] == min(sums)]
    left = [i for i in left if heights[i] == max(heights[j] for j in left)]
    return left[0], sums


@settings(max_examples=100, deadline=None)
@given(tables, st.lists(st.sampled_from([-1, 1, 10]), min_size=4, max_size=4))
def test_the_winner_is_the_rules_on_any_table(columns, units):
    index, sums = by_the_rule(columns)
    scores = {f"metric{i}": scaled(column, units[i]) for i, column in enumerate(columns)}
    choice = best_of(scores)
    assert (choice.index, list(choice.rank_sums)) == (index, sums)
    values = np.array(list(scores.values()))
    low, spread = values.min(1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    expected = np.divide(values - low, spread, out=np.zeros_like(values), where=spread > 0).mean(0)
    np.testing.assert_allclose(choice.means, expected, atol=1e-12)


def test_the_smallest_rank_sum_wins_over_a_larger_mean():
    choice = best_of({"a": [3, 2.9, 1], "b": [3, 2.9, 1], "c": [0, 99, 100]})
    assert (choice.index, choice.rank_sums) == (0, (5, 6, 7))
    assert choice.means[1] > choice.means[0]


def test_equal_scores_share_the_better_rank():
    assert best_of({"a": [5, 5, 1, 7]}).rank_sums == (2, 2, 4, 1)


def test_a_tie_of_ranks_goes_to_the_larger_mean_and_then_to_the_earlier():
    assert best_of({"a": [0, 9, 10], "b": [10, 9, 0]}).index == 1
    choice = best_of({"a": [0, 1], "b": [70, 50]})
    assert (choice.index, choice.rank_sums, choice.means) == (0, (3, 3), (0.5, 0.5))


def test_a_metric_without_spread_counts_for_nobody():
    assert best_of({"a": [4, 4], "b": [1, 2]}) == Choice(1, (3, 2), (0.0, 0.5))


def test_a_single_candidate_wins():
    assert best_of({"a": [-3.5]}) == Choice(0, (1,), (0.0,))


def test_what_is_a_tie_in_decimals_is_a_tie():
    assert (0.3 - 0.1) / (0.5 - 0.1) < 0.5  # in binary, and so the second would win
    assert best_of({"a": [0.3, 0.5, 0.1], "b": [10, 5, 0]}) == Choice(0, (3, 3, 6), (0.75, 0.75, 0.0))


def test_scores_of_any_size_and_numpys_are_compared():
    assert best_of({"a": [-1.7e308, 1.7e308, 0]}).means == (0.0, 1.0, 0.5)
    assert best_of({"a": np.array([0.5, 0.25], np.float32)}).index == 0


@pytest.mark.parametrize("scores", [{}, {"a": []}, {"a": [1, 2], "b": [1]}])
def test_a_table_that_is_none_is_refused(scores):
    assert "a value for every candidate" in refusal(UsageError, best_of, scores)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_cannot_be_ranked_is_refused(value):
    assert f"metric 'a' has the score {value}" in refusal(UsageError, best_of, {"a": [1, value]})


# --- the table

TABLE = "image,maniqa,clipiqa\nout/1.png,0.5,0.25\n\nout/2.png, 0.75 ,1e-3\n"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table of scores beside the working directory's images, and say where it is."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = TABLE, encoding: str = "utf-8") -> Path:
        Path("scores.csv").write_bytes(text.encode(encoding))
        return Path("scores.csv")

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read(table, encoding, end):
    assert read_scores(table(TABLE.replace("\n", end), encoding)) == {
        "out/1.png": {"maniqa": 0.5, "clipiqa": 0.25},
        "out/2.png": {"maniqa": 0.75, "clipiqa": 0.001},
    }


def test_names_with_commas_and_quotes_are_read_as_csv_writes_them(table):
    assert read_scores(table('image,a\n"one, ""two"".png",1\n')) == {'one, "two".png': {"a": 1.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "scores.csv is empty; its first line must be image,METRIC,..."),
        ("\n ,\n", "scores.csv begins with ','"),
        ("image,a\n", "scores.csv has no scores below its header; add a line for each candidate"),
        ("image;a\n1.png;2\n", "scores.csv begins with 'image;a'; use image,METRIC,... with distinct names"),
        ("a,image\n2,1.png\n", "begins with 'a,image'"),
        ("image\n1.png\n", "begins with 'image'"),
        ("image,a,a\n1.png,2,3\n", "begins with 'image,a,a'"),
        ("image,a,\n1.png,2,3\n", "begins with 'image,a,'"),
        ("image,a\n1.png\n", "line 2 has 1 fields, the header has 2"),
        ("image,a\n\n1.png,2,3\n", "line 3 has 3 fields, the header has 2"),
        ("image,a\n1.png,1\n1.png,1\n", "line 3: '1.png' has scores already"),
        ("image,a\n1.png,good\n", "line 2: a of '1.png' is 'good'; use a finite number"),
        ("image,a\n1.png,\n", "line 2: a of '1.png' is ''; use a finite number"),
        ("image,a\n1.png,nan\n", "line 2: a of '1.png' is 'nan'; use a finite number"),
        ("image,a\n1.png,-inf\n", "line 2: a of '1.png' is '-inf'; use a finite number"),
        ("image,a\n\x1b[2J.png,x\n", "is 'x'; use a finite number"),
        (f"image,a\n{'x' * 9000}.png,y\n", "is 'y'; use a finite number"),
        (f"image,a\n{'x' * 200_000}.png,1\n", "is not a CSV file in UTF-8 (field larger than"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table, text, message):
    assert message in refusal(InputError, read_scores, table(text))


def test_a_file_that_is_no_text_or_not_there_is_refused(table):
    assert "not a CSV file in UTF-8" in refusal(InputError, read_scores, table("image,é\n1.png,2\n", "latin-1"))
    assert "No such file" in refusal(InputError, read_scores, Path("nowhere.csv"))
    assert "Is a directory" in refusal(InputError, read_scores, Path())


# --- candidates and table


def chosen(scores: Path, *candidates: str) -> Choice:
    return select([Path(candidate) for candidate in candidates], scores)


def test_candidates_are_taken_in_their_own_order(table):
    scores = table("image,a\n3.png,1\n1.png,2\n2.png,3\n")
    assert chosen(scores, "1.png", "2.png", "3.png") == Choice(1, (2, 1, 3), (0.5, 1.0, 0.0))
    assert chosen(scores, "3.png", "2.png", "1.png") == Choice(1, (3, 1, 2), (0.0, 1.0, 0.5))


def test_lines_of_other_images_play_no_part(table):
    assert chosen(table("image,a\n0.png,99\n1.png,2\n2.png,3\n"), "1.png", "2.png") == Choice(1, (2, 1), (0.0, 1.0))


@pytest.mark.parametrize("written", ["out/1.png", "./out/1.png", "{here}/out/1.png", "1.png", "/elsewhere/1.png"])
@pytest.mark.parametrize("given", ["out/1.png", "{here}/out/1.png"])
def test_a_line_belongs_to_a_candidate_by_path_or_by_file_name(table, tmp_path, written, given):
    scores = table(f"image,a\n{written.format(here=tmp_path)},5\nout/2.png,4\n")
    assert chosen(scores, "out/2.png", given.format(here=tmp_path)) == Choice(1, (2, 1), (0.0, 1.0))


def test_a_path_decides_where_names_are_equal(table):
    scores = table("image,a\nx/1.png,1\ny/1.png,2\n")
    assert chosen(scores, "x/1.png", "y/1.png").index == 1
    assert chosen(scores, "y/1.png", "x/1.png").index == 0


@pytest.mark.parametrize(
    ("kind", "candidates", "message"),
    [
        (UsageError, [], "no candidates to select from"),
        (InputError, ["x/1.png", "3.png"], "scores.csv has no scores for 3.png; add a line for it"),
        (InputError, ["1.png"], "scores.csv has 'x/1.png' and 'y/1.png', which could both be 1.png"),
        (InputError, ["x/1.png", "z/1.png"], "which could both be z/1.png; write its whole path"),
        (InputError, ["x/4.png"], "has 'x/4.png' and './x/4.png', which could both be x/4.png"),
        (UsageError, ["x/1.png", "x/1.png"], "x/1.png and x/1.png would share the scores of 'x/1.png'"),
        (UsageError, ["a/2.png", "b/2.png"], "a/2.png and b/2.png would share the scores of '2.png' in scores.csv"),
    ],
)
def test_candidates_that_the_table_does_not_tell_apart_are_refused(table, kind, candidates, message):
    scores = table("image,a\nx/1.png,1\ny/1.png,2\n2.png,3\nx/4.png,5\n./x/4.png,6\n")
    assert message in refusal(kind, chosen, scores, *candidates)
