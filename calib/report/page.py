"""The report as one HTML page, which needs nothing from elsewhere: no script, no font, no file beside it."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tilewright.calib.judge.gates import CROPS
from tilewright.calib.report.charts import Dot, bar, heat_map, lines
from tilewright.calib.report.facts import crops_of, figures, filled
from tilewright.runtime.bundle.manifest import PRECISIONS

__all__ = ["page"]

STYLE = Path(__file__).with_name("page.css")
MOST_ROWS = 48  # of a heat map
MOST_GROUPS = 24
Facts = Mapping[str, Any]


def page(facts: Facts, root: Path) -> str:
    """The page of a report."""
    gate = facts["gate"]
    title = f"{facts['system']} in {' and '.join(facts['recipes'])}"
    body = [f"<header><h1>{escape(title)}</h1>", f"<p>bundle <code>{facts['bundle'][:12]}</code></p></header>"]
    body += _verdict(facts)
    if gate:
        body += _section("Engines", _engines(gate), _judges(gate))
        body += _drift(gate)
        body += _crops(crops_of(root, gate), root / CROPS, gate)
    for precision, recipe in facts["recipes"].items():
        of = f" in {precision}" if len(facts["recipes"]) > 1 else ""
        body += _frontier(recipe, precision, gate, of)
        body += _groups(recipe, of)
        body += _heat(recipe, of)
        body += _plan(recipe, facts["engines"][precision], precision, of)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, content: str, text: str = "") -> list[str]:
    about = f"<p>{text}</p>" if text else ""
    return [f"<section><h2>{escape(title)}</h2>{about}{content}</section>"]


def _verdict(facts: Facts) -> list[str]:
    """The result in a few lines."""
    gate, parts = facts["gate"], []
    if gate is None:
        return ['<p class="verdict">These engines were not judged yet: <code>tilewright calib gate</code> does it.</p>']
    if facts["stale"]:
        parts.append('<p class="verdict miss">The bundle has changed since it was judged.</p>')
    for name, engine in gate["engines"].items():
        if "low_share" not in engine:
            continue
        kind = "miss" if engine["fault"] else "slow" if engine["slower_than"] else "good"
        said = [
            engine["fault"]
            or f"{engine['mean_db']:.1f} dB against float32, within the budget of {gate['budget_db']:g} dB",
            f"{engine['low_share']:.0%} of the linear work in 8 bits",
        ]
        if engine["slower_than"]:
            said.append(f"slower than {engine['slower_than']} here, so it is not the default")
        parts.append(f'<p class="verdict {kind}"><strong>{escape(name)}</strong> {escape("; ".join(said))}.</p>')
    return parts


def _judges(gate: Facts) -> str:
    count, threads = len(gate["images"]), gate["threads"]
    return (
        f"Judged by {count} picture{'s' * (count != 1)} that nothing was calibrated on, on {threads} threads of"
        f" {escape(gate['processor'])}. The engines took turns in one run."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML; all but the first column are numbers."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _engines(gate: Facts) -> str:
    engines = dict(sorted(gate["engines"].items(), key=lambda item: PRECISIONS.index(item[1]["precision"])))
    slowest = max(engine["seconds"] for engine in engines.values())
    heads = ["engine", "PSNR, dB", "worst", "SSIM", "choices changed", "lost, dB", "in 8 bits", "peak MiB", "s/MP", ""]
    rows = []
    for name, engine in engines.items():
        number, share = figures(engine), engine.get("low_share")
        rows.append(
            [
                escape(name),
                *(number[key] for key in ("mean", "worst", "ssim", "changed", "lost")),
                "" if share is None else f"{share:.0%}",
                f"{engine['peak_bytes'] / 2**20:.0f}",
                number["seconds"],
                bar(engine["seconds"] / slowest, "" if share is None else "low"),
            ]
        )
    return _table(*filled(heads, rows))


def _drift(gate: Facts) -> list[str]:
    series: dict[str, list[Dot]] = {}
    for name, engine in gate["engines"].items():
        for value, steps in engine["drift"].items():
            if "low_share" in engine and max(steps) > 0:
                dots = [
                    Dot(step + 1, d, f"{name}, {value} after step {step + 1}: {d:.2e}") for step, d in enumerate(steps)
                ]
                last = dots[-1]
                dots[-1] = Dot(
                    last.x, last.y, last.text, label=f"{name}, {value}" if len(engine["drift"]) > 1 else name
                )
                series[f"line-{len(series) % 4}"] = dots
    if not series:
        return []
    chart = lines(series, "step", "distance from float32", powers=True)
    return _section("Drift", chart, "How far the values that steps pass on are from those of float32, as relative L2.")


def _crops(crops: Sequence[Facts], folder: Path, gate: Facts) -> list[str]:
    if not crops:
        return []
    figures = []
    for crop in crops:
        name, engine = crop["name"], gate["engines"].get(crop["name"])
        note = "" if engine is None else f" <span>{engine['psnr_db'][crop['picture']]:.1f} dB</span>"
        images = _image(folder / crop["file"], name)
        if "difference" in crop and (folder / crop["difference"]).is_file():
            images += _image(folder / crop["difference"], f"difference of {name}")
            note += f" <span>below: difference \u00d7{crop['gain']}</span>"
        figures.append(f"<figure>{images}<figcaption><b>{escape(name)}</b>{note}</figcaption></figure>")
    picture = gate["images"][crops[0]["picture"]]
    text = f"The part of {escape(picture)} that 8 bits changed most; no other picture has a part that changed more."
    return _section("Before and after", f'<div class="crops">{"".join(figures)}</div>', text)


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _frontier(recipe: Facts, precision: str, gate: Facts | None, of: str) -> list[str]:
    points, budget = recipe["frontier"], recipe["budget_db"]
    if not points:
        return []
    dots = []
    for place, point in enumerate(points):
        back = f"{point['kept'][-1]} returned to float" if point["kept"] else "all in 8 bits"
        text = f"{point['share']:.1%} of the work, {point['mean_db']:.1f} dB, worst {point['worst_db']:.1f}: {back}"
        chosen = place == recipe["chosen"]
        dots.append(Dot(point["share"], point["mean_db"], text, "chosen" if chosen else "", "chosen" if chosen else ""))
    series = {"line-0": dots}
    if gate:
        judged = [
            Dot(e["low_share_of_all"], e["mean_db"], f"{name}, held-out pictures: {e['mean_db']:.1f} dB", label=name)
            for name, e in gate["engines"].items()
            if e["precision"] == precision and "low_share_of_all" in e
        ]
        series |= {"alone": judged} if judged else {}
    chart = lines(
        series,
        "share of all multiplications in 8 bits",
        "PSNR against float32, dB",
        rule=budget,
        rule_text="" if budget is None else f"budget {budget:g} dB",
        percent=True,
    )
    text = "Each point is a measured recipe: from right to left, one group of layers more returns to float."
    text += " The single points are the engines, on held-out pictures." if "alone" in series else ""
    return _section(f"Frontier{of}", chart, text)


def _groups(recipe: Facts, of: str) -> list[str]:
    groups = recipe["groups"]
    if not groups:
        return []
    kept = {name for name, layer in recipe["layers"].items() if layer["weight"] == "kept"}
    most = max(10 ** (-group["mean_db"] / 20) for group in groups)
    rows = []
    for group in groups[:MOST_GROUPS]:
        returned = set(group["layers"]) <= kept
        rows.append(
            [
                _breakable(group["name"]),
                f"{group['mean_db']:.1f}",
                bar(10 ** (-group["mean_db"] / 20) / most, "kept" if returned else ""),
                f"{group['worst_db']:.1f}",
                f"{group['share']:.1%}",
                "float" if returned else "8 bits",
            ]
        )
    heads = ["group alone in 8 bits", "dB", "error", "worst", "of the work", "now in"]
    text = (
        "One group of layers in 8 bits, all others in float. The longer the bar, the larger the error of the picture."
    )
    if len(groups) > MOST_GROUPS:
        text += f" The {MOST_GROUPS} most sensitive of {len(groups)} are shown."
    return _section(f"Sensitivity{of}", _table(heads, rows, "bars"), text)


def _breakable(name: str) -> str:
    """A name that may be broken after its dots and slashes."""
    return re.sub("([./])", r"\1<wbr>", escape(name))


def _heat(recipe: Facts, of: str) -> list[str]:
    steps = max((len(entry["largest"]) for entry in recipe["inputs"].values()), default=0)
    if not steps:
        return []
    inputs = {name: entry for name, entry in recipe["inputs"].items() if len(entry["largest"]) == steps}
    spread = {name: max(entry["largest"]) / (min(entry["largest"]) or 1) for name, entry in inputs.items()}
    shown = sorted(sorted(inputs, key=lambda name: -spread[name])[:MOST_ROWS])
    chart = heat_map({n: inputs[n]["largest"] for n in shown}, {n: f"{inputs[n]['scale']:.3g}" for n in shown})
    text = "The largest number that enters a layer at each step, beside the largest of all steps; each level of colour"
    text += " is a factor. At the right is the scale of the engine, which holds for all steps."
    if steps == 1:
        text = "The scale of the numbers that enter layers. This system takes no steps, so there is one for each."
    if len(inputs) > MOST_ROWS:
        text += f" Shown are the {MOST_ROWS} of {len(inputs)} inputs that change most."
    return _section(f"Scale per step{of}", f'<div class="wide">{chart}</div>', text)


def _plan(recipe: Facts, engines: Sequence[Facts], precision: str, of: str) -> list[str]:
    rows = [
        [
            escape(f"{engine['component']}, {engine['engine']}"),
            f"{engine['weight_bytes'] / 1e6:.1f}",
            f"{engine['float_bytes'] / 1e6:.1f}",
            escape(engine["form"]),
        ]
        for engine in engines
    ]
    made = _table(["engine", "weights, MB", "in the bundle, MB", "form"], rows, "text")
    layers = []
    for name, layer in recipe["layers"].items():
        entries = [recipe["inputs"][i] for i in layer["inputs"] if i in recipe["inputs"]]
        kept = layer["weight"] == "kept"
        ranges = "" if kept else "; ".join(f"{e['range'][0]:.3g} to {e['range'][1]:.3g}" for e in entries)
        how = (
            ""
            if kept
            else ", ".join(dict.fromkeys(e["method"] + (" smoothed" if e["smoothed"] else "") for e in entries))
        )
        layers.append(
            [
                _breakable(name),
                f"{layer['share']:.1%}",
                "float" if kept else escape(layer["weight"]),
                ranges,
                how,
                escape(layer["why"]),
            ]
        )
    heads = ["layer", "of the work", "weight", "range of what enters", "method", "why"]
    whole = _table(heads, layers, "text")
    text = (
        f"{recipe['quantised']} of {len(recipe['layers'])} layers are in {precision}: {recipe['linear_share']:.1%} of"
        f" the work of linear layers, {recipe['share']:.1%} of that of all layers."
    )
    listed = f"<details><summary>All {len(layers)} layers</summary>{whole}</details>"
    return _section(f"Plan{of}", made + listed, text)
