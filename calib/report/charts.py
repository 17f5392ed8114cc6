"""Charts as SVG, drawn with the colours of the page that holds them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Dot", "bar", "heat_map", "lines"]

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 30, 14, 46  # around the plot
FAINTEST = 5.0  # powers of two below the largest, where a cell has no colour left


@dataclass(frozen=True)
class Dot:
    """A point of a chart."""

    x: float
    y: float
    text: str  # shown under the pointer
    kind: str = ""  # a class of the page
    label: str = ""


def lines(
    series: Mapping[str, Sequence[Dot]],
    x_title: str,
    y_title: str,
    *,
    rule: float | None = None,
    rule_text: str = "",
    percent: bool = False,
    powers: bool = False,
) -> str:
    """Points on lines. `rule`: a height to compare with. `percent`: x is a share. `powers`: y is logarithmic."""
    dots = [dot for of_line in series.values() for dot in of_line]
    ys = [_power(dot.y) if powers else dot.y for dot in dots] + ([] if rule is None else [rule])
    x_ticks, y_ticks = _ticks([dot.x for dot in dots], whole=not percent), _ticks(ys, whole=powers)
    place = _Plot(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.y(y)}" y2="{place.y(y)}"/>')
        text = f"1e{y:.0f}" if powers else f"{y:g}"
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{place.y(y) + 4}">{text}</text>')
    for x in x_ticks:
        text = f"{x:.0%}" if percent else f"{x:g}"
        parts.append(f'<text class="tick mid" x="{place.x(x)}" y="{HEIGHT - BOTTOM + 18}">{text}</text>')
    parts.append(f'<text class="title mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_title)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="title mid" transform="translate(14 {middle}) rotate(-90)">{escape(y_title)}</text>')
    if rule is not None:
        y = place.y(rule)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT + 4}" y="{y - 5}">{escape(rule_text)}</text>')
    for kind, of_line in series.items():
        points = [(place.x(dot.x), place.y(_power(dot.y) if powers else dot.y), dot) for dot in of_line]
        if not kind.startswith("alone"):
            joined = " ".join(f"{x},{y}" for x, y, _ in points)
            parts.append(f'<polyline class="line {kind}" points="{joined}"/>')
        for x, y, dot in points:
            about = f"<title>{escape(dot.text)}</title>"
            parts.append(f'<circle class="dot {kind} {dot.kind}" cx="{x}" cy="{y}" r="4.5">{about}</circle>')
            if dot.label:
                end = x > (LEFT + WIDTH - RIGHT) / 2
                text = (
                    f'class="label {"end" if end else ""}" x="{x + (-9 if end else 9)}" y="{y - 8 if end else y + 4}"'
                )
                parts.append(f"<text {text}>{escape(dot.label)}</text>")
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Plot:
    """Where values lie in the picture."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM), 1)


def _power(value: float) -> float:
    return math.log10(max(value, 1e-9))


def _ticks(values: Sequence[float], *, whole: bool) -> list[float]:
    """Round numbers around values, some 4 to 8."""
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * n for n in (1, 2, 5, 10) if span / (size * n) <= 6)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last += last == first
    return [round(n * step, 12) for n in range(first, last + 1)]


def bar(share: float, kind: str = "") -> str:
    """A horizontal bar that fills a share of its place."""
    width = max(0.5, min(100.0, 100 * share))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="back" width="100" height="10"/>'
        f'<rect class="front {kind}" width="{width:.1f}" height="10"/></svg>'
    )


def heat_map(rows: Mapping[str, Sequence[float]], texts: Mapping[str, str]) -> str:
    """Cells for each row's numbers, the fainter the smaller beside the row's largest. `texts`: after each row."""
    columns, label, after, high, top = max(map(len, rows.values())), 292, 74, 15, 20
    wide = max(8.0, min(40.0, (WIDTH + 60 - label - after) / columns))
    width, height = label + columns * wide + after, top + high * len(rows) + 4
    parts = [f'<svg class="heat" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img">']
    each = max(1, math.ceil(24 / wide))
    for column in range(0, columns, each):
        x = label + (column + 0.5) * wide
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{top - 6}">{column + 1}</text>')
    for place, (name, numbers) in enumerate(rows.items()):
        y = top + place * high
        text = name if len(name) <= 46 else f"{name[:20]}\u2026{name[-25:]}"
        parts.append(f'<text class="name end" x="{label - 6}" y="{y + 11}">{escape(text)}</text>')
        most = max(numbers) or 1.0
        for column, number in enumerate(numbers):
            depth = 1 - min(1.0, math.log2(most / number) / FAINTEST) if number > 0 else 0.0
            x, about = label + column * wide, f"<title>{escape(name)}, step {column + 1}: {number:g}</title>"
            opacity = f'fill-opacity="{0.06 + 0.94 * depth:.2f}"'
            parts.append(
                f'<rect class="cell" {opacity} x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="{high - 1}">'
                f"{about}</rect>"
            )
        parts.append(f'<text class="tick" x="{width - after + 6:.0f}" y="{y + 11}">{escape(texts[name])}</text>')
    return "".join([*parts, "</svg>"])
