"""Web servers of this process, for tests, which answer at once and end at once; and ports for servers of other processes."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Answers", "Server", "free_port", "serving"]


class Answers(BaseHTTPRequestHandler):
    """Answers requests by its ``do_GET`` and so on, and logs nothing."""

    # a head and a body are sent one after the other: the body would wait 40 ms until the client says that the head has come
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1 that takes as many connections at once as a client makes: by itself Python's lets five wait."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Serve on 127.0.0.1 while the block runs; by itself Python's server takes half a second to notice its end."""
    server = Server(handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """Return a port for a server that starts later.

    It is none of those that the system hands out by itself: a connection of another test cannot take it meanwhile.
    """
    draw = random.SystemRandom()  # other workers draw too
    while True:
        port = draw.randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
