"""Selecting the best of several restorations of one image by VICR's rule, from scores measured elsewhere.

Every metric ranks the candidates, higher scores being better, and the smallest sum of ranks wins. Ties go to the larger
mean of the min-max-normalised metrics, then to the earlier candidate. Scores are compared as decimal numbers, because
binary rounding of 0.1, 0.2 and 0.3 would break ties.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["Choice", "best_of", "read_scores", "select"]


@dataclass(frozen=True)
class Choice:
    """The winner, and the numbers that decided."""

    index: int
    rank_sums: tuple[int, ...]  # sums of ranks over all metrics; the smallest is best
    means: tuple[float, ...]  # means of the normalised metrics, 0 to 1; rounded for display only


def select(candidates: Sequence[Path], scores: Path) -> Choice:
    """The best candidate by a CSV file of scores. Candidates are in the order in which they were made."""
    if not candidates:
        raise UsageError("no candidates to select from; name at least one image")
    rows = read_scores(scores)
    chosen = [rows[image] for image in _matched(candidates, list(rows), scores)]
    return best_of({metric: [row[metric] for row in chosen] for metric in chosen[0]})


def best_of(scores: Mapping[str, Sequence[float]]) -> Choice:
    """The best candidate. `scores`: metric -> one score for each candidate, all in the same order."""
    counts = {len(values) for values in scores.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError("scores must have one metric or more, each with a value for every candidate, at least one")
    columns = [[_exact(metric, value) for value in values] for metric, values in scores.items()]
    rank_sums = [sum(ranks) for ranks in zip(*map(_ranks, columns), strict=True)]
    means = [sum(row) / len(columns) for row in zip(*map(_normalised, columns), strict=True)]
    index = min(range(len(means)), key=lambda i: (rank_sums[i], -means[i]))
    return Choice(index, tuple(rank_sums), tuple(map(float, means)))


def _exact(metric: str, value: float) -> Fraction:
    if not math.isfinite(value):
        raise UsageError(one_line(f"metric {metric!r} has the score {value}; use finite numbers"))
    return Fraction(repr(float(value)))


def _ranks(values: Sequence[Fraction]) -> list[int]:
    """Competition ranks (1, 1, 3): one more than the number of better candidates."""
    return [1 + sum(other > value for other in values) for value in values]


def _normalised(values: Sequence[Fraction]) -> list[Fraction]:
    low, spread = min(values), max(values) - min(values)
    return [(value - low) / spread if spread else Fraction(0) for value in values]


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Image -> metric -> score, from a CSV file with the header image,METRIC,METRIC,..."""
    lines = _lines(path)
    if not lines:
        raise InputError(f"{path} is empty; its first line must be image,METRIC,...")
    _, header = lines[0]
    if header[0] != "image" or len(header) < 2 or "" in header or len(set(header)) < len(header):
        raise InputError(one_line(f"{path} begins with {','.join(header)!r}; use image,METRIC,... with distinct names"))
    rows: dict[str, dict[str, float]] = {}
    for number, (image, *cells) in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(header) - 1:
            raise InputError(f"{where} has {len(cells) + 1} fields, the header has {len(header)}; make them equal")
        if image in rows:
            raise InputError(one_line(f"{where}: {image!r} has scores already; keep one line for each image"))
        scores = zip(header[1:], cells, strict=True)
        rows[image] = {metric: _number(cell, f"{where}: {metric} of {image!r}") for metric, cell in scores}
    if not rows:
        raise InputError(f"{path} has no scores below its header; add a line for each candidate")
    return rows


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not blank: number and fields, without blanks around fields."""
    try:
        # -sig: spreadsheets write a byte-order mark
        with open(path, encoding="utf-8-sig", newline="", opener=only_files) as file:
            reader = csv.reader(file)
            return [(reader.line_num, [field.strip() for field in fields]) for fields in reader if any(fields)]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a CSV file of scores") from None
    except (ValueError, csv.Error) as error:
        raise InputError(one_line(f"{path} is not a CSV file in UTF-8 ({error}); save it as one")) from None


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(one_line(f"{where} is {text!r}; use a finite number"))
    return value


def _matched(candidates: Sequence[Path], images: Sequence[str], scores: Path) -> list[str]:
    """For each candidate its image in the table: by path, or else by a file name that is unique there."""
    matched: dict[str, Path] = {}
    for candidate in candidates:
        same = [image for image in images if Path(image).absolute() == candidate.absolute()]
        images_found = same or [image for image in images if Path(image).name == candidate.name]
        if not images_found:
            raise InputError(one_line(f"{scores} has no scores for {candidate}; add a line for it"))
        if len(images_found) > 1:
            lines = " and ".join(map(repr, images_found[:2]))
            raise InputError(one_line(f"{scores} has {lines}, which could both be {candidate}; write its whole path"))
        if images_found[0] in matched:
            both = f"{matched[images_found[0]]} and {candidate}"
            raise UsageError(
                one_line(f"{both} would share the scores of {images_found[0]!r} in {scores}; give each its own")
            )
        matched[images_found[0]] = candidate
    return list(matched)
