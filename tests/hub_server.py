"""A small server that speaks the Hugging Face hub's download protocol, on the loopback interface."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = re.compile(r"/resolve/main/|/stored/")


@dataclass
class Hub:
    """What the server holds, ``{"owner/name": {"file": bytes}}``, and what it was asked.

    ``budget`` is how many more bytes of files it sends before it only breaks connections, ``piece`` how many it sends
    over one connection, ``ranges`` whether it heeds ``Range``, ``storage`` whether files lie on a server of their own,
    to which the hub redirects.
    """

    files: dict[str, dict[str, bytes]]
    budget: int | None = None
    piece: int | None = None
    ranges: bool = True
    storage: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def gets(self) -> list[str | None]:
        """The ``Range`` header of every GET of a file."""
        return [span for method, path, span in self.requests if method == "GET" and FILES.search(path)]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server on a free port while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            span = self.headers.get("Range")
            hub.requests.append((self.command, self.path, span))
            repository, _, file = FILES.sub("\n", self.path.lstrip("/").partition("?")[0]).partition("\n")
            if repository not in hub.files or file not in hub.files[repository]:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if repository in hub.files else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.files[repository][file]
            if hub.storage and "/resolve/" in self.path:
                self.send_response(302)
                self.send_header(
                    "Location", f"http://localhost:{server.server_port}/{repository}/stored/{file}?signed=1"
                )
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            span = span if hub.ranges else None
            start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if with_body:
                limit = min(value for value in (len(content), hub.budget, hub.piece) if value is not None)
                body = content[start : start + limit]
                self.wfile.write(body)
                if hub.budget is not None:
                    hub.budget -= len(body)
                self.close_connection = start + len(body) < len(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
