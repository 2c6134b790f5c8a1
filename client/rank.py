"""One of the processes that train a site's round together: ``python -m client.rank FOLDER NUMBER`` (client/ranks.py)."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from client import ranks
from client.place import Place, materials
from fedmix.errors import FedmixError
from fedmix.federation import local
from fedmix.federation.microbatch import parts_of
from fedmix.federation.ranks import joined


def main(folder: Path, number: int) -> int:
    """Do this process's share; what fedmix refuses is left in the folder, and the rest goes to the log."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _train(folder, number)
    except FedmixError as error:
        (folder / f"{ranks.REFUSED}-{number}").write_text(str(error))
        return 1
    return 0


def _train(folder: Path, number: int) -> None:
    task = ranks.Task(**json.loads((folder / ranks.TASK).read_text()))
    place = Place(task.site, Path(task.experiment), Path(task.shard), folder)
    job = materials(place, task.stage)
    settings = job.experiment.federation
    torch.set_num_threads(settings.threads_per_site)
    given = ranks.load(folder / ranks.GIVEN, "parameters")
    with torch.no_grad():
        for name, parameter in job.learner.model.named_parameters():
            parameter.copy_(given[name])
    with joined(folder / ranks.MEETING, number, task.total, timeout_s=task.timeout_s) as together:
        update, moments = local.train(
            job.learner,
            job.sampler,
            local.Assignment(task.site, job.stage, task.first_step, job.experiment.seed),
            optimiser_state=ranks.load(folder / ranks.GIVEN, "moments"),
            second_moments=task.second_moments,
            precision=settings.precision,
            parts=parts_of(settings, together),
        )
    if number == 0:
        ranks.save(folder / ranks.FOUND, parameters=update.deltas, moments=moments)
        found = {key: getattr(update, key) for key in ("examples", "steps", "metrics", "second_moments")}
        (folder / ranks.RESULT).write_text(json.dumps(found))


def _end_with_parent() -> None:
    """End this process when the one that started it lets go of its input or dies; nobody would take its update."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
