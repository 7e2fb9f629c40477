"""How much to prune, if anything: by entries or by moments (spectral_pruning.py), and what a retry changes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetuning.contract.recipe import AnchorSettings, AntidoteSettings, OptimiserSettings
from finetuning.contract.report import Metrics, PrunedLayer, PruneTrial, Pruning
from finetuning.defences.antidote import Pruned, Scores, contrast_scores, input_squares, prune, published_scores
from finetuning.job.measure import Measuring, read_targets
from finetuning.model.adapted import AdaptedBase
from finetuning.model.lora import Adapter
from finetuning.model.lora_coordinates import canonical
from finetuning.rows.chat_format import EncodedRow
from finetuning.safety_rows.roles import Pair, SafetyRows
from finetuning.stages.spectral_pruning import SpectralPruning, choose_mu, measure_moments

# An alpha is accepted if it keeps what the aligned base has; the slack lets one of 48 rows differ.
_REFUSAL_SLACK = 0.03
_LEAK_SLACK = 0.03
_MIN_NLL_RATIO = 0.5
# The task is kept if its loss has not doubled and at most this share of its rows is unlearnt: a number copied wrong
# hardly moves the mean loss.
_MAX_TASK_RISE = (2.0, 0.02)
_MOST_UNLEARNT = 0.03
# Looks at the gate that pruning harder may take before the job trains again.
_MOST_HARDER = 2


@dataclass(frozen=True)
class PruneChoice:
    """The chosen pruning (alpha and mu 0: not pruned) and every trial that led to it.

    `spectral` can prune the same adapter at another mu; absent where entries were pruned, or nothing was tried.
    """

    alpha: float
    pruned: Pruned
    trials: tuple[PruneTrial, ...]
    mu: float = 0.0
    spectral: SpectralPruning | None = None

    @property
    def outcome(self) -> Pruning:
        """In the words of every report: an alpha that took no entry pruned nothing."""
        return "pruned" if self.mu or self.pruned.pruned else "not pruned"

    @property
    def layers(self) -> tuple[PrunedLayer, ...]:
        """What spectral pruning removed, by decoder layer."""
        return self.spectral.layers(self.pruned.adapter) if self.spectral is not None and self.mu else ()

    @property
    def sentence(self) -> str:
        """What was done, for a person."""
        if self.mu:
            left = max(layer.harmful_left for layer in self.layers)
            return f"Pruned at mu {self.mu:g}: at most {left:.0%} of what a layer did on harmful inputs is left"
        if self.spectral is not None:
            return "Not pruned (mu 0): every mu that was tried costs the kept rows something"
        if self.pruned.pruned:
            return f"Pruned {self.pruned.pruned} of the adapter's {self.pruned.total} entries (alpha {self.alpha:g})"
        if self.alpha:
            return f"Not pruned: alpha {self.alpha:g} took no entry of the adapter"
        if self.trials and not any(trial.accepted for trial in self.trials):
            return "Not pruned (alpha 0): no alpha was accepted, and the adapter goes to the gate as it is"
        return "Not pruned (alpha 0): the adapter keeps what the aligned base has without it"

    def at(self, mu: float) -> "PruneChoice":
        """The same adapter pruned at another mu. Raises ValueError where it was pruned by entries."""
        if self.spectral is None:
            raise ValueError("this adapter was not pruned by its moments")
        return replace(self, mu=mu, pruned=_unpruned(self.spectral.at(mu)))

    def harder(self, settings: AntidoteSettings) -> tuple[float, ...]:
        """The mus above the chosen one that a gate which refuses the result may ask for, in rising order."""
        if self.spectral is None or settings.rule == "last":
            return ()
        return tuple(mu for mu in settings.mus if mu > self.mu)[:_MOST_HARDER]


@dataclass(frozen=True)
class _Sample:
    """Rows that a trial is judged on: calibration hazards, the stock refusals, and some of the customer's kept rows."""

    harmful: Sequence[Pair]
    refusals: Sequence[str]
    kept: Sequence[EncodedRow]


def choose_pruning(
    measuring: Measuring, operator_rows: SafetyRows, settings: AntidoteSettings, kept: Sequence[EncodedRow], *,
    anchored: bool = False,
) -> PruneChoice:  # fmt: skip
    """How much to prune by the settings' score, which may be nothing; leaves the chosen adapter in place.

    `anchored`: refused rows trained beside the kept ones.
    """
    if settings.score != "spectral" or not settings.enabled or not kept:
        return choose_alpha(measuring, operator_rows, settings, kept)
    model = measuring.model
    found = measure_moments(model, operator_rows, kept, anchored=anchored)
    mu, adapter, trials = choose_mu(model, found, settings, kept)
    model.write(adapter)
    return PruneChoice(0.0, _unpruned(adapter), trials, mu=mu, spectral=found)


def choose_alpha(
    measuring: Measuring, operator_rows: SafetyRows, settings: AntidoteSettings, kept: Sequence[EncodedRow]
) -> PruneChoice:
    """The smallest alpha, 0 (not pruned) included, that keeps the aligned base's refusals and the task; 0 if none does.

    With rule `last`, the last alpha, as published. Always prunes the unpruned adapter. Leaves the chosen adapter in
    place. A result that no alpha can repair is left to the gate, which rejects it.
    """
    model = measuring.model
    unpruned = model.read()
    if not settings.enabled:
        return PruneChoice(0.0, _unpruned(unpruned), ())
    if settings.gauge == "canonical":
        unpruned = canonical(unpruned)
    most = settings.calibration_rows
    sample = _Sample(operator_rows.calibration_harmful[:most], operator_rows.refusals, kept[:most])
    with model.aligned():
        reference = _on_calibration(measuring, sample)
    start = _on_kept(model, sample)
    scores: Scores | None = None
    trials: list[PruneTrial] = []
    for alpha in settings.alphas:
        if alpha > 0 and scores is None:
            model.write(unpruned)
            scores = _scores(model, settings, unpruned, sample)
        pruned = _pruned(unpruned, scores, alpha, settings)
        model.write(pruned.adapter)
        trials.append(_trial(measuring, alpha, pruned, sample, reference=reference, start=start))
        if _ends_the_search(trials[-1], settings):
            return PruneChoice(alpha, pruned, tuple(trials))
    model.write(unpruned)
    return PruneChoice(0.0, _unpruned(unpruned), tuple(trials))


def _ends_the_search(trial: PruneTrial, settings: AntidoteSettings) -> bool:
    """`measured` takes the first alpha that is accepted; `last` tries all and takes the last, whatever it does."""
    match settings.rule:
        case "measured":
            return trial.accepted
        case "last":
            return trial.alpha == settings.alphas[-1]


def _unpruned(found: Adapter) -> Pruned:
    masks = {path: (f.a.new_zeros(f.a.shape).bool(), f.b.new_zeros(f.b.shape).bool()) for path, f in found.items()}
    return Pruned(found, masks, 0, sum(f.a.numel() + f.b.numel() for f in found.values()))


def _pruned(unpruned: Adapter, scores: Scores | None, alpha: float, settings: AntidoteSettings) -> Pruned:
    """One trial; without scores (no alpha above 0 came by yet) nothing is pruned."""
    if scores is None:
        return _unpruned(unpruned)
    above = 0.0 if settings.score == "contrast" else -math.inf  # never what the task needs at least as much
    return prune(unpruned, scores, alpha, unit=settings.unit, rounding=settings.rounding, above=above)


def _scores(model: AdaptedBase, settings: AntidoteSettings, found: Adapter, sample: _Sample) -> Scores:
    base, cache, trained = model.base, model.cache, model.trained
    on_harmful = input_squares(base, cache, trained, model.encode_operator(sample.harmful))
    if settings.score == "published":
        return published_scores(found, on_harmful)
    return contrast_scores(found, on_harmful, input_squares(base, cache, trained, sample.kept))


def _on_calibration(measuring: Measuring, sample: _Sample) -> Metrics:
    found = measuring.metrics(sample.harmful, (), refusals=sample.refusals, losses=False)
    return found.model_copy(update={"harmful_nll": measuring.pair_nll(sample.harmful)})


def _on_kept(model: AdaptedBase, sample: _Sample) -> tuple[float, float]:
    """Of the customer's rows: mean nll, and the share whose answers the model knows by heart."""
    nll, known = read_targets(model.base, model.cache, sample.kept)
    return _mean(nll), _mean(known)


def _trial(
    measuring: Measuring, alpha: float, pruned: Pruned, sample: _Sample, *, reference: Metrics,
    start: tuple[float, float],
) -> PruneTrial:  # fmt: skip
    """What one alpha does, against the aligned base's figures and the kept rows' before any pruning."""
    found = _on_calibration(measuring, sample)
    kept_nll, kept_known = _on_kept(measuring.model, sample)
    refusal, leak, nll = (_value(m) for m in (found.refusal_rate, found.leak, found.harmful_nll))
    ratio, slack = _MAX_TASK_RISE
    accepted = (
        refusal >= _value(reference.refusal_rate) - _REFUSAL_SLACK
        and leak <= _value(reference.leak) + _LEAK_SLACK
        and nll >= _MIN_NLL_RATIO * _value(reference.harmful_nll)
        and kept_nll <= ratio * start[0] + slack
        and kept_known >= start[1] - _MOST_UNLEARNT
    )
    return PruneTrial(
        alpha=alpha, pruned=pruned.pruned, total=pruned.total, refusal_rate=refusal, leak=leak, harmful_nll=nll,
        kept_rows_nll=kept_nll, kept_rows_known=kept_known, accepted=accepted,
    )  # fmt: skip


def _value(measured: object) -> float:
    return float(getattr(measured, "value", float("nan")))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def stronger(
    anchor: AnchorSettings, optimiser: OptimiserSettings, attempt: int
) -> tuple[AnchorSettings, OptimiserSettings]:
    """The retry ladder: from the second attempt on, twice the mixing, a threefold and longer KL, half the rate."""
    if attempt == 1:
        return anchor, optimiser
    more = anchor.model_copy(
        update={
            "mix_share": min(0.5, max(0.1, anchor.mix_share * 2)),
            "kl_weight": max(1.0, anchor.kl_weight * 3),
            "kl_tokens": max(anchor.kl_tokens, 6),
        }
    )
    return more, optimiser.model_copy(update={"learning_rate": optimiser.learning_rate / 2})
