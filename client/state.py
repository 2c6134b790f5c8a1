"""What a site keeps between rounds: the moments of its optimiser, on the site's own disk.

A deployed node starts a new process for every message, so memory is no place for it. Files are keyed by run and round:
a resumed run that repeats a round finds the state from before that round, and what came of the lost round is dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix.errors import RunError

# The server may fall back one checkpoint (server/store.py) while this site has already finished the round after its
# newest: the state from before the older checkpoint's next round must still be here then.
NUM_KEPT = 3


class OptimiserStore:
    """Optimiser states of one site in one run, one file a round."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder / run

    def before(self, round_number: int, *, since: int) -> dict[str, Tensor] | None:
        """The state after the last round in ``since`` .. ``round_number - 1``; None if the site finished none of them.

        ``since`` is the first round of the stage: moments of another stage belong to another optimiser.
        """
        earlier = [path for path in self._files() if since <= _round(path) < round_number]
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
        path = self._folder / f"round-{round_number:05d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in state.items()}, partial)
            os.replace(partial, path)
        except (SafetensorError, OSError) as error:
            # Safetensors wraps what the system said, with its number; a path must not leave the site.
            number = re.search(r"os error (\d+)", str(error))
            reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or type(error).__name__
            raise RunError(
                f"the optimiser state cannot be kept at this site: {reason}; make room in its state folder"
            ) from None
        files = self._files()
        later = [path for path in files if _round(path) > round_number]
        for stale in later + files[: len(files) - len(later)][:-NUM_KEPT]:
            stale.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
