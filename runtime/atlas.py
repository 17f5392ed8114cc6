"""Measurements of many sizes with several settings: what lies between them, and what changed since another time."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tilewright.runtime.errors import InputError

__all__ = ["atlas", "atlas_table", "diff", "diff_table", "interpolated", "setting_name"]

SURE = 0.01  # a difference is beyond noise if chance would make one as clear as this less often
LEAST_CHANGE = 0.02  # of the median; a smaller change is not told even if it is clear
LEAST_BYTES = 0.05  # of the peak memory
MOST_EXACT = 60  # runs up to which all orders are counted
SETTING = ("engines", "devices", "batch", "threads", "memory")
Row = Mapping[str, Any]


def atlas(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of profiles of the same bundle with different settings."""
    same = ("bundle", "system", "preset", "hardware", "when", "runs")
    settings = []
    for each in measured:
        setting = {name: value for name, value in each.items() if name not in same}
        setting["name"] = setting_name(each)
        setting["interpolation"] = left_out(each["resolutions"])
        settings.append(setting)
    return {name: measured[0][name] for name in same} | {"settings": settings}


def setting_name(measured: Mapping[str, Any]) -> str:
    """A short name for an engine, its devices and its batch."""
    devices = measured["devices"]
    engines = ", ".join(sorted(set(measured["engines"].values())))
    return f"{engines}, {len(devices)} device{'s' * (len(devices) > 1)}, batch {measured['batch']}"


def interpolated(rows: Sequence[Row], computed_px: float) -> float | None:
    """The median seconds for so many computed pixels: on the line between two measured sizes, both logarithmic.

    None outside of what was measured.
    """
    points = sorted((row["computed_px"], row["seconds"]["p50"]) for row in rows)
    for (left, before), (right, after) in pairwise(points):
        if left <= computed_px <= right:
            share = math.log(computed_px / left) / math.log(right / left) if right > left else 0.0
            return float(before * (after / before) ** share)
    return None


def left_out(rows: Sequence[Row]) -> dict[str, Any]:
    """How far the interpolation is off at each measured size if this size is left out; the outermost have no error."""
    errors = {}
    for row in rows:
        others = [other for other in rows if other is not row]
        guess = interpolated(others, row["computed_px"])
        if guess is not None and all(other["computed_px"] != row["computed_px"] for other in others):
            errors[f"{row['width']}x{row['height']}"] = guess / row["seconds"]["p50"] - 1
    return {"errors": errors, "largest": max(map(abs, errors.values()), default=None)}


def atlas_table(document: Mapping[str, Any]) -> str:
    """An atlas as text."""
    machine = document["hardware"]
    lines = [
        f"{document['system']} {document['preset']}, {machine['cpu']} x{machine['cores']},"
        f" {document['runs']} runs of each size"
    ]
    for setting in document["settings"]:
        names = list(setting["resolutions"][0]["seconds"])
        lines += [
            f"{setting['name']}, {setting['threads']} thread(s) each, {setting['engine']}, memory {setting['memory']}",
            f"{'resolution':>12} {'tiles':>6} {' '.join(f'{name} s'.rjust(8) for name in names)} {'first s':>8}"
            f" {'images/s':>9} {'Mpx/s':>7} {'peak MiB':>9} {'waste':>6} {'outside':>8}",
        ]
        for row in setting["resolutions"]:
            waste = max(row["waste"].values(), default=0.0)
            lines.append(
                f"{row['width']}x{row['height']}".rjust(12)
                + f" {sum(row['tiles'].values()):>6}"
                + "".join(f" {row['seconds'][name]:>8.3f}" for name in names)
                + f" {row['first_part_s']:>8.3f} {row['images_per_second']:>9.3f} {row['megapixels_per_second']:>7.2f}"
                + f" {row['peak_bytes'] / 2**20:>9.0f} {waste:>6.0%} {row['outside_engines']:>8.1%}"
            )
        for guess in setting.get("interpolated", ()):
            seconds = "outside of what was measured" if guess["seconds"] is None else f"about {guess['seconds']:.3f} s"
            lines.append(f"{guess['width']}x{guess['height']}".rjust(12) + f" {seconds}, by interpolation")
        if setting["interpolation"]["largest"] is not None:
            lines.append(
                f"interpolation is off by at most {setting['interpolation']['largest']:.0%}, leaving one size out"
            )
    return "\n".join(lines)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What changed between two atlases, where both measured the same size with the same setting."""
    rows, lacking = [], 0
    before = {_key(setting): setting for setting in old["settings"]}
    for setting in new["settings"]:
        there = before.get(_key(setting))
        sizes = {} if there is None else {(row["width"], row["height"]): row for row in there["resolutions"]}
        for row in setting["resolutions"]:
            if (was := sizes.get((row["width"], row["height"]))) is None:
                lacking += 1
                continue
            rows.append(
                {"setting": setting["name"], "width": row["width"], "height": row["height"]} | _change(was, row)
            )
    if not rows:
        raise InputError("the two profiles share no size with the same engines, devices, batch, threads and memory")
    differs = [name for name in ("bundle", "system", "preset", "hardware") if old[name] != new[name]]
    return {"rows": rows, "not_in_both": lacking, "differs": differs}


def _key(setting: Mapping[str, Any]) -> str:
    return repr([sorted(v.items()) if isinstance(v := setting[name], dict) else v for name in SETTING])


def _change(old: Row, new: Row) -> dict[str, Any]:
    seconds = new["seconds"]["p50"] / old["seconds"]["p50"] - 1
    chance = _chance(old["runs_s"], new["runs_s"])
    clear = chance < SURE and abs(seconds) >= LEAST_CHANGE
    memory = new["peak_bytes"] / old["peak_bytes"] - 1 if old["peak_bytes"] else 0.0
    verdict = ("slower" if seconds > 0 else "faster") if clear else "no difference beyond noise"
    return {
        "old_s": old["seconds"]["p50"],
        "new_s": new["seconds"]["p50"],
        "change": seconds,
        "chance": chance,
        "verdict": verdict,
        "peak_change": memory,
        "peak_verdict": ("more" if memory > 0 else "less") if abs(memory) >= LEAST_BYTES else "same",
        "same_tiles": old["tiles"] == new["tiles"],
    }


def _chance(old: Sequence[float], new: Sequence[float]) -> float:
    """How often chance alone would order two sets of runs as clearly: the two-sided test of Mann and Whitney."""
    wins = sum((a > b) + 0.5 * (a == b) for a in old for b in new)
    n, m = len(old), len(new)
    least = min(wins, n * m - wins)
    if n + m <= MOST_EXACT:
        ways = [[[1] for _ in range(m + 1)] for _ in range(n + 1)]  # i of one, j of the other -> wins -> orders
        for i in range(1, n + 1):
            for j in range(1, m + 1):
                last_is_old, last_is_new = [0] * j + ways[i - 1][j], ways[i][j - 1]
                size = max(len(last_is_old), len(last_is_new))
                padded = (w + [0] * (size - len(w)) for w in (last_is_old, last_is_new))
                ways[i][j] = [a + b for a, b in zip(*padded, strict=True)]
        return min(1.0, 2 * sum(ways[n][m][: math.floor(least) + 1]) / math.comb(n + m, n))
    spread = math.sqrt(n * m * (n + m + 1) / 12)
    return min(1.0, math.erfc(max(0.0, n * m / 2 - least - 0.5) / spread / math.sqrt(2)))


def diff_table(changes: Mapping[str, Any]) -> str:
    """A difference as text."""
    lines = [f"note: the {', '.join(changes['differs'])} of the two differ"] if changes["differs"] else []
    for row in changes["rows"]:
        memory = (
            f"; {abs(row['peak_change']):.0%} {row['peak_verdict']} memory" if row["peak_verdict"] != "same" else ""
        )
        tiles = "" if row["same_tiles"] else "; other tiles"
        lines.append(
            f"{row['width']}x{row['height']}".rjust(12)
            + f" {row['old_s']:.3f} s -> {row['new_s']:.3f} s ({row['change']:+.1%}): {row['verdict']}{memory}{tiles}"
            + f"  [{row['setting']}]"
        )
    if changes["not_in_both"]:
        lines.append(f"{changes['not_in_both']} measured size(s) of the new profile are not in the old one")
    return "\n".join(lines)
