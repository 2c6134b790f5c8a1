"""The live page over HTTP: to this machine alone, and in a browser that sees a round arrive."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn
from synthetic_run import manifest, metrics_rows

from fedmix.errors import RunError
from fedmix.report import serving
from fedmix.report.files import write_json

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    write_json(folder / "manifest.json", manifest("running"))
    write_rounds(folder, 3)
    return folder


def write_rounds(folder: Path, num_rounds: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows(num_rounds)))


def answer(run_dir: Path, path: str, *, method: str = "GET", host: str = "127.0.0.1:8100", **headers: str) -> httpx.Response:
    """What the page's server, on port 8100, says to one request."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=serving.LiveApp(run_dir, 8100))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8100") as client:
            return await client.request(method, path, headers={"host": host, **headers})

    return asyncio.run(ask())


def test_page_its_changes_and_its_script_are_all_there_is(run_dir: Path) -> None:
    page, now, script = (answer(run_dir, path) for path in ("/", "/now", "/live.js"))
    assert [found.status_code for found in (page, now, script)] == [200, 200, 200]
    assert now.text in page.text
    assert "Round <b>3</b>" in now.text
    assert set(re.findall(r"(?:src|href)=\"([^\"]*)\"", page.text)) == {"live.js"}
    assert not re.search(r"https?:|@import|url\(", page.text + script.text)
    for path in ("/metrics.jsonl", "/../manifest.json", "/config.yaml"):
        assert answer(run_dir, path).status_code == 404


def test_every_answer_forbids_foreign_and_inline_code_and_being_kept(run_dir: Path) -> None:
    for path in ("/", "/now", "/nowhere"):
        headers = answer(run_dir, path).headers
        assert "default-src 'none'; script-src 'self';" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_what_has_not_changed_is_not_sent_again(run_dir: Path) -> None:
    first = answer(run_dir, "/now")
    again = answer(run_dir, "/now", **{"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.text) == (304, "")
    write_rounds(run_dir, 4)
    assert "Round <b>4</b>" in answer(run_dir, "/now", **{"If-None-Match": first.headers["etag"]}).text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:8101", "evil.example:8100", ""])
def test_a_page_that_claims_to_live_here_learns_nothing(run_dir: Path, host: str) -> None:
    found = answer(run_dir, "/now", host=host)
    assert found.status_code == 421
    assert "Round" not in found.text


def test_it_can_only_be_read(run_dir: Path) -> None:
    assert {answer(run_dir, "/now", method=method).status_code for method in ("POST", "PUT", "DELETE")} == {405}
    assert answer(run_dir, "/", method="HEAD").text == ""


def test_it_listens_on_the_loopback_address_and_says_when_a_port_is_taken() -> None:
    with serving._listening(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(RunError, match=rf"cannot listen on port {port} of 127.0.0.1: .*; choose another with --port"):
            serving._listening(port)


class Arriving(serving.LiveApp):
    """Writes the fourth round once the page's script has asked for the first time."""

    run_dir: Path
    asked = 0

    async def __call__(self, scope: serving.Scope, receive: serving.Receive, send: serving.Send) -> None:
        await super().__call__(scope, receive, send)
        if scope["path"] == "/now":
            self.asked += 1
            if self.asked == 1:
                write_rounds(self.run_dir, 4)


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to see the page with")
def test_a_round_arrives_in_the_page_of_a_browser(run_dir: Path, tmp_path: Path) -> None:
    with serving._listening(0) as listener:
        app = Arriving(run_dir, listener.getsockname()[1])
        app.run_dir = run_dir
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            assert "Round <b>3</b>" in httpx.get(address).text
            options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}")
            command = [str(CHROMIUM), *options, "--virtual-time-budget=5000", "--dump-dom", address]
            seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        finally:
            server.should_exit = True
            thread.join()
    assert app.asked >= 2
    assert "Round <b>4</b>" in seen
    assert '<p class="lost" id="lost" role="status"></p>' in seen


@pytest.mark.e2e
def test_the_command_tells_its_address_and_ends_well_with_ctrl_c(run_dir: Path) -> None:
    command = [sys.executable, "-c", "from fedmix.cli import main; main()", "report", str(run_dir), "--serve"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.match(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found is not None
        assert httpx.get(found[0] + "now").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
