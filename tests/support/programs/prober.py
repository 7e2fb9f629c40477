"""Asks an API whether it lives, again and again on one connection, and prints when each answer came and how late.

Arguments: host and port. A line for each answer: its monotonic time and what it took, both in seconds. Ends with stdin.
"""

import select
import socket
import sys
import time

PAUSE_SECONDS = 0.005


def ask(connection: socket.socket) -> None:
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    reply = b""
    while not reply.endswith(b"}"):
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionError("the API closed the connection")
        reply += piece
    if b" 200 " not in reply.partition(b"\r\n")[0]:
        raise ConnectionError(reply.decode())


if __name__ == "__main__":
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as open_connection:
        while not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
            started = time.monotonic()
            ask(open_connection)
            sys.stdout.write(f"{time.monotonic()} {time.monotonic() - started}\n")
            sys.stdout.flush()
