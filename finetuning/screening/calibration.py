"""What the screen must know of a model before it reads a customer's rows: two limits, from the operator's own rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetuning.job.readings import RefusalReader, threshold, whole_refusal_limit
from finetuning.safety_rows.roles import Pair, SafetyRows, refusals_for, same_answer


@dataclass(frozen=True)
class Calibration:
    """`threshold`: the refusal mass (a probability) from which a row is excluded. `whole_refusal_nll`: the worst token
    loss (nats) up to which a whole target counts as a refusal."""

    threshold: float
    whole_refusal_nll: float


def calibrate(reader: RefusalReader, operator_rows: SafetyRows) -> Calibration:
    """Both limits under the active adapters, from the calibration rows."""
    refused = refusals_for(operator_rows.calibration_harmful, "calibration", operator_rows.refusals)
    harmful = reader.read(reader.model.encode_operator(refused))
    benign = reader.read(reader.model.encode_operator(_answered(operator_rows.calibration_benign)))
    return Calibration(threshold(harmful.mass, benign.mass), whole_refusal_limit(harmful.worst))


def mass_threshold(reader: RefusalReader, operator_rows: SafetyRows) -> float:
    """The threshold alone, under the active adapters: the scout's own, by the same rule on the same prompts."""
    harmful, benign = (
        reader.read(reader.model.encode_operator(same_answer(pairs, "Yes."))).mass
        for pairs in (operator_rows.calibration_harmful, operator_rows.calibration_benign)
    )
    return threshold(harmful, benign)


def _answered(pairs: Sequence[Pair]) -> list[Pair]:
    """The mass is read before the answer; pairs without one get a word to stand there."""
    return [Pair(pair.prompt, pair.answer or "Yes.") for pair in pairs]
