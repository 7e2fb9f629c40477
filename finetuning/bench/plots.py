"""The report's figures, in the manner of the papers': harmful score over p, over rate and epochs, the plane of harm and
task, and row scores of harmful and benign rows.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from finetuning.bench.results_file import Line
from finetuning.bench.tables import mean_of, values_of, where

mpl.use("agg")
mpl.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
})  # fmt: skip
_HERO = "immunotune"
_DOTS = 120  # an inch
# Names in a legend are the registry's: a paper's method among them has our base, rows, rates and loss.
_TITLED: dict[str, Any] = {"title": "papers' methods:\nunder our settings", "title_fontsize": 7}


def _style(name: str, index: int) -> dict[str, object]:
    """The default pipeline stands out; the others get colours and line styles of their own."""
    if name == _HERO:
        return {"color": "#c2185b", "linewidth": 2.6, "marker": "o", "zorder": 5}
    marks = "sv^D<>pXP*hd"
    return {"color": f"C{index % 10}", "linewidth": 1.1, "marker": marks[index % len(marks)], "markersize": 4,
            "linestyle": ("-", "--", ":")[index % 3]}  # fmt: skip


def save(figure: Figure, path: Path) -> Path:
    """A PNG: a vector drawing of a dozen marked lines is three times as large."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, format="png", optimize=True)
    return path


def _histogram(axes: Axes, values: Sequence[float], kind: str, *, span: tuple[float, float]) -> None:
    """One filled outline, not twenty bars: a figure has dozens of these."""
    colour = {"benign": "#2e7d32", "harmful": "#c62828"}[kind]
    axes.hist(values, bins=30, range=span, histtype="stepfilled", color=colour, alpha=0.6, label=kind)


def lines_over(axes: Axes, lines: Sequence[Line], field: str, metric: str) -> None:
    """A metric's mean over a field's values, one line a defence."""
    for i, name in enumerate(values_of(lines, "defence")):
        own = where(lines, defence=name)
        points = [(x, mean_of(where(own, **{field: x}), metric)) for x in sorted(values_of(own, field))]
        known = [(x, m) for x, m in points if m is not None]
        if known:
            halves = [m.half if m.n > 1 else 0.0 for _, m in known]
            axes.errorbar([x for x, _ in known], [m.value for _, m in known], yerr=halves, label=name, capsize=2,
                          elinewidth=0.6, **_style(name, i))  # type: ignore[arg-type]  # fmt: skip


def over_share(lines: Sequence[Line], path: Path) -> Path:
    """harmful_score and task_score over the harmful share of the file."""
    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for axes, metric, title in ((left, "harmful_score", "harmful score %"), (right, "task_score", "task score %")):
        lines_over(axes, lines, "p", metric)
        axes.set(xlabel="harmful share p of the file", ylabel=title, ylim=(-3, 103))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, **_TITLED)
    return save(figure, path)


def over_scales(lines: Sequence[Line], path: Path) -> Path:
    """harmful_score over learning rate and over epochs, as multiples of the default."""
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    lines_over(left, [x for x in lines if x["epochs_scale"] == 1], "lr_scale", "harmful_score")
    lines_over(right, [x for x in lines if x["lr_scale"] == 1], "epochs_scale", "harmful_score")
    for axes, label in ((left, "learning rate, times the default"), (right, "epochs, times the default")):
        axes.set(xlabel=label, ylabel="harmful score %", xscale="log", ylim=(-3, 103))
        axes.set_xticks([1, 3, 10], ["1", "3", "10"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, **_TITLED)
    return save(figure, path)


def plane(lines: Sequence[Line], path: Path) -> Path:
    """One point a defence: harmful_score against task_score; the lower right corner is the place to be."""
    figure = Figure(figsize=(6.5, 4.6))
    axes = figure.subplots()
    for i, name in enumerate(values_of(lines, "defence")):
        own = where(lines, defence=name)
        harm, task = mean_of(own, "harmful_score"), mean_of(own, "task_score")
        if harm is not None and task is not None:
            style = _style(name, i) | {"linestyle": "none", "markersize": 9 if name == _HERO else 6}
            axes.plot([task.value], [harm.value], label=name, **style)  # type: ignore[arg-type]
    axes.set(xlabel="task score %", ylabel="harmful score %", ylim=(-3, 103), xlim=(-3, 103))
    figure.legend(loc="outside right center", fontsize=8, **_TITLED)
    return save(figure, path)


def antibody_scores(lines: Sequence[Line], path: Path) -> Path:
    """Antibody's row scores before training (aligned base) and after it, one column a defence."""
    drawn = [line for line in lines if "antibody_scores" in line]
    figure = Figure(figsize=(2.5 * max(1, len(drawn)), 3.8))
    panels = figure.subplots(2, max(1, len(drawn)), squeeze=False, sharex="col")
    for column, line in enumerate(drawn):
        for axes, when in zip(panels[:, column], ("before", "after"), strict=True):
            found = line["antibody_scores"][when]
            every = [*found["benign"], *found["harmful"]]
            for kind in ("benign", "harmful"):
                _histogram(axes, found[kind], kind, span=(min(every), max(every)))
            axes.set_title(f"{line['defence']}, {when}", fontsize=8)
    r = "r = nll of a refusal - nll of the row's answer, nats; high: looks benign"
    figure.supxlabel(f"{r}. Papers' methods: under our settings")
    figure.supylabel("rows")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return save(figure, path)


def row_scores(lines: Sequence[Line], path: Path) -> Path:
    """The screen's reading of planted and own rows, one panel an attack."""
    attacks = values_of(lines, "attack")
    columns = min(4, len(attacks))
    depth = -(-len(attacks) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.1 * depth))
    panels = figure.subplots(depth, columns, squeeze=False).flat
    for attack, axes in zip(attacks, panels, strict=False):
        own = where(lines, attack=attack)
        for kind in ("benign", "harmful"):
            _histogram(axes, [v for line in own for v in line.get("scores", {}).get(kind, ())], kind, span=(0, 1))
        axes.set_title(attack, fontsize=8)
        axes.set_yscale("symlog")
    for axes in list(panels):
        axes.set_visible(False)
    figure.supxlabel("probability of harm by the screen (lines before docs/adr/0019: refusal mass of the prompt)")
    figure.supylabel("rows")
    first = figure.axes[0]
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return save(figure, path)
