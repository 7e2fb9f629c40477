"""Facts about the checks of a row: every code, on well-formed and hostile input.

The last part mixes the rows of the tables at random: nothing ever raises, and what passes can be read back.
"""

import gzip
import io
import json
import random
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.rows.scanner import rows_of
from tests.support.row_files import ANSWER, CALL, COMPLETION, DPO, GOOD, USER, answer, chat, codes, scan


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    return buffer.getvalue()


FILE_FAULTS: list[tuple[str, bytes, str]] = [
    ("zero bytes", b"", "empty_file"),
    ("only blank lines", b"\n \r\n\t\n", "empty_file"),
    ("only a byte order mark", b"\xef\xbb\xbf", "empty_file"),
    ("gzip", gzip.compress(GOOD), "compressed_file"),
    ("zip", zipped(), "compressed_file"),
    ("parquet", b"PAR1" + bytes(40), "compressed_file"),
    ("zstandard", b"(\xb5/\xfd" + bytes(40), "compressed_file"),
    ("UTF-16 with a mark", GOOD.decode().encode("utf-16"), "invalid_encoding"),
    ("UTF-16 LE", GOOD.decode().encode("utf-16-le"), "invalid_encoding"),
    ("UTF-16 BE", GOOD.decode().encode("utf-16-be"), "invalid_encoding"),
    ("UTF-32 LE", GOOD.decode().encode("utf-32-le"), "invalid_encoding"),
    ("UTF-32 BE", GOOD.decode().encode("utf-32-be"), "invalid_encoding"),
    ("Latin-1", '{"prompt":"é"}'.encode("latin-1"), "invalid_encoding"),
    ("overlong slash", GOOD.replace(b"ask", b"\xc0\xaf"), "invalid_encoding"),
    ("cut character at the end", GOOD + b"\n\xe2\x82", "invalid_encoding"),
    ("array on one line", b"[" + GOOD + b"," + GOOD + b"]", "json_array_not_jsonl"),
    ("array over lines", b"\xef\xbb\xbf\n[\n" + GOOD + b",\n" + GOOD + b"\n]\n", "json_array_not_jsonl"),
    ("array begun on a line", b'[{"messages":\n[]}]', "json_array_not_jsonl"),
    ("array of 3 MB", b"[" + b",".join([GOOD] * 40_000) + b"]", "json_array_not_jsonl"),
]

ROW_FAULTS: list[tuple[str, bytes, str, str]] = [
    ("second byte order mark", b"\xef\xbb\xbf" + GOOD, "invalid_json", ""),
    ("lone CR as a break", GOOD + b"\r" + GOOD, "invalid_json", ""),
    ("raw half of a pair", GOOD.replace(b"ask", b"\xed\xa0\x80"), "lone_surrogate", ""),
    ("escaped half of a pair", GOOD.replace(b"ask", rb"\udc00"), "lone_surrogate", "/messages/0/content"),
    ("half of a pair in a key", rb'{"\ud800":1}', "lone_surrogate", "/\ufffd"),
    ("raw NUL", GOOD.replace(b"ask", b"a\x00k"), "nul_character", ""),
    ("escaped NUL", GOOD.replace(b"answer", rb"\u0000"), "nul_character", "/messages/1/content"),
    ("line over 2 MiB", b'{"messages":"' + b"a" * 2**21 + b'"}', "line_too_long", ""),
    ("100000 brackets", b"[" * 100_000, "nesting_too_deep", ""),
    ("33 levels", b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "nesting_too_deep", ""),
    (
        "duplicate key",
        GOOD.replace(b'"role":"user"', b'"role":"user","role":"user"'),
        "duplicate_key",
        "/messages/0/role",
    ),
    ("duplicate key by escape", rb'{"a":1,"\u0061":2}', "duplicate_key", "/a"),
    ("NaN", b'{"messages":NaN}', "non_finite_number", "/messages"),
    ("minus infinity", b'{"messages":[-Infinity]}', "non_finite_number", "/messages/0"),
    ("1e999", b'{"metadata":{"x":1e999}}', "non_finite_number", "/metadata/x"),
    ("5000 digits", b'{"metadata":' + b"9" * 5000 + b"}", "number_out_of_range", "/metadata"),
    ("2^53 + 1", b'{"metadata":[9007199254740993]}', "number_out_of_range", "/metadata/0"),
    ("trailing comma", GOOD[:-1] + b",}", "invalid_json", ""),
    ("two objects", GOOD + GOOD, "invalid_json", ""),
    ("comment", b"// " + GOOD, "invalid_json", ""),
    ("single quotes", b"{'messages':[]}", "invalid_json", ""),
    ("cut object", GOOD[:-2], "invalid_json", ""),
    ("string", b'"text"', "not_an_object", ""),
    ("empty array", b"[]", "not_an_object", ""),
    ("null", b"null", "not_an_object", ""),
    ("array row", b"[" + GOOD + b"]", "not_an_object", ""),
    ("no messages", b'{"metadata":{}}', "missing_messages", ""),
    ("messages an object", b'{"messages":{}}', "messages_not_array", "/messages"),
    ("one message", chat(ANSWER), "too_few_messages", "/messages"),
    ("no assistant", chat({"role": "system", "content": "s"}, USER), "too_few_messages", "/messages"),
    ("514 messages", chat(*[USER, ANSWER] * 257), "too_many_messages", "/messages"),
    ("message a string", chat(USER, "x"), "invalid_content", "/messages/1"),
    ("critic", chat(USER, {"role": "critic", "content": "a"}), "invalid_role", "/messages/1/role"),
    ("function role", chat(USER, {"role": "function", "content": "a"}), "invalid_role", "/messages/1/role"),
    ("no role", chat({"content": "a"}, ANSWER), "invalid_role", "/messages/0/role"),
    ("role 7", chat({"role": 7, "content": "a"}, ANSWER), "invalid_role", "/messages/0/role"),
    ("role a list", chat({"role": [], "content": "a"}, ANSWER), "invalid_role", "/messages/0/role"),
    ("function_call", chat(USER, answer(function_call={})), "unknown_field", "/messages/1/function_call"),
    ("prompt beside messages", chat(USER, ANSWER, prompt="x"), "unknown_field", "/prompt"),
    ("refusal with text", chat(USER, answer(refusal="no")), "unknown_field", "/messages/1/refusal"),
    (
        "image part",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
        "unsupported_content_part",
        "/messages/0/content/0",
    ),
    (
        "audio part",
        chat({"role": "user", "content": [{"type": "input_audio"}]}, ANSWER),
        "unsupported_content_part",
        "/messages/0/content/0",
    ),
    (
        "part without type",
        chat({"role": "user", "content": [{"text": "a"}]}, ANSWER),
        "invalid_content",
        "/messages/0/content/0",
    ),
    ("content a number", chat({"role": "user", "content": 7}, ANSWER), "invalid_content", "/messages/0/content"),
    ("user content null", chat({"role": "user", "content": None}, ANSWER), "invalid_content", "/messages/0/content"),
    ("empty user", chat({"role": "user", "content": ""}, ANSWER), "empty_content", "/messages/0/content"),
    ("no parts", chat({"role": "user", "content": []}, ANSWER), "empty_content", "/messages/0/content"),
    ("empty assistant", chat(USER, answer("")), "empty_assistant", "/messages/1/content"),
    ("blank assistant", chat(USER, answer(" \n")), "empty_assistant", "/messages/1/content"),
    ("assistant null", chat(USER, answer(None)), "empty_assistant", "/messages/1/content"),
    ("weight 0.5", chat(USER, answer(weight=0.5)), "invalid_weight", "/messages/1/weight"),
    ("weight true", chat(USER, answer(weight=True)), "invalid_weight", "/messages/1/weight"),
    ("weight a string", chat(USER, answer(weight="1")), "invalid_weight", "/messages/1/weight"),
    ("weight -1", chat(USER, answer(weight=-1)), "invalid_weight", "/messages/1/weight"),
    ("weight 1.0", chat(USER, answer(weight=1.0)), "invalid_weight", "/messages/1/weight"),
    ("weight on a user", chat({**USER, "weight": 1}, ANSWER), "invalid_weight", "/messages/0/weight"),
    ("all weights 0", chat(USER, answer(weight=0)), "no_trainable_message", "/messages"),
    (
        "system in the middle",
        chat(USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER),
        "invalid_role_order",
        "/messages/2/role",
    ),
    ("two users", chat(USER, USER, ANSWER), "invalid_role_order", "/messages/1/role"),
    ("ends on a user", chat(USER, ANSWER, USER), "invalid_role_order", "/messages/2/role"),
    ("assistant first", chat(ANSWER, USER, ANSWER), "invalid_role_order", "/messages/0/role"),
    (
        "tool out of place",
        chat(USER, {"role": "tool", "content": "1", "tool_call_id": "c1"}, ANSWER),
        "invalid_role_order",
        "/messages/1/role",
    ),
    (
        "arguments an object",
        chat(USER, answer(None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}])),
        "invalid_tool_call",
        "/messages/1/tool_calls",
    ),
    (
        "id unmatched",
        chat(USER, answer(None, tool_calls=[CALL]), {"role": "tool", "content": "1", "tool_call_id": "c2"}, ANSWER),
        "invalid_tool_call",
        "/messages/2/tool_call_id",
    ),
    ("tools a string", chat(USER, ANSWER, tools="f"), "invalid_tool_call", "/tools"),
    ("completion empty", b'{"prompt":"a","completion":""}', "empty_content", "/completion"),
    ("completion missing", b'{"prompt":"a"}', "invalid_content", "/completion"),
    ("preference field missing", b'{"input":{"messages":[{"role":"user","content":"a"}]}}', "dpo_missing_field", ""),
    (
        "two preferred outputs",
        json.dumps({**DPO, "preferred_output": [ANSWER, ANSWER]}).encode(),
        "dpo_bad_output",
        "/preferred_output",
    ),
    (
        "identical outputs",
        json.dumps({**DPO, "non_preferred_output": [ANSWER]}).encode(),
        "dpo_identical_outputs",
        "/non_preferred_output",
    ),
    (
        "input ends with assistant",
        json.dumps({**DPO, "input": {"messages": [USER, ANSWER]}}).encode(),
        "dpo_input_ends_with_assistant",
        "/input/messages/1/role",
    ),
]

WARNED: list[tuple[str, bytes, str]] = [
    ("blank line", b" ", "blank_line"),
    ("name", chat({**USER, "name": "Ann"}, ANSWER), "ignored_field"),
    ("refusal null", chat(USER, answer(refusal=None)), "ignored_field"),
    ("control token", chat({"role": "user", "content": "<|im_start|>system"}, ANSWER), "special_token_text"),
    ("control token escaped", chat(USER, answer("a </s> b")).replace(b"<", rb"\u003c"), "special_token_text"),
    ("the same row", GOOD, "duplicate_row"),
]

ACCEPTED: list[tuple[str, bytes]] = [
    ("byte order mark at the start", b"\xef\xbb\xbf" + GOOD),
    ("CRLF", GOOD + b"\r\n"),
    ("trailing spaces", GOOD + b" \t "),
    ("line separators in text", GOOD.replace(b"ask", "a\u2028b\u2029c\u0085d".encode())),
    ("escaped pair", GOOD.replace(b"ask", rb"\ud83d\ude00")),
    ("a backslash before u0000", GOOD.replace(b"ask", rb"\\u0000")),
    ("32 levels", chat(USER, ANSWER, metadata=json.loads("[" * 31 + "]" * 31))),
    ("brackets in text", chat(USER, answer("[{" * 500))),
    ("integers at the limits", chat(USER, ANSWER, metadata=[2**53, -(2**53), 0])),
    ("developer", chat({"role": "developer", "content": "s"}, USER, ANSWER)),
    ("text parts", chat({"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER)),
    ("weights", chat(USER, answer(weight=0), USER, answer(weight=1))),
    ("512 messages", chat(*[USER, ANSWER] * 256)),
    (
        "tools",
        chat(USER, answer(None, tool_calls=[CALL]), {"role": "tool", "content": "1", "tool_call_id": "c1"}, ANSWER),
    ),
    ("line of exactly 2 MiB", chat(USER, answer("a" * (2**21 - len(chat(USER, answer(""))))))),
    ("completion", COMPLETION),
    ("preference pair", json.dumps(DPO).encode()),
]


@pytest.mark.parametrize(("data", "code"), [f[1:] for f in FILE_FAULTS], ids=[f[0] for f in FILE_FAULTS])
def test_a_file_that_is_no_jsonl_is_refused_as_a_whole(data: bytes, code: str) -> None:
    report = scan(data)
    assert report.file_code == code
    assert codes(report)[0] == code
    assert report.message == report.errors[0].message
    assert not report.is_valid


@pytest.mark.parametrize(("row", "code", "path"), [f[1:] for f in ROW_FAULTS], ids=[f[0] for f in ROW_FAULTS])
def test_a_bad_row_is_named_and_the_next_rows_are_still_checked(row: bytes, code: str, path: str) -> None:
    report = scan(GOOD + b"\n" + row + b"\n" + GOOD + b"\nnull")
    found = [(error.line, error.path) for error in report.errors if error.code == code]
    assert (2, path) in found
    assert (report.errors[-1].line, report.errors[-1].code) == (4, "not_an_object")
    assert all(error.line in (2, 4) and error.column >= 1 for error in report.errors)
    assert (report.rows, report.invalid_rows, report.file_code) == (4, 2, None)
    assert report.message.startswith("2 invalid rows. First: line 2: ")


@pytest.mark.parametrize(("row", "code"), [f[1:] for f in WARNED], ids=[f[0] for f in WARNED])
def test_a_warning_leaves_the_file_valid(row: bytes, code: str) -> None:
    report = scan(GOOD + b"\n" + row + b"\n")
    assert report.is_valid
    assert [(warning.line, warning.code) for warning in report.warnings] == [(2, code)]


@pytest.mark.parametrize("row", [row for _, row in ACCEPTED], ids=[name for name, _ in ACCEPTED])
def test_an_unusual_but_legal_row_passes(row: bytes) -> None:
    report = scan(row)
    assert codes(report) == []
    assert report.warnings_total == 0
    assert report.rows == 1


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
spoken = text.filter(lambda value: not value.isspace())
turn = st.tuples(spoken, spoken)


@st.composite
def good_rows(draw: st.DrawFn) -> bytes:
    messages: list[dict[str, object]] = []
    if draw(st.booleans()):
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(spoken)})
    for ask, reply in draw(st.lists(turn, min_size=1, max_size=4)):
        content = draw(st.sampled_from([ask, [{"type": "text", "text": ask}]]))
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    if draw(st.booleans()):
        messages[-1]["weight"] = 1
    return json.dumps({"messages": messages}, ensure_ascii=draw(st.booleans())).encode()


broken_rows = st.sampled_from(
    [row for _, row, _, _ in ROW_FAULTS if len(row) < 1000] + [row for _, row in ACCEPTED[:9]]
)
whole_files = st.sampled_from([data for _, data, _ in FILE_FAULTS if len(data) < 1000])
line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n"])


@st.composite
def any_files(draw: st.DrawFn) -> bytes:
    rows = draw(st.lists(st.one_of(good_rows(), broken_rows, st.binary(max_size=40)), max_size=6))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf", b" \n"])) + draw(line_ends).join(rows)


@given(data=st.one_of(any_files(), whole_files), seed=st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_the_report_does_not_depend_on_how_the_bytes_were_cut(data: bytes, seed: int) -> None:
    cuts = [random.Random(seed).randrange(len(data) + 1) for _ in range(8)]
    whole = scan(data)
    assert scan(data, *cuts) == whole
    assert scan(data, *range(1, len(data))) == whole


@given(rows=st.lists(good_rows(), min_size=1, max_size=8), end=line_ends)
@settings(max_examples=40, deadline=None)
def test_valid_rows_always_pass_and_read_back(rows: list[bytes], end: bytes) -> None:
    data = end.join(rows)
    report = scan(data)
    assert report.is_valid, report.message
    assert report.rows == len(rows) == len(list(rows_of(io.BytesIO(data))))


@given(data=st.binary(max_size=400))
@settings(max_examples=80, deadline=None)
def test_no_bytes_ever_raise(data: bytes) -> None:
    report = scan(data)
    json.dumps(report.to_json()).encode()
    assert len(report.message) <= 512


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "type", "text", "weight", "tool_calls", "id", "function", "tools"]
            )
            | st.sampled_from(["prompt", "completion", "input", "preferred_output", "tool_call_id", "name", "refusal"]),
            inner | st.sampled_from(["user", "assistant", "system", "tool", "text", "function"]),
            max_size=5,
        )
    ),
    max_leaves=30,
)


@given(row=jsons)
@settings(max_examples=150, deadline=None)
def test_no_json_ever_raises_and_what_passes_can_be_read(row: object) -> None:
    line = json.dumps(row).encode()
    report = scan(line)
    if report.is_valid and report.format != "dpo":
        assert len(list(rows_of([line]))) == report.rows
