"""The pictures of docs/benchmarks.md and docs/scaling.md, drawn from what the benchmarks write with --json.

From the project's folder, with the group ``benchmarks`` installed:

    python benchmarks/memory.py --json docs/benchmarks/memory.json    # and redis_layers, scale, wsgi
    python benchmarks/plots.py

Each picture says under it what it was drawn from. Colours are variables of the SVG, which a reader's dark mode changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
# Of each variable: the value that matplotlib writes, which no other has, and those of light and dark mode.
COLOURS = {
    "paper": ("#fefefe", "#ffffff", "#16181d"),
    "ink": ("#010101", "#24292f", "#d5d9e0"),
    "grid": ("#e0e0e1", "#dfe2e6", "#363b45"),
    "ours": ("#0072b1", "#0068b3", "#4aa8ec"),
    "ours-trio": ("#56b4e8", "#1a9a8f", "#43c7b8"),
    "peer": ("#e69f01", "#e08a00", "#f0a53a"),
    "other-peer": ("#d55e01", "#b5452c", "#e07a5f"),
    "plain": ("#999998", "#8b949e", "#8b949e"),
}
SERIES = {
    "anyio_channels on asyncio": ("ours", "anyio_channels, asyncio"),
    "anyio_channels on trio": ("ours-trio", "anyio_channels, trio"),
    "anyio_channels": ("ours", "anyio_channels"),
    "channels on asyncio": ("peer", "channels"),
    "channels_redis on asyncio": ("peer", "channels_redis"),
    "fast-channels on asyncio": ("other-peer", "fast-channels"),
    "asgiref": ("peer", "asgiref"),
    "a2wsgi": ("other-peer", "a2wsgi"),
    "no adapter": ("plain", "no adapter"),
}
"""Who was measured: the colour, and what the legend says."""


def colour(name: str) -> str:
    """Return what stands for a variable until the picture is written."""
    return COLOURS[name][0]


def read(name: str) -> dict[str, Any]:
    """Return what a benchmark wrote."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def make_figure(heights: Sequence[float], height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of these relative heights below one another, as wide as a page."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04)
    figure = Figure(figsize=(8.2, height), layout=layout, facecolor=colour("paper"))
    return figure, list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def dress(axes: Axes, title: str) -> None:
    """Give a panel its title and quiet lines."""
    axes.set_title(title, loc="left", fontsize=11, color=colour("ink"), pad=10)
    axes.set_facecolor(colour("paper"))
    axes.tick_params(colors=colour("ink"), labelsize=9, length=0)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def number(value: float) -> str:
    """Return ``value`` with two or three digits that count."""
    digits = 2 if value < 1 else 1 if value < 10 else 0  # noqa: PLR2004
    return f"{value:,.{digits}f}"


def draw_rows(
    axes: Axes,
    title: str,
    unit: str,
    rows: Mapping[str, Mapping[str, float]],
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a group of points for each row, one for each series, with their values, on a logarithmic scale.

    Points, not bars: where the scale has no zero, a length says nothing.
    """
    dress(axes, title)
    every = [value for values in rows.values() for value in values.values()]
    least, most = limits or (min(every) / 1.6, max(every) * 1.9)
    place = 0.0
    ticks = []
    for values in rows.values():
        ticks.append(place + (len(values) - 1) / 2)
        for name, value in values.items():
            shade, label = SERIES[name]
            axes.hlines(place, least, value, color=colour("grid"), linewidth=1.5)
            axes.plot(value, place, "o", markersize=8, color=colour(shade), label=label)
            axes.annotate(
                number(value),
                (value, place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=colour("ink"),
            )
            place += 1
        place += 0.9
    axes.set_yticks(ticks, list(rows))
    axes.set_ylim(place - 1.2, -0.9)
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(unit, fontsize=9, color=colour("ink"))
    axes.grid(axis="x", color=colour("grid"), linewidth=0.8)


def add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Say once what the colours mean."""
    handles: dict[str, Any] = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        for handle, label in zip(found, labels, strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=min(len(handles), 4),
        fontsize=9,
        frameon=False,
        labelcolor=colour("ink"),
    )


def write(figure: Figure, name: str, title: str, source: Mapping[str, Any], packages: Sequence[str]) -> None:
    """Write the picture, with what it depends on in its last lines."""
    versions = ", ".join(f"{package} {source['versions'][package]}" for package in packages)
    figure.supxlabel(
        f"{source['date']}, Python {source['python']}, {source['machine']}, shared\n{versions}",
        fontsize=8,
        color=colour("ink"),
        x=0.01,
        ha="left",
    )
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = re.sub(r"<\?xml.*?<svg", "<svg", buffer.getvalue(), count=1, flags=re.DOTALL)
    for variable, (written, _, _) in COLOURS.items():
        text = text.replace(written, f"var(--{variable})")
    light, dark = (" ".join(f"--{name}: {values[mode]};" for name, values in COLOURS.items()) for mode in (1, 2))
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    text = re.sub(r"(<svg[^>]*>)", rf"\1\n <title>{title}</title>\n {style}", text, count=1)
    (FOLDER / f"{name}.svg").write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")


def draw_memory() -> None:
    """The in-memory layers."""
    source = read("memory")
    shown = ("anyio_channels on asyncio", "anyio_channels on trio", "channels on asyncio", "fast-channels on asyncio")
    rows = {
        "send + receive,\none task": "send + receive, one task",
        "group_send to 1,000,\nthen each is received": "group_send to 1,000 members, then each is received",
        "group_send to 1,000,\neach waits in a task": "group_send to 1,000 members, each waits in its own task",
        "group_send to 1,000\nalone": "group_send to 1,000 members alone",
    }
    figure, [axes] = make_figure([1], 5.6)
    figures = {label: {name: source["microseconds"][row][name] for name in shown} for label, row in rows.items()}
    draw_rows(axes, "In memory", "microseconds a delivery, or a send + receive (logarithmic; less is better)", figures)
    add_legend(figure, [axes])
    packages = ("anyio", "trio", "channels", "fast-channels")
    write(figure, "memory", "The in-memory layers beside those of channels and fast-channels", source, packages)


def draw_redis() -> None:
    """The layers on Redis."""
    source = read("redis_layers")
    shown = (
        "anyio_channels on asyncio",
        "anyio_channels on trio",
        "channels_redis on asyncio",
        "fast-channels on asyncio",
    )
    rows = {
        "send + receive,\none task": "send + receive, one task",
        "50 senders,\none reader": "50 senders, one reader",
        "group_send to 1,000\nreaders that wait": "group_send to 1,000 readers that wait",
        "group_send to 1,000,\nreceived in turn": "group_send to 1,000, received in turn",
    }
    figure, panels = make_figure([1, 1], 9.6)
    unit = "microseconds a message or delivery (logarithmic; less is better)"
    for axes, (kind, title) in zip(panels, (("queue", "Queue layer"), ("pub/sub", "Pub/sub layer")), strict=True):
        found = source["microseconds"]
        figures = {label: {name: found[f"{kind}: {row}"][name] for name in shown} for label, row in rows.items()}
        draw_rows(axes, title, unit, figures)
    add_legend(figure, panels)
    packages = ("Redis", "anyio", "trio", "channels-redis", "fast-channels", "redis", "hiredis")
    write(
        figure, "redis_layers", "The layers on Redis beside those of channels_redis and fast-channels", source, packages
    )


def draw_scale() -> None:
    """What a delivery costs, by the number of members and the servers."""
    source = read("scale")
    figure, [axes] = make_figure([1], 5.0)
    dress(axes, "A broadcast to members in eight processes")
    styles = {"one": ("-", "one Redis"), "two": ("--", "two Redis"), "cluster": (":", "a cluster of three")}
    for layer, shade in (("queue", "ours"), ("pub/sub", "peer")):
        for topology, (style, words) in styles.items():
            ones = [one for one in source["topologies"][topology]["broadcasts"] if one["layer"] == layer]
            axes.plot(
                [one["members"] for one in ones],
                [one["cpu us a delivery"] for one in ones],
                style,
                color=colour(shade),
                marker="o",
                markersize=4,
                linewidth=1.8,
                label=f"{layer}, {words}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, places in ((axes.xaxis, [100, 1000, 10_000]), (axes.yaxis, [3, 5, 10, 20, 50, 100])):
        axis.set_ticks(places)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("members of the group", fontsize=9, color=colour("ink"))
    axes.set_ylabel(
        "CPU microseconds a delivery,\nall processes and servers (less is better)", fontsize=9, color=colour("ink")
    )
    axes.grid(color=colour("grid"), linewidth=0.8)
    axes.legend(fontsize=9, frameon=False, labelcolor=colour("ink"), ncols=2)
    title = "CPU time of a delivery by the number of members, for both layers and three kinds of servers"
    write(figure, "scale", title, source, ("redis", "hiredis", "anyio"))


def draw_wsgi() -> None:
    """The WSGI adapters."""
    source = read("wsgi")
    rows = {
        "one connection": "small-1",
        "50 connections": "small-50",
        "beside 50 slow\ndownloads": "slow-downloads",
        "beside 50 slow\nuploads": "slow-uploads",
    }
    figure, panels = make_figure([18.7, 7], 7.6)
    found = source["medians"]
    for axes, direction, title in zip(
        panels,
        ("wsgi-to-asgi", "asgi-to-wsgi"),
        ("WSGI application under uvicorn", "ASGI application under gunicorn"),
        strict=True,
    ):
        figures = {
            label: {
                adapter: one["requests/s"]
                for adapter, one in found[f"{direction}: {row}"].items()
                if isinstance(one, dict) and "requests/s" in one
            }
            for label, row in rows.items()
            if f"{direction}: {row}" in found
        }
        draw_rows(axes, title, "small requests a second (logarithmic; more is better)", figures, (1, 30_000))
    add_legend(figure, panels)
    title = "The adapters between WSGI and ASGI beside those of asgiref and a2wsgi"
    write(figure, "wsgi", title, source, ("anyio", "asgiref", "a2wsgi", "uvicorn", "gunicorn"))


def main() -> None:
    """Draw all."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "anyio_channels", "font.family": "sans-serif"})
    draw_memory()
    draw_redis()
    draw_scale()
    draw_wsgi()


if __name__ == "__main__":
    main()
