"""What a job measured and decided: safety report, row verdicts, parity certificate. All rates are shares in 0..1."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

Column = Literal["public", "before", "tuned", "after"]
Pruning = Literal["pruned", "not pruned"]


class _ReportPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_ReportPart):
    """A value, its two-sided 95 % interval, and how many rows it rests on."""

    value: float
    ci95: tuple[float, float]
    n: int = Field(ge=0)


class Metrics(_ReportPart):
    """One model measured on one split; a metric that was not measured is absent (None).

    The two `..._by_category` hold the rates of those rows that say their category, by its name; `harm_by_guard` counts
    harmful answers by the category that the guard named, where it names any. `own_answers_nll`: how likely the model
    finds the public base's own answers to benign gate prompts, in nats a token.
    """

    harmful_score: Measure | None = None
    refusal_rate: Measure | None = None
    leak: Measure | None = None
    harmful_nll: Measure | None = None
    alignment_loss: Measure | None = None
    drift: Measure | None = None
    over_refusal: Measure | None = None
    incoherent: Measure | None = None
    task_score: Measure | None = None
    kept_loss: Measure | None = None
    harmful_score_by_category: dict[str, Measure] = Field(default_factory=dict)
    over_refusal_by_category: dict[str, Measure] = Field(default_factory=dict)
    harm_by_guard: dict[str, int] = Field(default_factory=dict)
    own_answers_nll: Measure | None = None


class GateCheck(_ReportPart):
    """One comparison: the measured end that was used, against the threshold."""

    metric: str
    used: float
    op: Literal["<=", ">="]
    threshold: float
    ok: bool


class GateDecision(_ReportPart):
    """`pass` or `fail`, with every check and the reasons in words."""

    decision: Literal["pass", "fail", "disabled"]
    checks: tuple[GateCheck, ...] = ()
    reasons: tuple[str, ...] = ()
    attempts: int = 1


def _pruning_of_report(fields: dict[str, Any]) -> Pruning | None:
    alpha = fields.get("alpha")
    return None if alpha is None else "pruned" if alpha > 0 or (fields.get("mu") or 0) > 0 else "not pruned"


class PruneTrial(_ReportPart):
    """One alpha or mu that was tried (both 0: not pruned): what it pruned and what it did.

    `refusal_rate`, `leak` and `harmful_nll` are of the calibration rows, and absent where only the kept rows chose.
    """

    alpha: float = 0.0
    mu: float = 0.0
    pruned: int = 0
    total: int = 0
    refusal_rate: float | None = None
    leak: float | None = None
    harmful_nll: float | None = None
    kept_rows_nll: float
    kept_rows_known: float = Field(default=0.0, description="share of kept rows whose every target token comes first")
    kept_changed: float | None = Field(default=None, description="share of the adapter's energy on them that changed")
    accepted: bool


class PrunedLayer(_ReportPart):
    """Of one decoder layer: share of the adapter's output energy that pruning left on harmful inputs, and the share of
    it that changed on inputs of kept rows."""

    layer: int
    harmful_left: float
    kept_changed: float


class HeldOut(_ReportPart):
    """The test split, opened once after the decision: known wordings and new ones, per model column."""

    items: dict[str, Metrics] = Field(default_factory=dict)
    wordings: dict[str, Metrics] = Field(default_factory=dict)


class SafetyReport(_ReportPart):
    """The job's whole account of its safety. `metrics` columns: public, before (aligned), tuned, after (served).

    `plain_kept_loss` is the kept_loss of a short plain fine-tune, which the gate compares with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True)

    schema_version: int = Field(default=1, ge=1)
    recipe: str
    judge: str
    # Reports of earlier releases call it probe_sha256.
    safety_rows_sha256: str = Field(validation_alias=AliasChoices("safety_rows_sha256", "probe_sha256"))
    metrics: dict[str, Metrics] = Field(default_factory=dict)
    held_out: HeldOut | None = None
    prune: tuple[PruneTrial, ...] = ()
    alpha: float | None = Field(default=None, description="the pruned share of a row's entries; 0: no entry")
    mu: float | None = Field(default=None, description="the strength of spectral pruning; 0: not pruned by it")
    pruned_layers: tuple[PrunedLayer, ...] = Field(default=(), description="what spectral pruning removed")
    # Absent from reports of earlier releases; alpha, which was all they had, says it.
    pruning: Pruning | None = Field(default_factory=_pruning_of_report)
    plain_kept_loss: Measure | None = None
    gate: GateDecision
    seconds: dict[str, float] = Field(default_factory=dict)


def _by_its_name_now(code: object) -> object:
    """Earlier releases called the screen's own reason by Antibody's name, whatever weighed the rows."""
    return "screen_low_weight" if code == "antibody_low_weight" else code


ReasonCode = Literal[
    "screen_low_weight", "harmful_probe_match", "unreadable", "user_weight_zero", "truncated", "duplicate"
]


class RowReason(_ReportPart):
    """Why a row was not simply kept. `screen_low_weight`: the screen's reading of the prompt against its limit."""

    # a later release's word is shown as it stands
    code: Annotated[ReasonCode | str, BeforeValidator(_by_its_name_now)]
    score: float | None = None
    threshold: float | None = None


class RowVerdict(_ReportPart):
    """The ledger's entry for one row of the uploaded file; `line` is 1-based in that file.

    `weight` is the screen's. `scores` holds `antibody` only where Antibody's score was computed.
    """

    line: int
    row_sha256: str
    verdict: Literal["kept", "downweighted", "excluded"] | str
    weight: float
    reasons: tuple[RowReason, ...] = ()
    scores: dict[str, float] = Field(default_factory=dict)
    tokens: int
    trained_tokens: int
    truncated: bool = False


class ParityCertificate(_ReportPart):
    """The downloadable adapter against the measured model, from a fresh process: logits, and a part of the gate again.

    `gate_harmful` of `gate_prompts` gate prompts are answered with harm by the artifact, `gate_harmful_measured` by the
    model that the gate saw.
    """

    schema_version: int = Field(default=1, ge=1)
    form: str
    prompts: int
    positions: int
    dtype: str
    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    top1_agreement: float
    tolerance: float
    vs_base_max_abs_diff: float
    versions: dict[str, str]
    adapter_sha256: str
    base_sha256: str
    template_sha256: str
    gate_prompts: int = 0
    gate_harmful: int = 0
    gate_harmful_measured: int = 0
    passed: bool

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words, why it did not pass; nothing where it did."""
        found = []
        if self.max_abs_logit_diff > self.tolerance:
            off = f"{self.max_abs_logit_diff:.2e} from the measured model's; {self.tolerance:.0e} is allowed"
            found.append(f"the adapter's logits differ by up to {off}")
        if self.vs_base_max_abs_diff <= self.tolerance:
            found.append("the adapter changes nothing: the base answers as it does")
        if not self.gate_prompts:
            found.append("the adapter was asked no gate prompt")
        if self.gate_harmful > self.gate_harmful_measured:
            asked = f"of {self.gate_prompts} gate prompts"
            found.append(
                f"the adapter answers {self.gate_harmful} {asked}, the measured model {self.gate_harmful_measured}"
            )
        return tuple(found)


def share(hits: int, n: int) -> Measure:
    """A share with its Wilson 95 % interval; n = 0 gives (0, 1)."""
    if n == 0:
        return Measure(value=0.0, ci95=(0.0, 1.0), n=0)
    low, high = wilson(hits, n, z=1.959963984540054)
    return Measure(value=hits / n, ci95=(low, high), n=n)


def shares(categories: Sequence[str], hits: Sequence[bool]) -> dict[str, Measure]:
    """The share of hits in each category, by name; rows without one count in none."""
    found = sorted(set(categories) - {""})
    own = {name: [hit for of, hit in zip(categories, hits, strict=True) if of == name] for name in found}
    return {name: share(sum(each), len(each)) for name, each in own.items()}


def wilson(hits: int, n: int, *, z: float) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, 1927), clipped to 0..1."""
    p, z2 = hits / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: list[float]) -> Measure:
    """A mean with its normal 95 % interval; no values give 0 with n = 0."""
    n = len(values)
    if n == 0:
        return Measure(value=0.0, ci95=(0.0, 0.0), n=0)
    centre = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / max(1, n - 1) / n) * 1.959963984540054
    return Measure(value=centre, ci95=(centre - spread, centre + spread), n=n)
