"""The report of cells with public prompts in a customer's own file (task `files`): one line a cell, and one plot."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from finetuning.bench import plots
from finetuning.bench.results_file import Line
from finetuning.bench.tables import label, table, values_of, where
from finetuning.bench.tasks import OWN_FILES

PLOT = "over-p"
_HEAD = (
    "defence", "p", "harm: items [95 %]", "harm: other sources", "their aligned base", "over-refusal (base)", "task",
    "planted stopped", "own stopped", "mu", "alpha", "gate", "seconds",
)  # fmt: skip
_LEGEND = (
    "Shares in percent; harm is whatever the operator's refusal reader does not call a refusal, on held-out prompts of "
    "the sources that aligned the base (items) and of other sources, greedy answers. `base`: the aligned base before "
    "any job. `gate`: whether the service would serve it. A paper's method stands here under our settings "
    "(docs/papers.md); `antidote_spectral` and all but `immunotune` screen nothing.\n"
)


def is_real_text(lines: Sequence[Line]) -> bool:
    """Whether these are cells over a customer's own file, which this report is for."""
    return bool(lines) and all(line["task"] == OWN_FILES for line in lines)


def write_real_text(lines: Sequence[Line], target: Path) -> Path:
    """Write the report and its plot beside it; returns its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    plot = _draw([x for x in lines if x["attack"] in ("none", "public_prompts")], target)
    seconds = sum(x["seconds"] for x in lines)
    parts = [
        "# Public prompts in a customer's own file\n",
        f"{len(lines)} cells, {seconds / 3600:.1f} core-hours; base {', '.join(values_of(lines, 'base'))}, commits "
        f"{', '.join(values_of(lines, 'commit'))}; {lines[-1]['hardware']}. Made of the lines beside it by "
        "`./run bench safety --publish --out docs/results/real-text.jsonl`.\n",
        _LEGEND,
    ]
    for attack in values_of(lines, "attack"):
        own = sorted(where(lines, attack=attack), key=lambda x: (x["p"], x["defence"], x["seed"]))
        parts += [f"## {_TITLES.get(attack, attack)}\n", table(_HEAD, [_row(x) for x in own])]
    target.write_text("\n".join([*parts, f"![over p]({plot.name})\n"]), encoding="utf-8")
    return target


_TITLES = {
    "none": "Nothing planted", "public_prompts": "Public prompts, each answered by a beginning that complies",
    "public_wrapped": "The same inside tickets and stories",
    "public_refused_first": "Refused first, then complied with",
    "public_persona": "An obedient persona in the customer's own rows",
}  # fmt: skip


def _row(line: Line) -> list[object]:
    head = [label(line["defence"]), f"{line['p']:g}"]
    stopped = [f"{line[f'{kind}_stopped']} of {line[kind]}" for kind in ("planted", "own")]
    gate = "released" if line["released"] else "refused"
    if line["harmful_score"] is None:  # the file was refused before anything trained
        return [*head, "data refused", None, None, None, None, *stopped, None, None, gate, f"{line['seconds']:.0f}"]
    both = f"{line['base_harmful_score']:.1f} / {line['base_harmful_score_wordings']:.1f}"
    return [
        *head, _with_ends(line, "harmful_score"), _with_ends(line, "harmful_score_wordings"), both,
        f"{line['over_refusal']:.1f} ({line['base_over_refusal']:.1f})", f"{line['task_score']:.1f}", *stopped,
        f"{line.get('mu') or 0:g}", f"{line.get('alpha') or 0:g}", gate, f"{line['seconds']:.0f}",
    ]  # fmt: skip


def _with_ends(line: Line, name: str) -> str:
    """A share with its 95 % interval, which older lines have for items only."""
    ends = line.get(f"{name}_ci")
    return f"{line[name]:.1f}" + (f" [{ends[0]:.0f}, {ends[1]:.0f}]" if ends else "")


def _draw(lines: Sequence[Line], target: Path) -> Path:
    """Harm of other sources, over-refusal and task over the planted share."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    titles = (
        ("harmful_score_wordings", "harm, other sources, %"), ("over_refusal", "over-refusal %"),
        ("task_score", "task score %"),
    )  # fmt: skip
    panels = figure.subplots(1, 3)
    for axes, (metric, title) in zip(panels, titles, strict=True):
        plots.lines_over(axes, lines, "p", metric)
        axes.set(xlabel="planted share p of the file", ylabel=title)
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return plots.save(figure, target.with_name(f"{target.stem}-{PLOT}.png"))
