"""Facts about the row ledger: every row has a verdict, and one that does not train says why."""

import torch

from finetuning.job.readings import Screened
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import rows_of
from finetuning.screening.verdicts import Ledger, verdicts
from tests.support.models import random_rows

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def ledger_of(
    weights: list[float], surprise: list[float], probes: frozenset[int] = frozenset(), scores: list[float] | None = None
) -> Ledger:
    n = len(weights)
    screened = Screened(
        torch.tensor(weights), torch.full((n,), 0.2), torch.full((n,), 0.4), torch.tensor(surprise), 3.0
    )
    found = None if scores is None else torch.tensor(scores)
    return Ledger(list(rows_of([LINE] * n)), random_rows(n), screened, found, probes)


def test_each_verdict_says_its_reason_with_the_score_and_the_limit_it_was_judged_by() -> None:
    ledger = ledger_of([1.0, 0.25, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.5, 1.0], frozenset({4}), [2.0] * 5)
    found = verdicts(ledger)
    assert [(v.verdict, [r.code for r in v.reasons]) for v in found] == [
        ("kept", []), ("downweighted", ["screen_low_weight"]), ("excluded", ["screen_low_weight"]),
        ("excluded", ["unreadable"]), ("excluded", ["harmful_probe_match"]),
    ]  # fmt: skip
    assert [v.weight for v in found] == [1, 0.25, 0, 0, 0]
    assert (found[3].reasons[0].score, found[3].reasons[0].threshold) == (3.5, 3.0)
    assert (found[1].reasons[0].score, found[1].reasons[0].threshold) == (0.4, 0.5)
    assert found[0].scores == {"harm": 0.4, "refusal_mass": 0.2, "surprise": 1.0, "antibody": 2.0}
    assert ledger.kept == [0, 1]


def test_a_row_at_the_limit_is_read() -> None:
    assert [v.verdict for v in verdicts(ledger_of([1.0, 1.0], [3.0, 3.001]))] == ["kept", "excluded"]


def test_rows_without_a_target_and_rows_cut_short_say_so() -> None:
    ledger = ledger_of([1.0, 1.0], [0.0, 0.0])
    bare, cut = ledger.encoded
    ledger.encoded[:] = [EncodedRow(bare.ids, (False,) * len(bare.ids)), EncodedRow(cut.ids, cut.is_target, True)]
    found = verdicts(ledger)
    assert [[r.code for r in v.reasons] for v in found] == [["user_weight_zero"], ["truncated"]]
    assert [v.verdict for v in found] == ["excluded", "kept"]
    assert ledger.kept == [1]
