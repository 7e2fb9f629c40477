"""Which prompts of the operator's rows stand in more than one role."""

from dataclasses import fields

from finetuning.safety_rows.roles import SafetyRows


def prompts_overlap(rows: SafetyRows) -> set[str]:
    """Prompts that stand in more than one role; must be empty (invariant M45)."""
    seen: set[str] = set()
    twice: set[str] = set()
    for field in fields(SafetyRows):
        if field.name not in ("refusals", "judge"):
            prompts = {pair.prompt for pair in getattr(rows, field.name)}
            twice |= seen & prompts
            seen |= prompts
    return twice
