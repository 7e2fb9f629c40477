"""Lines that break: proxies on loopback between a process and a server that is well.

`TcpProxy` carries bytes of any protocol, `StoreProxy` whole requests of an S3 client; each does what its `mode` says.
"""

import http.client
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["well", "503", "507", "slow", "half"]
_CHUNK = 2**16
_SLOW_SECONDS = 0.4
_BROKEN = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
_FULL = b"<Error><Code>InsufficientStorage</Code></Error>"
# headers of one connection, which a proxy does not hand on
_OF_A_HOP = ("connection", "transfer-encoding", "content-length", "host")


class TcpProxy:
    """Carries connections to `target`; `cut`: all are broken off, new ones too; `silent`: open, and nothing passes."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.mode: Literal["well", "cut", "silent"] = "well"
        self.held = 0  # connections that came, or bytes that were kept back, while the line was broken
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def turn(self, mode: Literal["well", "cut", "silent"]) -> None:
        """From now on; what hangs on a line that was silent stays broken when it is well again."""
        broken = mode == "cut" or (mode == "well" and self.mode == "silent")
        self.mode = mode
        if broken:
            self._break_off()

    def close(self) -> None:
        """Break off everything and take no more."""
        self.mode = "cut"
        # a close alone does not wake whoever waits in accept()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break_off()

    def _break_off(self) -> None:
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "cut":
                self.held += 1
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                if self.mode == "silent":
                    self.held += 1
                    continue
                sink.sendall(chunk)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open -= {source, sink}


class StoreProxy:
    """An S3 endpoint in front of another. `half` takes and gives half of each body, then breaks off."""

    def __init__(self, url: str) -> None:
        self._mode: Mode = "well"
        proxy, target = self, urlsplit(url).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _pass_on(self) -> None:
                proxy.pass_on(self, target)

        for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
            setattr(Handler, f"do_{method}", Handler._pass_on)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def turn(self, mode: Mode) -> None:
        """Answer so from now on."""
        self._mode = mode

    def pass_on(self, asked: BaseHTTPRequestHandler, target: str) -> None:
        """Answer one request as the mode says."""
        size = int(asked.headers.get("Content-Length") or 0)
        mode, asked.close_connection = self._mode, True
        if mode == "half" and size:
            asked.rfile.read(size // 2)
            return
        sent = asked.rfile.read(size)
        if mode == "503" or (mode == "507" and asked.command in ("PUT", "POST")):
            _answer(asked, int(mode), {}, _BROKEN if mode == "503" else _FULL)
            return
        if mode == "slow":
            time.sleep(_SLOW_SECONDS)
        onward = http.client.HTTPConnection(target, timeout=60)
        headers = {name: value for name, value in asked.headers.items() if name.lower() not in _OF_A_HOP}
        onward.request(asked.command, asked.path, sent or None, headers | {"Content-Length": str(size)})
        reply = onward.getresponse()
        body = reply.read()
        found = {name: value for name, value in reply.getheaders() if name.lower() not in _OF_A_HOP}
        length = reply.getheader("Content-Length", str(len(body))) if asked.command == "HEAD" else str(len(body))
        onward.close()
        if mode == "half" and body:
            body = body[: len(body) // 2]
        _answer(asked, reply.status, found | {"Content-Length": length}, body)

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()


def _answer(asked: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    asked.send_response_only(status)
    for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
        asked.send_header(name, value)
    asked.end_headers()
    with suppress(OSError):
        if asked.command != "HEAD":
            asked.wfile.write(body)
