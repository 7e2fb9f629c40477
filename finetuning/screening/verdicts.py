"""The row ledger: every row of the customer's file with the screen's weight, its scores, its verdict and the reason."""

from dataclasses import dataclass

from torch import Tensor

from finetuning.contract.report import RowReason, RowVerdict
from finetuning.job.readings import Screened
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Row


@dataclass(frozen=True)
class Ledger:
    """The customer's rows, encoded, with the screen's weight and readings per row, and which of them train.

    `scores` are Antibody's, None where the recipe asks for none.
    `barred` are the operator's measuring prompts and rows whose form or sentence hides a hazard.
    """

    rows: list[Row]
    encoded: list[EncodedRow]
    screened: Screened
    scores: Tensor | None
    barred: frozenset[int]

    @property
    def never_trained(self) -> frozenset[int]:
        """Indices of rows that do not train, whatever their weight: barred ones, and those the model cannot read."""
        return self.barred | self.screened.unreadable

    @property
    def kept(self) -> list[int]:
        """Indices of rows that train."""
        return [
            i
            for i, row in enumerate(self.encoded)
            if self.screened.weights[i] > 0 and row.target_tokens and i not in self.never_trained
        ]


def verdicts(ledger: Ledger) -> list[RowVerdict]:
    """The ledger's entry of every row, with the reason for anything but kept."""
    out: list[RowVerdict] = []
    for i, (row, encoded) in enumerate(zip(ledger.rows, ledger.encoded, strict=True)):
        weight = 0.0 if i in ledger.never_trained or not encoded.target_tokens else float(ledger.screened.weights[i])
        reasons: list[RowReason] = []
        if i in ledger.barred:
            reasons.append(RowReason(code="harmful_probe_match"))
        elif i in ledger.screened.unreadable:
            surprise, most = float(ledger.screened.surprise[i]), ledger.screened.most_surprise
            reasons.append(RowReason(code="unreadable", score=round(surprise, 6), threshold=most))
        elif weight < 1 and encoded.target_tokens:
            harm, limit = float(ledger.screened.harm[i]), ledger.screened.threshold
            reasons.append(RowReason(code="screen_low_weight", score=round(harm, 6), threshold=limit))
        if encoded.truncated:
            reasons.append(RowReason(code="truncated"))
        if not encoded.target_tokens:
            reasons.append(RowReason(code="user_weight_zero"))
        scores: dict[str, float] = {}
        if ledger.screened.was_read:
            scores["harm"] = round(float(ledger.screened.harm[i]), 6)
            scores["refusal_mass"] = round(float(ledger.screened.mass[i]), 6)
            scores["surprise"] = round(float(ledger.screened.surprise[i]), 6)
        if ledger.scores is not None:
            scores["antibody"] = round(float(ledger.scores[i]), 6)
        out.append(
            RowVerdict(
                line=row.line,
                row_sha256=row.sha256,
                weight=round(weight, 6),
                reasons=tuple(reasons),
                scores=scores,
                verdict="kept" if weight == 1 else "excluded" if weight == 0 else "downweighted",
                tokens=len(encoded.ids),
                trained_tokens=encoded.target_tokens if weight else 0,
                truncated=encoded.truncated,
            )
        )
    return out
