"""The plot of benchmark results: one panel per job, with one bar for us and one per peer.

Jobs of a benchmark stand side by side and share the names at the left. Each panel has a scale of its own that begins at
zero, so that lengths of bars in a panel compare as their values do.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from benchmarks.measure import Result

OURS, VARIANT, PEER, BOUND = "ours", "ours with other settings", "peer", "bound: less than the whole job"
COLORS = {OURS: "#1f77b4", VARIANT: "#9ecae1", PEER: "#f4a259", BOUND: "#bdbdbd"}
CAPTION = "Shorter is better. Each panel has its own scale. In parentheses: the value divided by ours."
MOST_PANELS_PER_ROW = 3
MOST_CHARACTERS_PER_NAME_LINE = 42
FONT_SIZE = 9.0  # points
HEADING_SIZE = 10.5
POINTS_PER_INCH = 72
HINTING = 1.04  # glyphs rounded to whole pixels are a little wider than their outlines

# Lengths in inches.
FIGURE_WIDTH = 10.0
MARGIN = 0.1
CAPTION_HEIGHT = 0.4  # with the legend
LINE_HEIGHT = 0.15
BAR_HEIGHT = 0.14
BAR_GAP = 0.05
PANEL_GAP = 0.2
ROW_GAP = 0.12
BENCHMARK_GAP = 0.26


@dataclass
class Panel:
    """The results of one job: one per peer, each with the same value of ours."""

    job: str
    results: list[Result]

    @property
    def peers(self) -> list[str]:
        return [result.peer for result in self.results]


@dataclass
class Row:
    """Panels of one benchmark that have the same peers."""

    heading: str  # empty below the first row of a benchmark
    panels: list[Panel]
    left: float  # inches from the edge of the figure to the first panel

    @property
    def panel_width(self) -> float:
        gaps = PANEL_GAP * (len(self.panels) - 1)
        return (FIGURE_WIDTH - MARGIN - self.left - gaps) / len(self.panels)

    @cached_property
    def names(self) -> list[str]:
        return [wrapped_name(name) for name in (OURS, *self.panels[0].peers)]

    @cached_property
    def titles(self) -> list[str]:
        return [wrapped_title(panel.job, self.panel_width) for panel in self.panels]

    @property
    def bar_pitch(self) -> float:
        return BAR_GAP + max(BAR_HEIGHT, LINE_HEIGHT * max(map(line_count, self.names)))

    @property
    def bars_height(self) -> float:
        return self.bar_pitch * len(self.names)

    @property
    def titles_height(self) -> float:
        return LINE_HEIGHT * max(map(line_count, self.titles)) + BAR_GAP

    @property
    def gap_above(self) -> float:
        return BENCHMARK_GAP if self.heading else ROW_GAP

    @property
    def height(self) -> float:
        return self.gap_above + self.titles_height + self.bars_height


def draw(results: Sequence[Result], headings: Mapping[str, str]) -> Figure:
    """Returns the figure of at least one result. `headings` holds the heading of each benchmark by its name."""
    rows = list(rows_of_panels(results, headings))
    height = CAPTION_HEIGHT + sum(row.height for row in rows) + MARGIN
    figure = Figure(figsize=(FIGURE_WIDTH, height))
    draw_caption(figure, {kind_of(result.peer) for result in results})
    top = height - CAPTION_HEIGHT
    for row in rows:
        draw_row(figure, row, top)
        top -= row.height
    return figure


def rows_of_panels(results: Sequence[Result], headings: Mapping[str, str]) -> Iterator[Row]:
    """Yields the rows from top to bottom. Jobs of a benchmark share a row only if they have the same peers."""
    names = {line for result in results for line in wrapped_name(result.peer).splitlines()}
    widths = [text_width(name) for name in names]
    widths += [text_width(headings.get(result.benchmark, ""), HEADING_SIZE, "bold") for result in results]
    left = 2 * MARGIN + max(widths)
    for benchmark, of_benchmark in groupby(results, lambda result: result.benchmark):
        heading = headings.get(benchmark, benchmark)
        panels_by_peers = defaultdict(list)
        for job, of_job in groupby(of_benchmark, lambda result: result.job):
            panel = Panel(job, list(of_job))
            panels_by_peers[tuple(panel.peers)].append(panel)
        for panels in panels_by_peers.values():
            for in_row in equal_parts(panels, math.ceil(len(panels) / MOST_PANELS_PER_ROW)):
                yield Row(heading, in_row, left)
                heading = ""


def equal_parts(panels: Sequence[Panel], count: int) -> Iterator[Sequence[Panel]]:
    """Yields `count` parts, whose lengths differ by at most one, the longest first."""
    start = 0
    for parts_left in range(count, 0, -1):
        end = start + math.ceil((len(panels) - start) / parts_left)
        yield panels[start:end]
        start = end


def kind_of(peer: str) -> str:
    return VARIANT if peer.startswith("ours") else BOUND if peer.startswith("bound") else PEER


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw_caption(figure: Figure, kinds: set[str]) -> None:
    """Draws the caption, and a legend of ours and the given kinds of peers."""
    left, height = MARGIN / FIGURE_WIDTH, figure.get_figheight()
    figure.text(left, 1 - MARGIN / height, CAPTION, fontsize=FONT_SIZE, va="top")
    patches = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in (OURS, *kinds)]
    figure.legend(
        handles=patches, ncols=len(patches), loc="upper left", bbox_to_anchor=(left, 1 - 0.3 / height),
        fontsize=FONT_SIZE, frameon=False, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def draw_row(figure: Figure, row: Row, top: float) -> None:
    """Draws a row whose upper edge is `top` inches above the lower edge of the figure."""
    height, left, width = figure.get_figheight(), row.left, row.panel_width
    bottom = top - row.height
    heading_place = MARGIN / FIGURE_WIDTH, (top - row.gap_above) / height
    figure.text(*heading_place, row.heading, fontsize=HEADING_SIZE, fontweight="bold", va="top")
    for panel, title in zip(row.panels, row.titles, strict=True):
        axes = figure.add_axes((left / FIGURE_WIDTH, bottom / height, width / FIGURE_WIDTH, row.bars_height / height))
        draw_bars(axes, panel, width, BAR_HEIGHT / row.bar_pitch)
        axes.annotate(title, (0, 1), (0, 4), "axes fraction", "offset points", va="bottom", fontsize=FONT_SIZE)
        axes.set_yticks(range(len(row.names)), row.names if left == row.left else [])
        left += width + PANEL_GAP


def draw_bars(axes: Axes, panel: Panel, width: float, thickness: float) -> None:
    """Draws the bars of a panel that is `width` inches wide. `thickness` is the part of the pitch that a bar fills."""
    ours, unit = panel.results[0].ours, panel.results[0].unit
    values = [ours, *(result.theirs for result in panel.results)]
    labels = [f"{rounded(ours)} {unit}"]
    labels += [f"{rounded(result.theirs)} {unit} ({rounded(result.ratio)}x)" for result in panel.results]
    colors = [COLORS[OURS], *(COLORS[kind_of(peer)] for peer in panel.peers)]
    # The edge keeps a bar visible whose value is next to nothing in its panel.
    bars = axes.barh(range(len(values)), values, thickness, color=colors, edgecolor=colors)
    for text in axes.bar_label(bars, labels, padding=3, fontsize=FONT_SIZE):
        text.set_verticalalignment("center_baseline")  # as the names at the left
    label_width = max(map(text_width, labels)) + 0.1
    axes.set_xlim(0, max(values) * width / (width - label_width))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=FONT_SIZE)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def rounded(value: float) -> str:
    """Returns the value with two decimals, fewer from 10 on, so that at least three digits remain."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def text_width(text: str, size: float = FONT_SIZE, weight: str = "normal") -> float:
    """Returns the width in inches that one line of text takes at most."""
    outline = TextPath((0, 0), text, size=size, prop=FontProperties(weight=weight))
    return HINTING * outline.get_extents().width / POINTS_PER_INCH


def wrapped_name(name: str) -> str:
    return textwrap.fill(name, MOST_CHARACTERS_PER_NAME_LINE)


def wrapped_title(job: str, width: float) -> str:
    """Returns the title in lines of at most `width` inches, broken after a comma or a colon."""
    no_break_space = "\u00a0"
    parts = job.replace(" ", no_break_space).replace(f",{no_break_space}", ", ").replace(f":{no_break_space}", ": ")
    return textwrap.fill(parts, max(10, int(len(job) * width / text_width(job))))


def line_count(text: str) -> int:
    return text.count("\n") + 1
