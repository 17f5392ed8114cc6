"""An atlas as one HTML page that needs no network: plots of its numbers as SVG, and all of them as a table."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["page"]

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 48
SERIES = 8  # colours; more settings begin anew with the first
MARKS = ("circle", "square", "diamond", "triangle")
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --panel: #f6f8fa;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #1b7c83; --c6: #9a6700;
  --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --panel: #161b22; --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #f778ba; --c5: #39c5cf;
  --c6: #d29922; --c7: #b1bac4; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { max-width: 48rem; margin: .25rem 0 1rem; color: var(--soft); overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.keys { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 1rem; padding: 0; list-style: none; }
.keys svg { display: inline-block; width: 14px; height: 14px; margin-right: .4rem; vertical-align: -2px; }
.scroll { overflow-x: auto; margin-top: 1rem; } table { border-collapse: collapse; width: 100%; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } td:first-child, th:first-child { text-align: left; }
"""


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    machine, settings = document["hardware"], document["settings"]
    title = f"{document['system']} {document['preset']}: time and memory by size"
    versions = ", ".join(dict.fromkeys(setting["engine"] for setting in settings))
    about = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions};"
        f" {document['runs']} runs of each size; {document['when']}; bundle {document['bundle'][:16]}"
    )
    keys = "".join(
        f'<li><svg viewBox="-7 -7 14 14" aria-hidden="true">{_mark(i, 0, 0)}</svg>{escape(s["name"])}</li>'
        for i, s in enumerate(settings)
    )
    plots = "".join(
        [
            _plot("Seconds for an image: the median, and a line up to the slowest run", settings, _median, _slowest),
            _plot("Megapixels of the result in a second", settings, lambda row: row["megapixels_per_second"]),
            _plot("Peak memory in MiB", settings, lambda row: row["peak_bytes"] / 2**20),
            _phases(settings),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p>{escape(about)}</p><ul class="keys">{keys}</ul>'
        f'<div class="plots">{plots}</div><div class="scroll">{_table(settings)}</div>'
        f"<p>{escape(_between(settings))}</p></body></html>\n"
    )


def _median(row: Mapping[str, Any]) -> float:
    return float(row["seconds"]["p50"])


def _slowest(row: Mapping[str, Any]) -> float:
    return float(row["seconds"]["max"])


def _plot(
    title: str,
    settings: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
    most: Callable[[Mapping[str, Any]], float] | None = None,
) -> str:
    """A line for each setting over the size of the result; both axes are logarithmic."""
    rows = [row for setting in settings for row in setting["resolutions"]]
    across = _Axis([row["width"] * row["height"] / 1e6 for row in rows], LEFT, WIDTH - RIGHT)
    down = _Axis([f(row) for row in rows for f in (value, most) if f], HEIGHT - BOTTOM, TOP)
    parts = []
    for number in down.ticks:
        y = down(number)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number:g}</text>')
    for number in across.ticks:
        x = across(number)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{number:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">megapixels of the result</text>'
    )
    for i, setting in enumerate(settings):
        ordered = sorted(setting["resolutions"], key=lambda row: row["width"] * row["height"])
        points = [(across(row["width"] * row["height"] / 1e6), down(value(row)), row) for row in ordered]
        colour = f"var(--c{i % SERIES})"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, row in points:
            if most:
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{down(most(row)):.1f}" stroke="{colour}"/>'
                )
            told = f"{setting['name']}: {row['width']}x{row['height']}, {value(row):.4g}"
            parts.append(f"<g>{_mark(i, x, y)}<title>{escape(told)}</title></g>")
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><h2>{escape(title)}</h2>{drawn}</figure>"


class _Axis:
    """A logarithmic axis: a place for each number, and round numbers to show."""

    def __init__(self, numbers: Sequence[float], start: float, end: float) -> None:
        least, most = min(numbers), max(numbers)
        self.low, self.high = least / 1.25, most * 1.25
        self.start, self.end = start, end
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
        self.ticks = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]

    def __call__(self, number: float) -> float:
        share = math.log(number / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def _mark(series: int, x: float, y: float) -> str:
    colour, kind = f'fill="var(--c{series % SERIES})"', MARKS[series % len(MARKS)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {colour}/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (5.5, 4), (-5.5, 4)),
    }[kind]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" {colour}/>'


def _phases(settings: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each size of the first setting: which share of the time each phase takes."""
    setting, title = settings[0], f"Where the time goes: {settings[0]['name']}"
    shares = [(f"{r['width']}x{r['height']}", _shares(r)) for r in setting["resolutions"]]
    names = list(dict.fromkeys(name for _, share in shares for name in share))
    bar, gap, label = 22, 10, 96
    height = TOP + len(shares) * (bar + gap)
    parts = []
    for i, (size, share) in enumerate(shares):
        x, y = float(label), TOP + i * (bar + gap)
        parts.append(f'<text x="{label - 8}" y="{y + 16}" text-anchor="end">{size}</text>')
        for name, part in share.items():
            wide = part * (WIDTH - RIGHT - label)
            colour = f"var(--c{names.index(name) % SERIES})"
            told = escape(f"{size}, {name}: {part:.1%}")
            place = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{bar}"'
            parts.append(f'<rect {place} fill="{colour}"><title>{told}</title></rect>')
            x += wide
    keys = "".join(
        f'<li><svg viewBox="-7 -7 14 14" aria-hidden="true"><rect x="-6" y="-6" width="12" height="12"'
        f' fill="var(--c{i % SERIES})"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    drawn = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure><h2>{escape(title)}</h2><ul class="keys">{keys}</ul>{drawn}</figure>'


def _shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Each phase's share; the time of the passes is that of the engines, and what is outside of them."""
    phases = row["phases"]
    outside = max(0.0, row["outside_engines"]) * phases["passes"]
    engines = {name: spent for name, spent in phases.items() if name not in ("read", "passes", "assemble")}
    busy = sum(engines.values()) or 1.0
    parts = {name: (phases["passes"] - outside) * spent / busy for name, spent in engines.items()}
    parts |= {"outside of engines": outside, "read": phases["read"], "assemble": phases["assemble"]}
    total = sum(parts.values()) or 1.0
    return {name: part / total for name, part in parts.items()}


def _table(settings: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(n for s in settings for row in s["resolutions"] for n in row["seconds"]))
    heads = ["setting", "size", "tiles", *(f"{n} s" for n in names), "first part s", "images/s", "Mpx/s", "peak MiB"]
    heads += ["waste", "outside of engines"]
    rows = []
    for setting in settings:
        for row in setting["resolutions"]:
            cells = [setting["name"], f"{row['width']}x{row['height']}", str(sum(row["tiles"].values()))]
            cells += [f"{row['seconds'][n]:.3f}" if n in row["seconds"] else "" for n in names]
            cells += [f"{row['first_part_s']:.3f}", f"{row['images_per_second']:.3f}"]
            cells += [f"{row['megapixels_per_second']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
            cells += [f"{max(row['waste'].values(), default=0.0):.0%}", f"{row['outside_engines']:.1%}"]
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _between(settings: Sequence[Mapping[str, Any]]) -> str:
    known = [(s["name"], s["interpolation"]["largest"]) for s in settings if s["interpolation"]["largest"] is not None]
    if not known:
        return "Sizes between these were not interpolated: at least three sizes are needed to know the error."
    errors = "; ".join(f"{name}: at most {largest:.0%}" for name, largest in known)
    return (
        f"Between two sizes, the time lies near a straight line of this plot. Off, if one size is left out: {errors}."
    )
