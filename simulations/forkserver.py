"""The process that workers are forked from.

Kept apart from the engine because it must be light: the fork server imports torch and Flower while this process still
does the same, so the first worker starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import forkserver, get_context

from fedmix.deployment.environment import FLOWER_ENVIRONMENT


def quiet_flower() -> None:
    """Set what Flower and Ray read when they are imported, here and in every process started from here."""
    os.environ.update({key: value for key, value in FLOWER_ENVIRONMENT.items() if key not in os.environ})


def start() -> None:
    """Start the fork server, unless it runs; its imports go on in the background."""
    quiet_flower()
    # The command line as well: a forked worker imports the main module anew.
    get_context("forkserver").set_forkserver_preload(["simulations.engine", "fedmix.cli"])
    # Ctrl-C goes to every process of the terminal; the fork server would answer with a traceback from its imports.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        forkserver.ensure_running()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
