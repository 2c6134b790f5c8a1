"""A synthetic run folder: every number in it is drawn from curves made up here, none was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmix import config
from fedmix.report.files import write_json
from fedmix.report.summary import build_report

SITES = {"north": "image", "east": "image", "south": "image", "west": "text", "harbour": "text", "hill": "paired"}
LABELS = (
    "cardiomegaly", "effusion_left", "effusion_right", "pneumothorax_left", "pneumothorax_right", "consolidation", "oedema",
    "nodule", "fracture", "pacemaker", "tube", "hyperinflation",
)  # fmt: skip
STAGES = (("masked", 1, 20, 1.0), ("aligned", 21, 30, 0.6))
START = 1_763_800_000.0
OBJECTIVES = {"image": ("mvm",), "text": ("mlm",), "paired": ("mvm", "mlm", "contrast", "match")}
LEVELS = {"mvm": (0.92, 0.38, 7.0), "mlm": (5.6, 1.9, 9.0), "contrast": (3.1, 1.2, 5.0), "match": (0.69, 0.34, 6.0)}
TEXTS = (
    "the heart is enlarged. small effusion on the right. no pneumothorax.",
    "lungs are clear. normal heart size. no effusion.",
    "patchy opacity in the left lower zone, likely consolidation.",
    "a pacemaker is in place. mild oedema.",
    "hyperinflated lungs with flat diaphragm. no focal opacity.",
)


def experiment() -> config.Experiment:
    """What the run was made to do: both stages, at sites of phantoms."""
    phantom = {"studies": 1200, "look": "north"}
    masked = {"name": "masked", "rounds": 20}
    aligned = {"name": "aligned", "rounds": 10, "streams": ["image", "paired"], "objectives": {"contrast": 1.0}}
    values = {
        "name": "demo",
        "data": {
            "sites": [{"name": name, "stream": stream, "phantom": phantom} for name, stream in SITES.items()],
            "held_out": {"phantom": phantom | {"seed": 9}},
        },
        "stages": [masked, aligned],
    }
    return config.build(values)


def metrics_rows(num_rounds: int = 30) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    offsets = {site: rng.normal(0, 0.06) for site in SITES}
    rows = []
    for stage, first, last, rate in STAGES:
        for number in range(first, min(last, num_rounds) + 1):
            moment = START + 9.5 * number
            for site, stream in SITES.items():
                if stage == "aligned" and stream == "text":
                    continue
                if (site, number) != ("east", 12):
                    values = site_values(stream, stage, number, offsets[site], rng)
                    rows.append(row("site", stage, number, site, moment, values))
            values = {"time/round_s": 9.1, "time/train_s": 8.6 * rate, "time/aggregate_s": 0.21, "num_sites": 6.0,
                      "num_failed": float(number == 12), "aggregate/update_norm": 3.0 / number}  # fmt: skip
            rows.append(row("round", stage, number, None, moment + 9.1, values))
            if number % 5 == 0:
                rows.append(row("evaluation", stage, number, None, moment + 9.4, central_values(number)))
    return rows


def row(event: str, stage: str, number: int, site: str | None, moment: float, values: dict[str, float]) -> dict[str, Any]:
    return {"time": moment, "event": event, "stage": stage, "round": number, "site": site, "values": values}


def site_values(stream: str, stage: str, number: int, offset: float, rng: np.random.Generator) -> dict[str, float]:
    values = {}
    for objective in OBJECTIVES[stream]:
        if objective in ("contrast", "match") and stage == "masked":
            continue
        high, low, pace = LEVELS[objective]
        elapsed = number - 20 if objective in ("contrast", "match") else number
        values[f"train/{objective}/loss"] = (low + (high - low) * np.exp(-elapsed / pace)) * (1 + offset) + rng.normal(0, 0.012)
    examples = 1440.0
    return values | {
        f"data/{stream}": examples,
        "comm/bytes_up": 610_000.0 if stream != "paired" else 820_000.0,
        "comm/bytes_down": 3_300_000.0,
        "time/train_s": 7.9,
    }


def central_values(number: int) -> dict[str, float]:
    aligned = max(0, number - 20) / 10
    return {
        "zero_shot/macro_auroc": 0.5 + 0.012 * number / 20 + 0.27 * aligned**0.6,
        "retrieval/r@10": 0.02 + 0.4 * aligned**0.7,
        "regeneration/psnr_db": 22.4 - 7 * np.exp(-number / 9),
        "language/bits_per_token": 1.7 + 3.2 * np.exp(-number / 8),
    }


def evaluation(level: float, seed: int = 0) -> dict[str, Any]:
    """An evaluation whose numbers rise with ``level`` from 0 (guessing) to 1."""
    rng = np.random.default_rng(seed)

    def classifier(top: float) -> dict[str, Any]:
        per_label = {name: float(np.clip(0.5 + (top - 0.5) * level + rng.normal(0, 0.05), 0.41, 0.98)) for name in LABELS}
        macro = float(np.mean(list(per_label.values())))
        return {
            "macro_auroc": macro,
            "ci95": [macro - 0.021, macro + 0.019],
            "per_label": per_label,
            "num_train": 1000,
            "num_test": 1000,
        }

    def ranking(top: float) -> dict[str, Any]:
        recall = 0.02 + (top - 0.02) * level**1.4
        interval = [recall - 0.02 * level, recall + 0.021 * level]
        return {"r@1": recall * 0.2, "r@5": recall * 0.66, "r@10": recall, "r@10_ci95": interval, "gallery": 500,
                "label_precision@10": 0.3 + 0.4 * level, "chance": {"r@1": 0.002, "r@5": 0.01, "r@10": 0.02}}  # fmt: skip

    psnr, bits = 14.0 + 8.4 * level, 10.9 - 9.1 * level
    return {
        "classification": {"linear_probe": classifier(0.86), "zero_shot": classifier(0.81)},
        "retrieval": {"image_to_text": ranking(0.46), "text_to_image": ranking(0.43)},
        "regeneration": {
            "psnr_db": psnr, "psnr_db_ci95": [psnr - 0.11, psnr + 0.1], "ssim": 0.3 + 0.4 * level, "mask_ratio": 0.75,
            "with_report": {"psnr_db": psnr + 0.42, "ssim": 0.31 + 0.4 * level,
                            "gain_psnr_db": 0.42, "gain_psnr_db_ci95": [0.37, 0.47]},
            "baselines": {
                "mean_image": {"psnr_db": 17.12, "psnr_db_ci95": [16.9, 17.3], "ssim": 0.41},
                "interpolation": {"psnr_db": 20.48, "psnr_db_ci95": [20.3, 20.6], "ssim": 0.62},
            },
        },
        "language": {
            "bits_per_token": bits, "ci95": [bits - 0.05, bits + 0.05], "top1": 0.02 + 0.6 * level, "mask_ratio": 0.15,
            "with_image": {"bits_per_token": bits - 0.2, "top1": 0.02 + 0.62 * level,
                           "bits_saved": 0.2, "bits_saved_ci95": [0.16, 0.24]},
            "baselines": {"unigram": {"bits_per_token": 6.31, "ci95": [6.25, 6.38], "top1": 0.08}},
        },
        "skipped": {},
    }  # fmt: skip


def report_values(**changes: Any) -> dict[str, Any]:
    """The arguments of build_report."""
    ours = evaluation(0.97, 1)
    ours["classification"]["raw_pixels"] = {"macro_auroc": 0.661, "ci95": [0.64, 0.682], "num_train": 1000, "num_test": 1000}
    sites = [
        {"name": name, "stream": stream, "studies": 1200 + 350 * number, "examples": 1440 * (20 if stream == "text" else 30),
         "bytes_up": 610_000 * 30, "bytes_down": 3_300_000 * 30}
        for number, (name, stream) in enumerate(SITES.items())
    ]  # fmt: skip
    fedavg = evaluation(0.81, 3)
    fedavg["retrieval"]["text_to_image"] = {
        "r@10": None,
        "gallery": 500,
        "r@10_reason": "the gallery held fewer than ten reports",
    }
    pieces = {
        "run": {"name": "demo", "state": "completed", "seed": 0, "started": START, "finished": START + 312, "rounds": 30},
        "sites": sites,
        "evaluation": ours,
        "baselines": {
            "random_init": {"evaluation": evaluation(0.03, 2)},
            "fedavg_all": {"evaluation": fedavg},
        },
        "communication": {"bytes_up": 109_800_000, "bytes_down": 594_000_000, "bytes_full_fp32": 594_000_000},
        "privacy": {"mode": "none", "epsilon": None, "delta": None, "unit": None, "accountant": None},
        "timing": {"wall_s": 312.4, "local_train_s": 258.0, "aggregate_s": 6.3, "evaluate_s": 31.0, "overhead_ratio": 1.061},
    }
    return pieces | changes


def phantom_like(count: int, size: int, seed: int) -> NDArray[np.float32]:
    """Smooth blobs in a dark frame: enough like a chest to judge the layout by."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    images = []
    for _ in range(count):
        body = np.exp(-((x / 0.42) ** 4 + (y / 0.5) ** 4))
        lungs = sum(np.exp(-(((x - side * rng.normal(0.2, 0.01)) / 0.13) ** 2 + ((y + 0.03) / 0.27) ** 2)) for side in (-1, 1))
        heart = np.exp(-(((x - 0.06) / rng.uniform(0.09, 0.16)) ** 2 + ((y - 0.14) / 0.14) ** 2))
        ribs = 0.06 * np.sin(y * 60 + 9 * x**2) * lungs
        images.append(0.75 * body - 0.55 * lungs + 0.35 * heart + ribs + rng.normal(0, 0.02, x.shape))
    greys: NDArray[np.float32] = np.clip(np.stack(images), 0, 1).astype(np.float32)
    return greys


def write_examples(folder: Path, *, source: str = "phantom", size: int = 48, count: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    original = phantom_like(count, size, 5)
    hidden = np.kron(rng.random((count, size // 8, size // 8)) < 0.75, np.ones((8, 8))) > 0
    masked = np.where(hidden, 0.0, original).astype(np.float32)
    blurred = (np.roll(original, 2, 1) + np.roll(original, -2, 2) + np.roll(original, 1, 2)) / 3
    regenerated = np.where(hidden, blurred, original).astype(np.float32)
    np.savez(
        folder / "examples.npz",
        original=original,
        masked=masked,
        regenerated=regenerated,
        regenerated_with_report=((regenerated + original) / 2).astype(np.float32),
        retrieval_image=phantom_like(3, size, 8),
    )
    retrieval = [
        {
            "image": number,
            "texts": [TEXTS[(number + k) % 5] for k in range(3)],
            "correct": [k == number for k in range(3)],
            "truth": TEXTS[(2 * number) % 5],
        }
        for number in range(3)
    ]
    (folder / "examples.json").write_text(json.dumps({"retrieval": retrieval, "source": source}))


def manifest(state: str = "completed", **more: Any) -> dict[str, Any]:
    return {
        "name": "demo", "state": state, "seed": 0, "started": START, "commit": "0000000",
        "versions": {"fedmix": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "flwr": "1.41.0"},
        "fingerprints": {"config": "sha256:" + "5" * 64, "tokenizer": "sha256:" + "a" * 64},
        "hardware": {"cpu": "synthetic, 2 cores", "memory_gib": 8},
    } | more  # fmt: skip


def write_run(folder: Path, **changes: Any) -> Path:
    """A completed run with everything in it; ``changes`` replace arguments of build_report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", build_report(**report_values(**changes)))
    write_json(folder / "manifest.json", manifest())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics_rows()))
    (folder / "config.yaml").write_text(experiment().to_yaml())
    write_examples(folder / "evaluation")
    return folder
