"""An OpenAI-compatible server that stands in for a judge elsewhere: well, broken in each way, or killed."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_BODIES = {
    "no json": b"<html>down for maintenance</html>",
    "no text": json.dumps({"choices": [{"message": {"content": None}}]}).encode(),
    "no choice": b'{"choices": []}',
    "deep": b"[" * 200_000,
    "endless": b"x" * (2**20 + 1),
}


@dataclass
class JudgeServer:
    """`says` makes the text about (prompt, answer). After `good_for` replies `trouble` stands in its place, by name."""

    says: Callable[[str, str], str]
    trouble: str = ""
    good_for: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _end: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
            self.asked.append({**body, "path": handler.path})
            self.keys.append(handler.headers.get("Authorization"))
            self._reply(handler, body)
        finally:
            with self._lock:
                self._now -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        text = self.says(body["messages"][0]["content"], body["messages"][-1]["content"])
        good = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        match self.trouble if len(self.asked) > self.good_for else "":
            case "":
                self._end.wait(0.01)  # long enough for others to ask meanwhile
                send(handler, 200, good)
            case "hang":
                self._end.wait(30)
            case "drip":  # a byte now and then: no single read takes long
                handler.send_response(200)
                handler.end_headers()
                while not self._end.wait(0.05):
                    handler.wfile.write(b" ")
                    handler.wfile.flush()
            case "cut":
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(good)))
                handler.end_headers()
                handler.wfile.write(good[:9])
            case trouble if trouble in _BODIES:
                send(handler, 200, _BODIES[trouble])
            case status:
                send(handler, int(status), b"{}")


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def judge_server(says: Callable[[str, str], str], *, port: int = 0) -> Iterator[JudgeServer]:
    """One on a port of this host until the end of the block."""
    state = JudgeServer(says)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked may have given up
                state.answer(self)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state._end.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def guard_text(url: str, *, variable: str = "", timeout_seconds: float = 5.0, more: str = "") -> str:
    """A guard file that asks this server, with Llama Guard's patterns."""
    return f"""
licence = "none"
{more}
[url]
base = "{url}"
model = "guard"
key_variable = "{variable}"
timeout_seconds = {timeout_seconds}
tries = 2
connections = 3
max_characters = 400
[patterns]
unsafe = '^unsafe'
safe = '^safe'
category = '^(S\\d+)'
[[examples]]
prompt = "?"
answer = "!"
output = "unsafe\\nS9"
verdict = "unsafe"
category = "S9"
[[examples]]
prompt = "?"
answer = "."
output = "safe"
verdict = "safe"
"""
