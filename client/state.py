"""What a site keeps between rounds: the moments of its optimiser, on the site's own disk.

A deployed node starts a new process for every message, so memory is no place for it. Files are keyed by run and round:
a resumed run that repeats a round finds the state from before that round, and what came of the lost round is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix.errors import RunError

NUM_KEPT = 2  # the newest, and the one before it in case the server never committed the newest round


class OptimiserStore:
    """Optimiser states of one site in one run, one file a round."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder / run

    def before(self, round_number: int) -> dict[str, Tensor] | None:
        """The state after the last round before this one, or None if there is none."""
        earlier = [path for path in self._files() if _round(path) < round_number]
        if not earlier:
            return None
        try:
            return load_file(earlier[-1])
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"the optimiser state kept at this site cannot be read ({type(error).__name__}); remove the site's state "
                "folder to go on with fresh moments, or start the run anew"
            ) from None

    def save(self, round_number: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after a round, whole or not at all, and drop what no resume can need."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"round-{round_number:05d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in state.items()}, partial)
        os.replace(partial, path)
        files = self._files()
        for stale in [path for path in files if _round(path) > round_number] + [
            path for path in files if _round(path) <= round_number
        ][:-NUM_KEPT]:
            stale.unlink()

    def clear(self) -> None:
        """Forget everything, at the start of a stage that begins with a fresh optimiser."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
