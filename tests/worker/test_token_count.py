"""Facts about counting tokens, on a real small tokenizer."""

import json
from pathlib import Path

from finetuning.rows.scanner import rows_of
from tests.support.base_folder import make_base
from worker.token_count import count_tokens, lines_of
from worker.tokenizer import BaseTokenizer


def test_lines_come_whole_from_any_pieces() -> None:
    data = b"a\n\nbcd\r\ne"
    for size in range(1, 12):
        assert list(lines_of(data[i : i + size] for i in range(0, len(data), size))) == [b"a", b"", b"bcd\r", b"e"]


def test_a_template_that_refuses_a_role_is_the_rows_error(tmp_path: Path) -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    base = BaseTokenizer(make_base(tmp_path / "strict", template=strict))
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    data = [json.dumps({"messages": [*first, *turns]}).encode() for first in ([], [{"role": "system", "content": "s"}])]
    count = count_tokens(base, rows_of(data), max_tokens=64)
    assert [(error.line, error.code) for error in count.errors] == [(2, "invalid_role")]
