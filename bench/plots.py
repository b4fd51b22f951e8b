"""Plots of a comparison that bench.encoder wrote: PNG, each for light and for dark backgrounds.

    python -m bench.plots FILE.json [--out bench/plots]

latency   milliseconds of one text against its tokens, a panel a model; another engine in the precision in which it is
          fastest
ratio     best peer's time by fastbert's, a dot a case, a bar the geometric mean: right of 1 fastbert is faster
roofline  share of the machine's limit (bench/roofline.py) that one text reaches, against its tokens
"""

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from PIL import Image

from bench.encoder import OURS, best_peer


class Theme(NamedTuple):
    paper: str
    ink: str
    faint: str
    ours: dict[str, str]  # by precision
    peers: dict[str, str]
    shades: tuple[float, float]  # of viridis, for the models


THEMES = {
    "light": Theme(
        "#ffffff",
        "#24292f",
        "#d0d7de",
        {"int8": "#0550ae", "fp32": "#54aeff"},
        {
            "ctranslate2": "#bc4c00",
            "openvino": "#1a7f37",
            "onnxruntime": "#bf3989",
            "pytorch": "#8c959f",
            "llama.cpp": "#9a6700",
        },
        (0.0, 0.8),
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#30363d",
        {"int8": "#58a6ff", "fp32": "#a5c8ff"},
        {
            "ctranslate2": "#f0883e",
            "openvino": "#3fb950",
            "onnxruntime": "#f778ba",
            "pytorch": "#8b949e",
            "llama.cpp": "#d29922",
        },
        (0.3, 1.0),
    ),
}
MARKERS = {"ctranslate2": "s", "openvino": "^", "onnxruntime": "D", "pytorch": "v", "llama.cpp": "x"}
DPI = 110
COLORS = 128  # a third of the bytes, and no difference to the eye


def panels(count: int, theme: Theme) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(3 * columns + 0.6, 2.5 * rows + 0.6), squeeze=False)
    figure.set_facecolor(theme.paper)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for one in axes[:count]:
        one.set_facecolor(theme.paper)
        one.tick_params(colors=theme.ink, labelsize=8, length=3)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(theme.faint)
        one.grid(axis="y", color=theme.faint, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes[:count]


def token_axis(axes: Axes, lengths: list[int], theme: Theme) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens", color=theme.ink, fontsize=8)


def finish(figure: Figure, theme: Theme, title: str, axes: Axes) -> None:
    height = figure.get_figheight()
    words = figure.suptitle(title, x=0.01, y=1 - 0.08 / height, ha="left", color=theme.ink, fontsize=10)
    words.set_in_layout(False)
    entries = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.42 / height))  # inches: the title and the legend are above
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="upper left",
        bbox_to_anchor=(0, 1 - 0.22 / height),
        ncols=len(entries),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=8,
        handlelength=1.6,
        columnspacing=1.2,
    )


def single_texts(cases: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens -> case, for batches of one text."""
    return {case["tokens"]: case for name, case in cases.items() if name.startswith("1 x ")}


def latency(record: dict[str, Any], theme: Theme) -> Figure:
    figure, grid = panels(len(record["models"]), theme)
    for axes, (model, cases) in zip(grid, record["models"].items(), strict=True):
        texts = single_texts(cases)
        lengths = list(texts)
        for engine, color in theme.peers.items():
            fastest = [
                min(
                    (x["ms"]["median"] for name, x in case["engines"].items() if name.split()[0] == engine),
                    default=None,
                )
                for case in texts.values()
            ]
            if None not in fastest:
                style = {"marker": MARKERS[engine], "markersize": 3, "linewidth": 1}
                axes.plot(lengths, fastest, color=color, label=engine, **style)
        for precision, color in theme.ours.items():
            own = [case["engines"][f"{OURS} {precision}"]["ms"]["median"] for case in texts.values()]
            axes.plot(lengths, own, color=color, label=f"{OURS} {precision}", marker="o", markersize=4, linewidth=2.2)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_title(model, loc="left", color=theme.ink, fontsize=9)
        token_axis(axes, lengths, theme)
    grid[0].set_ylabel("ms", color=theme.ink, fontsize=8)
    finish(figure, theme, "One text: milliseconds, each engine in its fastest precision", grid[0])
    return figure


def ratio(record: dict[str, Any], theme: Theme) -> Figure:
    figure, grid = panels(2, theme)
    names = list(record["models"])[::-1]
    for axes, (ours, against) in zip(grid, {"fp32": "fp32 peer", "int8": "peer"}.items(), strict=True):
        for y, model in enumerate(names):
            best = [best_peer(case, ours, record["counted"]) for case in record["models"][model].values()]
            values = [found[1] for found in best if found]
            axes.plot(
                values, [y] * len(values), "o", color=theme.ours[ours], alpha=0.6, markersize=4, markeredgewidth=0
            )
            mean = geometric_mean(values)
            axes.plot([mean], [y], "|", color=theme.ink, markersize=13, markeredgewidth=2)
            axes.annotate(
                f"{mean:.2f}", (mean, y), (0, 8), textcoords="offset points", ha="center", color=theme.ink, fontsize=8
            )
        axes.axvline(1, color=theme.ink, linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=theme.faint, linewidth=0.6)
        axes.set_title(f"{OURS} {ours}, best {against}", loc="left", color=theme.ink, fontsize=9)
        axes.set_xlabel("times as fast", color=theme.ink, fontsize=8)
    figure.suptitle("Best peer's time by fastbert's", x=0.01, ha="left", color=theme.ink, fontsize=10)
    figure.tight_layout()
    return figure


def roofline(record: dict[str, Any], theme: Theme) -> Figure:
    precisions = list(record["peaks"]["operations"])
    figure, grid = panels(len(precisions), theme)
    low, high = theme.shades
    shades = pyplot.get_cmap("viridis")
    for axes, precision in zip(grid, precisions, strict=True):
        for i, (model, cases) in enumerate(record["models"].items()):
            texts = single_texts(cases)
            shares = [
                case["limit_ms"][precision] / case["engines"][f"{OURS} {precision}"]["ms"]["median"]
                for case in texts.values()
            ]
            color = shades(low + (high - low) * i / max(1, len(record["models"]) - 1))
            axes.plot(list(texts), shares, color=color, label=model, marker="o", markersize=4, linewidth=1.6)
            token_axis(axes, list(texts), theme)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(f"{OURS} {precision}", loc="left", color=theme.ink, fontsize=9)
    finish(figure, theme, "One text: share of what arithmetic and memory allow", grid[0])
    return figure


PLOTS: dict[str, Callable[[dict[str, Any], Theme], Figure]] = {"latency": latency, "ratio": ratio, "roofline": roofline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what bench.encoder --json wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "plots")
    args = parser.parse_args()
    record = json.loads(args.file.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        if name == "roofline" and not record["peaks"]:
            print("skipped: roofline: the run has measured no peaks (it found no C compiler)")
            continue
        for theme, colors in THEMES.items():
            figure, drawn = draw(record, colors), io.BytesIO()
            figure.savefig(drawn, dpi=DPI)
            pyplot.close(figure)
            path = args.out / f"{name}-{theme}.png"
            Image.open(drawn).convert("RGB").quantize(COLORS).save(path, optimize=True)
            print(path)


if __name__ == "__main__":
    main()
