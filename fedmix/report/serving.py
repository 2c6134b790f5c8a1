"""Serves a run's live page to this machine: on the loopback address, with three addresses and nothing from elsewhere.

A page of another site that a browser is made to believe lies at this address (DNS rebinding) asks under its own name, so
requests for any other host than this one are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

from fedmix.errors import RunError
from fedmix.report.live import LivePage
from fedmix.report.pages import environment

LOOPBACK = "127.0.0.1"
POLICY = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
POLICY += "form-action 'none'; frame-ancestors 'none'"
ALWAYS = {
    "cache-control": "no-store",
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class LiveApp:
    """The page at ``/``, what changes of it at ``/now``, and the script that asks for it."""

    def __init__(self, run_dir: Path, port: int) -> None:
        """Raises RunError if the folder holds no run."""
        self._page = LivePage(run_dir)
        self._hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI 3)."""
        asked = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, kind, text = self._answer(scope["method"], scope["path"], asked.get("host", ""))
        body = text.encode("utf-8", errors="replace")
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        if status == 200 and asked.get("if-none-match") == tag:
            status, body = 304, b""
        told = ALWAYS | {"content-type": f"{kind}; charset=utf-8", "etag": tag}
        headers = [(name.encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, method: str, path: str, host: str) -> tuple[int, str, str]:
        """Status, kind of content and text."""
        if host not in self._hosts:
            return 421, "text/plain", "ask for this page at the address that fedmix printed\n"
        if method not in ("GET", "HEAD"):
            return 405, "text/plain", "this page can only be read\n"
        if path == "/":
            return 200, "text/html", self._page.whole()
        if path == "/now":
            return 200, "text/html", self._page.now()
        if path == "/live.js":
            return 200, "text/javascript", environment().get_template("live.js").render()
        return 404, "text/plain", "there is no such page\n"


def serve(run_dir: Path, port: int, *, on_start: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; ``on_start`` is told the address. Port 0 is any free one.

    Raises RunError if the folder holds no run or the port is taken.
    """
    with _listening(port) as listener:
        port = listener.getsockname()[1]
        app = LiveApp(run_dir, port)
        on_start(f"http://{LOOPBACK}:{port}/")
        options = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, server_header=False, ws="none")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(options).run([listener])


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise RunError(f"cannot listen on port {port} of {LOOPBACK}: {error.strerror}; choose another with --port") from None
