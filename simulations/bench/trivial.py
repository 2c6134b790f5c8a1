"""A federation whose training adds a constant: the real server, engine and messages, with sites that cost nothing.

``run`` starts it in a process of its own, because what is measured is a process from start to end and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from client import messages
from client.place import Place
from fedmix import config
from fedmix.errors import RunError
from fedmix.federation import compression
from fedmix.federation.update import Update
from server.rounds import RoundLoop
from server.store import RunStore
from simulations import engine
from simulations.ray_engine import run_on_ray

WIDTH = 2000  # of the square matrices that the model is made of: 16 MB each, as in a large transformer
START, ADDED = 0.5, 1e-4
STUDIES = 8

# The fork server's imports go on beside this process's own, as under `fedmix simulate`.
LAUNCH = """
import sys
if sys.argv[1] == "inprocess":
    from simulations import forkserver
    forkserver.start()
from simulations.bench import trivial
trivial.main()
"""


@dataclass(frozen=True)
class Size:
    """How much work a trivial federation has; ``num_values`` float32 values are its model."""

    num_sites: int
    num_rounds: int
    num_values: int
    coding: str

    @property
    def disk_bytes(self) -> int:
        """Room that a run takes: the updates of a round, and three checkpoints while one is written."""
        return self.num_values * (4 * 3 + self.num_sites * {"float32": 4, "float16": 2}.get(self.coding, 1))


@dataclass(frozen=True)
class Measured:
    """Wall of a whole process, and the most memory that it held at once."""

    wall_s: float
    peak_bytes: int


def run(engine_name: str, size: Size, folder: Path) -> Measured:
    """A trivial federation in a fresh process. Raises RunError if it does not come to its end with the right model."""
    command = [sys.executable, "-c", LAUNCH, engine_name, str(folder), json.dumps(asdict(size))]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - started
    if ended.returncode:
        raise RunError(f"the bench's run on {engine_name} failed: {(ended.stderr.strip() or 'no word').splitlines()[-1]}")
    return Measured(wall_s, int(json.loads(ended.stdout.splitlines()[-1])["peak_bytes"]))


def main() -> None:
    """Run a trivial federation in this process, print its peak memory and check its model: ENGINE FOLDER SIZE."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("inprocess", "ray", "sequential"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", type=json.loads)
    asked = parser.parse_args()
    size = Size(**asked.size)
    store = federate(asked.engine, size, asked.folder)
    peak = peak_bytes()  # before the model is read back: that is the bench's own memory
    check(store, size)
    print(json.dumps({"peak_bytes": peak}))


def federate(engine_name: str, size: Size, folder: Path) -> RunStore:
    """Train every round."""
    experiment = config.build(experiment_values(size))
    store = RunStore(folder, experiment, resume=False)
    nowhere = folder / "shard"
    places = [Place(site.name, folder / "config.yaml", nowhere, nowhere) for site in experiment.data.sites]
    num_workers = 0 if engine_name == "sequential" else engine.default_workers(size.num_sites, 1)
    app = _server_app(experiment, store, size)
    if engine_name == "ray":
        run_on_ray(app, places, num_workers=num_workers, threads_per_site=1, build=site_app)
    else:
        engine.run_in_process(app, places, num_workers=num_workers, make_app=_app_of_nodes)
    return store


def check(store: RunStore, size: Size) -> None:
    """Raise RunError unless the last round is committed and its model is what adding a constant in each makes of it."""
    committed = store.latest()
    if committed is None or committed.round_number < size.num_rounds:
        raise RunError("the engine stopped before the last round")
    wanted = START + size.num_rounds * ADDED
    wrong = [name for name, value in committed.parameters.items() if not bool(((value - wanted).abs() < ADDED / 100).all())]
    if wrong:
        raise RunError(f"{len(wrong)} parameters are not what {size.num_rounds} rounds make of them")


def experiment_values(size: Size) -> dict[str, Any]:
    """A checked experiment around the trivial sites, who hold pairs by their word alone."""
    phantom = {"studies": STUDIES, "look": "north"}
    sites = [{"name": f"site{number:02d}", "stream": "paired", "phantom": phantom} for number in range(size.num_sites)]
    return {
        "name": "trivial",
        "data": {"sites": sites, "held_out": {"phantom": {"studies": 80, "look": "unseen"}, "probe_studies": 40}},
        "stages": [{"name": "all", "rounds": size.num_rounds, "local_steps": 1, "batch_size": STUDIES}],
        "wire": {"coding": size.coding, "error_feedback": False},
    }


def initial(num_values: int) -> dict[str, Tensor]:
    """A model of square matrices under the names of a transformer's blocks."""
    side = min(WIDTH, int(num_values**0.5))
    return {
        f"blocks.{number}.mlp.shared.fc1.weight": torch.full((side, side), START) for number in range(num_values // side**2)
    }


def site_app(locate: engine.Locate) -> ClientApp:
    """A site that receives the model, adds a constant and sends back what changed, in the words of the real one."""
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        place = locate(context)
        fingerprint = _experiment(place.experiment).fingerprint()
        return messages.greeting(message, site=place.site, stream="paired", fingerprint=fingerprint, studies=STUDIES)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = locate(context)
        order, started = messages.read_order(message), time.time()
        wire, chance = _experiment(place.experiment).wire, torch.Generator().manual_seed(order.round_number)
        coded: dict[str, compression.Parts] = {}
        for name, value in order.parameters.items():  # one by one, so that a site of a large model fits into memory
            change = (value + ADDED) - value
            # All matrices are alike, and so is what becomes of them: it is the server's work that is measured, not coding.
            first = next(iter(coded.values()), None)
            coded[name] = first or compression.encode({name: change}, {}, wire, chance)[0][name]
        update = Update(place.site, {}, {"image": 0, "text": 0, "paired": STUDIES}, 1)
        return messages.reply(message, order, update, coded, trained_s=(started, time.time()), privacy={})

    return app


def peak_bytes() -> int:
    """The most resident memory this process has had. getrusage would count what the process that started it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RunError("this system does not tell a process's peak memory; run the bench on Linux")


def _app_of_nodes(places: engine.Places) -> ClientApp:
    return site_app(engine.locate_among(places))


def _server_app(experiment: config.Experiment, store: RunStore, size: Size) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        RoundLoop(grid, experiment, store, watch=_stop_at_trouble).run(initial(size.num_values))

    return app


def _stop_at_trouble(row: Mapping[str, Any]) -> None:
    """A bench with a site that was dropped would measure less work than it says."""
    if row["event"] in ("dropped", "failed"):
        raise RunError(f"{row['event']}: {row['why']}")


@lru_cache(maxsize=1)
def _experiment(path: Path) -> config.Experiment:
    return config.load(path)
