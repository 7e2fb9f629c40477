"""Rows of every format, built by hand, and a scan of any bytes in any pieces."""

import json
from itertools import pairwise

from finetuning.rows.scanner import RowReport, RowScanner

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
GOOD = b'{"messages":[{"role":"user","content":"ask"},{"role":"assistant","content":"answer"}]}'
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
COMPLETION = b'{"prompt":"ask","completion":"answer"}'
DPO = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{**ANSWER, "content": "b"}],
}


def scan(data: bytes, *cuts: int, max_rows: int = 200_000) -> RowReport:
    scanner = RowScanner(max_rows=max_rows)
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        scanner.feed(data[start:end])
    return scanner.close()


def codes(report: RowReport) -> list[str]:
    return [error.code for error in report.errors]


def chat(*messages: object, **extra: object) -> bytes:
    return json.dumps({"messages": messages, **extra}).encode()


def answer(content: object = "answer", **extra: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **extra}
