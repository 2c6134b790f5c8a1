"""What a site keeps on its own disk in a run: its optimiser's moments, what coding its updates lost, and the parameters it
received last.

A deployed node starts a new process for every message, so memory is no place for it. The first two are kept for each of the
last rounds: a resumed run that repeats a round finds what was there before that round, and what came of the lost round is
dropped. Moments have a file of their own, which can be written while the update is still being coded; the residual's file
comes last and makes the round's state whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmix.disk import errno_of, flush, reason_of
from fedmix.errors import RunError

# The server may fall back one checkpoint (server/store.py) while this site has already finished the round after its
# newest: the state from before the older checkpoint's next round must still be here then.
NUM_KEPT = 3


@dataclass(frozen=True)
class Memory:
    """What a site takes from one round into its next: its optimiser's moments, and what coding the update lost."""

    moments: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, Tensor] = field(default_factory=dict)


class SiteState:
    """The files of one site in one run."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder / run
        self._received = self._folder / "received.safetensors"

    def prepare(self) -> None:
        """Make the folder, and remove what a kill left half written. Raises RunError where nothing could be kept."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for torn in (*self._folder.glob("*.partial"), *self._folder.glob(".tmp*")):  # safetensors' own
                torn.unlink()
            (self._folder / ".partial").touch()
            (self._folder / ".partial").unlink()
        except OSError as error:
            raise RunError(f"this site's state cannot be kept: {_cause(error)}") from None

    def before(self, round_number: int, *, stage_began: int) -> Memory:
        """What the last round that this site finished before ``round_number`` left; empty if there was none.

        Moments from before ``stage_began``, the stage's first round, belong to another optimiser and are left out.
        """
        finished = [path for path in self._finished() if _round(path) < round_number]
        if not finished:
            return Memory()
        newest = finished[-1]
        try:
            moments = load_file(self._moments(_round(newest))) if _round(newest) >= stage_began else {}
            return Memory(moments, load_file(newest))
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"the optimiser state kept at this site cannot be read ({type(error).__name__}); remove the run's "
                "folder in the site's state folder to go on with fresh moments, or start the run anew"
            ) from None

    def keep_moments(self, round_number: int, moments: Mapping[str, Tensor]) -> None:
        """Write down a round's moments, after dropping what a lost attempt at it left; ``finish`` makes them count."""
        for path in (*self._finished(), *self._folder.glob("moments-*.safetensors")):
            if _round(path) >= round_number:
                path.unlink()
        self._keep("the optimiser state", moments, self._moments(round_number), is_flushed=True)

    def finish(self, round_number: int, residual: Mapping[str, Tensor]) -> None:
        """Write down what coding lost, with which the round's state is whole, and drop what no resume can need."""
        self._keep("the optimiser state", residual, self._folder / f"round-{round_number:05d}.safetensors", is_flushed=True)
        for stale in self._finished()[:-NUM_KEPT]:
            stale.unlink()
            self._moments(_round(stale)).unlink(missing_ok=True)

    def received(self) -> dict[str, Tensor]:
        """The parameters received last, for the caller to compare with their hashes; empty if there are none to be read."""
        try:
            return load_file(self._received)
        except (SafetensorError, OSError):
            return {}  # the server sends them again

    def keep_received(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep parameters, so that the next order need not carry those that have not changed."""
        # What a power failure tears is found by its hash and sent again, so the disk is not waited for.
        self._keep("the server's parameters", parameters, self._received, is_flushed=False)

    def _keep(self, what: str, tensors: Mapping[str, Tensor], path: Path, *, is_flushed: bool) -> None:
        """Write a file that is there whole or not at all; flushed, even if the power fails."""
        partial = path.with_suffix(".partial")
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
            if is_flushed:
                flush(partial)
            os.replace(partial, path)
            if is_flushed:
                flush(self._folder)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{what} cannot be kept at this site: {_cause(error)}") from None

    def _moments(self, round_number: int) -> Path:
        return self._folder / f"moments-{round_number:05d}.safetensors"

    def _finished(self) -> list[Path]:
        return sorted(self._folder.glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _cause(error: SafetensorError | OSError) -> str:
    """What the system said and what helps; no path, for it must not leave the site."""
    number = errno_of(error)
    if number is None:
        return f"{reason_of(error)}; see to its state folder"
    is_full = number in (errno.ENOSPC, errno.EDQUOT)
    return f"{reason_of(error)}; {'make room in' if is_full else 'let the agent write to'} its state folder"
