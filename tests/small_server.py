"""Web servers of this process, for tests: they answer at once, and end at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Answers", "serving"]


class Answers(BaseHTTPRequestHandler):
    """Answers requests by its ``do_GET`` and so on, and logs nothing."""

    # a head and a body are sent one after the other: the body would wait 40 ms until the client says that the head has come
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Serve on 127.0.0.1 while the block runs; by itself Python's server takes half a second to notice its end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
