"""Facts about orders: read as written, and a fault in one tells nothing of what it holds."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from finetuning.contract.order import ORDER_FILE, TrainOrder, read_order, write_order
from finetuning.recipes.library import align_recipe

SECRET = "ab" * 32


def test_an_order_is_read_as_it_was_written_and_by_its_user_alone(tmp_path: Path) -> None:
    order = TrainOrder(job_id="j", recipe=align_recipe("tiny"), base="tiny", secret=SECRET)
    write_order(tmp_path, order)
    assert read_order(tmp_path) == order
    assert (tmp_path / ORDER_FILE).stat().st_mode & 0o777 == 0o600
    assert SECRET not in repr(order)


def test_a_fault_in_an_order_does_not_tell_its_secret(tmp_path: Path) -> None:
    write_order(tmp_path, TrainOrder(job_id="j", recipe=align_recipe("tiny"), base="tiny", secret=SECRET))
    target = tmp_path / ORDER_FILE
    for broken in (target.read_text().replace('"threads"', '"thread"'), target.read_text()[:-4]):
        target.write_text(broken)
        with pytest.raises(ValidationError) as caught:
            read_order(tmp_path)
        assert SECRET[:8] not in str(caught.value)
