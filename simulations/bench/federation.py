"""What the federation costs beside bare local training, and what it sends beside whole float32 models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.app import Place
from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from server.app import build_app
from server.store import RunStore
from simulations import engine
from simulations.partition import prepare_sites

# The demo's model and sites, fewer rounds: enough of them for the first round's warm-up not to decide the ratio.
EXPERIMENT: dict[str, Any] = {
    "name": "bench",
    "data": {
        "sites": [
            {"name": "north", "stream": "image", "phantom": {"studies": 2000, "look": "north", "seed": 1}},
            {"name": "south", "stream": "text", "phantom": {"studies": 2000, "look": "south", "seed": 2}},
            {"name": "west", "stream": "paired", "phantom": {"studies": 1000, "look": "west", "seed": 3}},
            {"name": "coast", "stream": "paired", "phantom": {"studies": 1000, "look": "coast", "seed": 4}},
        ],
        "held_out": {"phantom": {"studies": 200, "look": "unseen"}, "probe_studies": 100},
    },
    "stages": [
        {"name": "unpaired", "rounds": 4, "streams": ["image", "text"], "local_steps": 60},
        {
            "name": "paired",
            "rounds": 6,
            "streams": ["paired"],
            "local_steps": 30,
            "batch_size": 32,
            "objectives": {"contrast": 1.0},
        },
    ],
}


def cases() -> Iterator[dict[str, str | float]]:
    """``overhead``: wall of the rounds over time in which a site trained. ``bytes_up``: full float32 bytes over bytes sent."""
    with tempfile.TemporaryDirectory() as folder:
        values = EXPERIMENT | {"data": EXPERIMENT["data"] | {"cache": str(Path(folder) / "phantoms")}}
        totals = _run(config.build(values), Path(folder) / "run")
    overhead = totals["rounds_s"] / totals["local_train_s"]
    yield _line("overhead", totals["rounds_s"], "s", "time in which a site trained", overhead)
    sent = sum(value for name, value in totals.items() if name.startswith("bytes_up/"))
    yield _line("bytes_up", sent, "bytes", "whole float32 models", totals["bytes_full_fp32"] / sent)


def _run(experiment: config.Experiment, folder: Path) -> Mapping[str, float]:
    shards = prepare_sites(experiment.data, Tokenizer.load())
    store = RunStore(folder, experiment, resume=False)
    places = [
        Place(site.name, folder / "config.yaml", shards[site.name], folder / "sites" / site.name)
        for site in experiment.data.sites
    ]
    num_workers = engine.default_workers(len(places), experiment.federation.threads_per_site)
    engine.run_in_process(build_app(experiment, store, watch=lambda row: None), places, num_workers=num_workers)
    committed = store.latest()
    assert committed is not None
    return committed.totals


def _line(case: str, value: float, unit: str, against: str, ratio: float) -> dict[str, str | float]:
    return {"bench": "federation", "case": case, "value": value, "unit": unit, "against": against, "ratio": round(ratio, 4)}
