"""Where the command line begins: so little that Ctrl-C finds an answer while everything else is still being imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # what a shell reports for Ctrl-C
STOPPED = "fedmix: stopped; a run goes on with --resume"


@contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the process at once: some libraries catch it while they are imported, and break in odd ways later."""
    before = signal.signal(signal.SIGINT, lambda number, frame: _leave())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave() -> None:
    os.write(sys.stderr.fileno(), f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line (fedmix/cli.py)."""
    with importing():
        from fedmix.cli import main as run
    run()


if __name__ == "__main__":
    main()
