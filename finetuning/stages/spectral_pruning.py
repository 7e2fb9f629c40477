"""How hard to prune in the basis of the data: as much as the customer's kept rows do not notice.

The formula stands in defences/antidote_spectral.py. Its harmful rows are the operator's calibration rows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from finetuning.contract.recipe import AntidoteSettings
from finetuning.contract.report import PrunedLayer, PruneTrial
from finetuning.defences.antidote_spectral import Moments, added, by_layer, input_moments, kept_changed, prune
from finetuning.job.measure import read_targets
from finetuning.model.adapted import AdaptedBase
from finetuning.model.lora import Adapter
from finetuning.rows.chat_format import EncodedRow
from finetuning.safety_rows.roles import SafetyRows

_MOMENT_ROWS = 96
_JUDGED_ROWS = 48
# Free is what costs the rows a fiftieth of their loss and three thousandths of a nat a token, no row its answer, and
# leaves what the adapter does on their inputs as it was but for a fiftieth of its energy: rows that are known by heart
# hardly notice what others of their kind lose (ADR 0018).
_MAX_RISE = 1.02
_SLACK = 0.003
# An adapter that trained without anchors has more to lose of what it does on harmful inputs, and may give up more.
_MOST_CHANGED, _MOST_CHANGED_UNANCHORED = 0.02, 0.05
# The rows that lose most do not count: a planted row that the screen let pass is to be unlearnt (seen in the demo).
# Where nothing was anchored, nobody may have screened either: a quarter may be planted.
_OVERLOOKED, _OVERLOOKED_UNANCHORED = 0.05, 0.25
_FEWEST_TO_PART = 32


@dataclass(frozen=True)
class SpectralPruning:
    """A trained adapter with the moments of its inputs, from which it can be pruned at any strength.

    `most_changed`: the share of its energy on kept inputs that may change for nothing; `overlooked`: the share of the
    judged rows, those that lose most, that do not count."""

    trained: Adapter
    kept: Moments
    harmful: Moments
    most_changed: float = _MOST_CHANGED
    overlooked: float = _OVERLOOKED

    def at(self, mu: float) -> Adapter:
        """The adapter pruned at this strength; 0 is the trained one itself."""
        return prune(self.trained, self.kept, self.harmful, mu)

    def layers(self, pruned: Adapter) -> tuple[PrunedLayer, ...]:
        """What that left, by decoder layer."""
        found = by_layer(self.trained, pruned, self.kept, self.harmful)
        return tuple(PrunedLayer(**{k: round(v, 6) for k, v in asdict(share).items()}) for share in found)


def measure_moments(
    model: AdaptedBase, operator_rows: SafetyRows, kept: Sequence[EncodedRow], *, anchored: bool = False
) -> SpectralPruning:
    """Of the adapter as it is now; `kept` are the customer's rows that trained, of which some are read.

    An adapter that trained on refused rows beside them (`anchored`) also keeps what it does on those: where a rank is
    large beside the base, half of a learned refusal is worse than all or none of it (ADR 0018).
    """
    kept_rows, _ = parted(kept)
    harmful = model.encode_operator(operator_rows.calibration_harmful)
    refused = model.encode_operator(operator_rows.aligned[:_MOMENT_ROWS]) if anchored else []

    def moments(rows: Sequence[EncodedRow]) -> Moments:
        return input_moments(model.base, model.cache, model.trained, rows)

    limits = (_MOST_CHANGED, _OVERLOOKED) if anchored else (_MOST_CHANGED_UNANCHORED, _OVERLOOKED_UNANCHORED)
    known = moments(kept_rows)
    held = added(known, moments(refused)) if refused else known
    return SpectralPruning(model.read(), held, moments(harmful), *limits)


def choose_mu(
    model: AdaptedBase, found: SpectralPruning, settings: AntidoteSettings, kept: Sequence[EncodedRow]
) -> tuple[float, Adapter, tuple[PruneTrial, ...]]:
    """The largest of the settings' mus that is free on kept rows, where possible on others than made the moments; 0 if
    none is. With it the adapter pruned so. With rule `last`, the last mu whatever it costs. Leaves the last tried
    adapter in place."""
    _, judged = parted(kept)
    chosen, adapter = 0.0, found.trained
    before: _Read | None = None
    trials: list[PruneTrial] = []
    for mu in (0.0, *settings.mus):
        pruned = found.at(mu)
        model.write(pruned)
        read = read_targets(model.base, model.cache, judged)
        before = before or read
        nll, known = _without_the_worst(before, read, found.overlooked)
        trial = PruneTrial(
            mu=mu, kept_rows_nll=nll, kept_rows_known=known,
            kept_changed=kept_changed(found.trained, pruned, found.kept), accepted=True,
        )  # fmt: skip
        free = _is_free(trial, (trials or [trial])[0], found.most_changed)
        trials.append(trial.model_copy(update={"accepted": free}))
        if not trials[-1].accepted and settings.rule == "measured":
            break
        chosen, adapter = mu, pruned
    return chosen, adapter, tuple(trials)


_Read = tuple[list[float], list[bool]]


def _without_the_worst(before: _Read, after: _Read, overlooked: float) -> tuple[float, float]:
    """Mean loss and share known by heart of all rows, where those that lost most count as they were before."""
    rises = [later - earlier for earlier, later in zip(before[0], after[0], strict=True)]
    most = set(sorted(range(len(rises)), key=lambda i: -rises[i])[: round(overlooked * len(rises))])
    pairs = [(before if i in most else after) for i in range(len(rises))]
    nll = sum(read[0][i] for i, read in enumerate(pairs)) / len(rises)
    return nll, sum(read[1][i] for i, read in enumerate(pairs)) / len(rises)


def _is_free(trial: PruneTrial, unpruned: PruneTrial, most_changed: float) -> bool:
    return (
        trial.kept_rows_nll <= _MAX_RISE * unpruned.kept_rows_nll + _SLACK
        and trial.kept_rows_known >= unpruned.kept_rows_known
        and (trial.kept_changed or 0.0) <= most_changed
    )


def parted(kept: Sequence[EncodedRow]) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows for the moments and rows to judge by, spread over the file; disjoint unless there are fewer than 32."""
    if len(kept) < _FEWEST_TO_PART:
        return list(kept), list(kept)
    return _spread(kept[::2], _MOMENT_ROWS), _spread(kept[1::2], _JUDGED_ROWS)


def _spread(rows: Sequence[EncodedRow], most: int) -> list[EncodedRow]:
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
