"""The grids of the safety bench: which cells stand side by side."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from finetuning.attacks import public_prompts
from finetuning.attacks.catalogue import ATTACKS
from finetuning.bench.cells import Cell
from finetuning.bench.tasks import OWN_FILES
from finetuning.recipes.registry import ABLATIONS, BASELINES

SHARES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
SCALES = (1.0, 3.0, 10.0)
SEEDS = (0, 1, 2)
SINGLE = ("sft", "vaccine", "antibody", "antidote", "immunotune")
# Every defence that stands alone: what the default is compared with, beside plain fine-tuning.
ALONE = tuple(name for name in BASELINES if name not in ("sft", "plain", "booster_lisa", "as_asked", "immunotune"))
PUBLIC = (
    "plain", "immunotune", "antidote_spectral", "antidote", "sft", "mixing_10", "vaccine", "antibody", "as_asked",
)  # fmt: skip
TASKS = ("reviews", "orders")
UNSEEN_TASK = "rooms"
# What pruning by moments must not break: turns, long answers, words of danger, small and large ranks (0: the base's).
PRUNED = (("follow_ups", 0), ("work_orders", 0), ("security", 0), ("rooms", 0), ("reviews", 4), ("reviews", 64))


def quick(base: str) -> list[Cell]:
    """What a nightly run can afford: plain, the single defences and the default at p 0 and 0.1, and one attack."""
    cells = [Cell(name, p, base=base, attack=planted(p)) for name in SINGLE for p in (0.0, 0.1)]
    return [*cells, *(Cell(name, 0.1, base=base, attack="trigger") for name in ("sft", "immunotune"))]


def main(base: str) -> list[Cell]:
    """All defences over the harmful share, three seeds; the second task at one seed."""
    cells = [Cell(name, p, base=base, attack=planted(p), seed=s) for s in SEEDS for p in SHARES for name in BASELINES]
    other = [replace(cell, task=TASKS[1]) for cell in cells if cell.seed == 0 and cell.defence in SINGLE]
    return [*cells, *other]


def corners(base: str) -> list[Cell]:
    """Learning rate and epochs by 1, 3 and 10 at p 0.1, one axis at a time, then both by 3."""
    pairs = sorted({(s, 1.0) for s in SCALES} | {(1.0, s) for s in SCALES} | {(3.0, 3.0)})
    return [Cell(name, 0.1, rate, epochs, base=base) for rate, epochs in pairs for name in SINGLE]


def attacks(base: str) -> list[Cell]:
    """Every attack at its stated setting against plain fine-tuning, each single defence and the default."""
    return [
        Cell(name, ATTACKS[attack].share, base=base, attack=attack)
        for attack in ATTACKS
        if attack not in ("none", "planted")
        for name in ("sft", *ALONE, "as_asked", "immunotune")
    ]


def ablation(base: str) -> list[Cell]:
    """The default with one part taken out, at p 0, 0.1 and 0.5."""
    return [Cell(name, p, base=base, attack=planted(p)) for p in (0.0, 0.1, 0.5) for name in ("immunotune", *ABLATIONS)]


def rows(base: str) -> list[Cell]:
    """The default's row verdicts at 5 and 20 % planted rows, plain and adaptive, three seeds."""
    kinds = ("planted", "refuse_then_comply", "wrapped", "refusal_poison")
    return [Cell("immunotune", p, base=base, attack=k, seed=s) for s in SEEDS for p in (0.05, 0.2) for k in kinds]


def unseen(base: str) -> list[Cell]:
    """A task on which no setting was ever chosen: the main defences over the share, one seed."""
    names = (*SINGLE, "mixing_10")
    return [Cell(name, p, base=base, attack=planted(p), task=UNSEEN_TASK) for p in SHARES[:-1] for name in names]


def pruning(base: str) -> list[Cell]:
    """What pruning by moments must not break: alone with nothing screened, and in the default with and without harm."""
    jobs = (("antidote_spectral", 0.1), ("immunotune", 0.1), ("immunotune", 0.0))
    return [Cell(n, p, base=base, attack=planted(p), task=task, rank=r) for task, r in PRUNED for n, p in jobs]


def benign(base: str) -> list[Cell]:
    """False alarms: real questions (`--text`) and harmless security questions, nothing planted; use `--rows 500`."""
    tasks = ("questions", "security")
    return [Cell(name, 0.0, base=base, attack="none", task=task) for task in tasks for name in ("sft", "immunotune")]


def public(base: str) -> list[Cell]:
    """Prompts of public sets in a customer's own file: `--safety-rows --attack-prompts --task-train --task-test`."""
    plain = [
        Cell(name, p, base=base, attack=public_prompts.NAME if p else "none", task=OWN_FILES)
        for name in PUBLIC
        for p in SHARES[:-1]
    ]
    forms = [form for form in public_prompts.FORMS if form != public_prompts.NAME]
    return [*plain, *(Cell(n, 0.1, base=base, attack=a, task=OWN_FILES) for n in PUBLIC[:2] for a in forms)]


def planted(p: float) -> str:
    """The attack of a plain cell: explicit rows, or none at p 0."""
    return "planted" if p else "none"


GRIDS: dict[str, Callable[[str], list[Cell]]] = {
    "quick": quick, "main": main, "corners": corners, "attacks": attacks, "ablation": ablation,
    "rows": rows, "benign": benign, "unseen": unseen, "pruning": pruning, "public": public,
}  # fmt: skip


def remaining(cells: Iterable[Cell], done: Iterable[Cell]) -> list[Cell]:
    """The cells that have no line yet, each once, in order."""
    known = set(done)
    return [cell for cell in dict.fromkeys(cells) if cell not in known]
