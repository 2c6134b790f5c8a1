"""What the federation costs: beside bare local training, beside other engines, in the server's memory and on the wire.

``overhead``: wall of the rounds over the time in which a site trained, for a ViT-S (22 million parameters, and 3 million for
words): 2 rounds of 40 steps of 8 studies at 4 sites, 4 minutes on two cores.
``vs_ray``, ``vs_nvflare``: 3 rounds of an 80 MB model over 4 sites whose training adds a constant, each a fresh process
from start to finish; our wall over theirs. ``server_memory``: (peak memory of the server's process - 512 MiB) over the bytes
of an 800 MB model, for 32 sites. ``bytes_up``: float32 bytes of whole models over the bytes that the demo's sites send.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client.place import Place
from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import RunError
from server.app import build_app
from server.store import RunStore
from simulations import engine
from simulations.bench import Line, nvflare, trivial
from simulations.partition import prepare_sites

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
SMALL = trivial.Size(num_sites=4, num_rounds=3, num_values=20_000_000, coding="float32")
LARGE = trivial.Size(num_sites=32, num_rounds=1, num_values=200_000_000, coding="int8")
ALLOWED_BYTES = 512 << 20  # of the server's process beside its models: Python, torch and Flower

# Steps enough for a round to take a minute or two, less than it takes at a hospital. Longest job first, as in the demo.
VIT_S: dict[str, Any] = {
    "name": "overhead",
    "data": {
        "image_size": 224,
        "sites": [
            {"name": "west", "stream": "paired", "phantom": {"studies": 100, "look": "west", "seed": 3}},
            {"name": "coast", "stream": "paired", "phantom": {"studies": 100, "look": "coast", "seed": 4}},
            {"name": "north", "stream": "image", "phantom": {"studies": 100, "look": "north", "seed": 1}},
            {"name": "south", "stream": "text", "phantom": {"studies": 100, "look": "south", "seed": 2}},
        ],
        "held_out": {"phantom": {"studies": 80, "look": "unseen"}, "probe_studies": 40},
    },
    "model": {
        "patch_size": 16,
        "width": 384,
        "depth": 12,
        "num_heads": 6,
        "modality_experts": False,  # ViT-S itself; with experts for image and text it would have 42 million
        "decoder_width": 64,
    },
    "stages": [{"name": "all", "rounds": 2, "local_steps": 40, "batch_size": 8, "objectives": {"contrast": 1.0}}],
    "wire": {"coding": "int8"},
    "federation": {"precision": "bfloat16"},
}


def overhead(values: Mapping[str, Any] = VIT_S) -> Line:
    """Real sites train a ViT-S; evaluation is left out."""
    totals = _train(config.build(values))
    ratio = totals["rounds_s"] / totals["local_train_s"]
    return _line("overhead", totals["rounds_s"], "s", "time in which a site trained", ratio)


def vs_ray(size: trivial.Size = SMALL) -> Line:
    """Flower's simulation engine under the very same apps."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (trivial.run(name, size, Path(folder) / name) for name in ("inprocess", "ray"))
    return _line("vs_ray", ours.wall_s, "s", "the same run on Ray, process start to end", ours.wall_s / theirs.wall_s)


def vs_nvflare(size: trivial.Size = SMALL) -> Line:
    """NVFLARE's simulator, in an environment that is made once and kept in the user's cache."""
    against = f"NVFLARE {nvflare.VERSION}'s simulator, process start to end"
    try:
        python = nvflare.environment()
    except RunError as error:
        return _skipped("vs_nvflare", "s", against, str(error))
    with tempfile.TemporaryDirectory() as folder:
        ours = trivial.run("inprocess", size, Path(folder) / "ours").wall_s
        theirs = nvflare.run(python, size, Path(folder) / "theirs")
    return _line("vs_nvflare", ours, "s", against, ours / theirs)


def server_memory(size: trivial.Size = LARGE) -> Line:
    """One round; the updates wait on the disk, as they do in every run."""
    model_bytes = 4 * size.num_values
    against = f"{size.num_sites} sites, a model of {model_bytes} bytes, {size.coding} on the wire"
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < size.disk_bytes:
            return _skipped("server_memory", "bytes", against, f"needs {size.disk_bytes >> 30} GiB of disk; set TMPDIR")
        peak = trivial.run("inprocess", size, Path(folder) / "run").peak_bytes
    return _line("server_memory", peak, "bytes", against, (peak - ALLOWED_BYTES) / model_bytes)


def bytes_up(path: Path = DEMO) -> Line:
    """The demo's model, sites, rounds and wire; fewer studies and one step a round, which change no byte that is sent."""
    values = config.load(path).model_dump(mode="json")
    for site in values["data"]["sites"]:
        site["phantom"]["studies"] = 64
    for stage in values["stages"]:
        stage |= {"local_steps": 1, "batch_size": 4}
    totals = _train(config.build(values | {"baselines": {}}))
    sent = sum(value for name, value in totals.items() if name.startswith("bytes_up/"))
    return _line("bytes_up", sent, "bytes", "whole float32 models", totals["bytes_full_fp32"] / sent)


CASES: dict[str, Callable[[], Line]] = {
    "overhead": overhead,
    "vs_ray": vs_ray,
    "vs_nvflare": vs_nvflare,
    "server_memory": server_memory,
    "bytes_up": bytes_up,
}


def _train(experiment: config.Experiment) -> Mapping[str, float]:
    """All rounds of an experiment in a folder that is removed; returns what the run adds up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = experiment.data.model_copy(update={"cache": folder / "phantoms"})
        experiment = experiment.model_copy(update={"data": data})
        shards = prepare_sites(experiment.data, Tokenizer.load())
        store = RunStore(folder / "run", experiment, resume=False)
        places = [
            Place(site.name, store.folder / "config.yaml", shards[site.name], folder / "sites" / site.name)
            for site in experiment.data.sites
        ]
        num_workers = engine.default_workers(len(places), experiment.federation.threads_per_site)
        engine.run_in_process(build_app(experiment, store, watch=lambda row: None), places, num_workers=num_workers)
        committed = store.latest()
    assert committed is not None
    return committed.totals


def _line(case: str, value: float, unit: str, against: str, ratio: float) -> Line:
    return {"bench": "federation", "case": case, "value": value, "unit": unit, "against": against, "ratio": round(ratio, 4)}


def _skipped(case: str, unit: str, against: str, why: str) -> Line:
    blank: Line = {"bench": "federation", "case": case, "value": None, "unit": unit, "against": against, "ratio": None}
    return blank | {"skipped": why}
