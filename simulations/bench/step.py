"""What a training step costs: beside its floor, beside what a user would write first, and beside the card's own matrix rate.

A step is ``fedmix.federation.local.train``'s, from drawing the batch to the optimiser: nothing is left out and nothing rebuilt
here. What it is held against runs in turn with it, in this process and on the same threads; medians are compared.

``floor``, ``floor_text``, ``floor_paired``: ViT-S (config ``size: small``), 224 px, bfloat16, on images, reports and pairs; our
step over its matrix products and attentions alone (simulations/bench/products.py), AdamW in it as in ``plain``. ``floor_muon``:
with Muon, whose Newton-Schulz products the floor does not hold. ``floor_demo``, ``floor_demo_text`` and ``floor_demo_paired``:
the demo's steps with the demo's Muon, one thread.
``plain``, ``plain_demo``: a full-sequence float32 step with mask tokens (simulations/bench/plain.py) over ours; AdamW in both.
``compile``, ``compile_demo``: our step over the same with its blocks through torch.compile.
``gpu_mfu``: ViT-B, 224 px, bfloat16 on a GPU; the step's floating-point rate over that of one large product.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmix import config
from simulations.bench import Line
from simulations.bench.contest import Contestant, Work, in_turns, prepared, repeated
from simulations.bench.plain import PlainStep
from simulations.bench.products import Products

ADAMW = {"kind": "adamw"}
DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
SIDE = 8192  # of the square matrices that tell a card's rate


def sized(size: str, *, batch_size: int) -> config.Experiment:
    """Three phantom sites that train a model of a named size at 224 px in bfloat16, with contrast and matching on pairs."""
    studies = 4 * batch_size
    return config.build({
        "name": "step",
        "data": {
            "image_size": 224,
            "sites": [
                {"name": "north", "stream": "image", "phantom": {"studies": studies, "look": "north", "seed": 1}},
                {"name": "south", "stream": "text", "phantom": {"studies": studies, "look": "south", "seed": 2}},
                {"name": "west", "stream": "paired", "phantom": {"studies": studies, "look": "west", "seed": 3}},
            ],
            "held_out": {"phantom": {"studies": 80, "look": "unseen"}, "probe_studies": 40},
        },
        "model": {"size": size},
        "stages": [
            {
                "name": "all",
                "rounds": 1,
                "batch_size": batch_size,
                "objectives": {"contrast": 1.0, "match": 0.1, "joint_share": 0.125},
            }
        ],
        "federation": {"precision": "bfloat16"},
    })  # fmt: skip


def small(stream: config.StreamName, *, num_steps: int = 6) -> Work:
    """ViT-S on every thread that torch has here."""
    return Work(sized("small", batch_size=64), stream, torch.get_num_threads(), num_steps)


def demo(stream: config.StreamName) -> Work:
    """The demo's model and batches on one thread, as its sites train."""
    return Work(config.load(DEMO), stream, 1, num_steps=12)


def floor(case: str, work: Work, **optimiser: Any) -> Line:
    """Our step over its matrix products and attentions alone; ``optimiser``: changes to the stage's."""
    with prepared(work, **optimiser) as (ours, batch):
        products = Products.of(ours.learner, batch, ours.precision)
        seconds = in_turns({"ours": ours, "floor": repeated(products, work.num_steps)})
    kind = optimiser.get("kind", work.stage.optimiser.kind)
    against = f"its matrix products and attention alone, {kind} in the step: {work}"
    return _line(case, seconds["ours"], "s", against, seconds["ours"] / seconds["floor"])


def plain(case: str, work: Work) -> Line:
    """A step as a user would write it first, over ours."""
    with prepared(work, **ADAMW) as (ours, batch), prepared(work) as (other, _):
        assert batch.image is not None
        hide = work.stage.objectives.hide_image_alone
        theirs = PlainStep(other.learner.model, batch.image, hide=hide)
        seconds = in_turns({"ours": ours, "plain": repeated(theirs, work.num_steps)})
    against = f"every patch, mask tokens, float32, AdamW in both: {work}"
    return _line(case, seconds["ours"], "s", against, seconds["plain"] / seconds["ours"])


def compiled(case: str, work: Work) -> Line:
    """Our step as it is, over the same with compiled blocks."""
    with prepared(work) as (ours, _), prepared(work) as (other, _):
        for block in other.learner.model.blocks:
            block.compile()
        seconds = in_turns({"ours": ours, "compiled": other})
    return _line(
        case, seconds["compiled"], "s", f"the step without torch.compile: {work}", seconds["ours"] / seconds["compiled"]
    )


def gpu_mfu(case: str = "gpu_mfu", *, batch_size: int = 256) -> Line:
    """The rate of a ViT-B's step over the card's rate in one large product; images a second and peak memory beside it."""
    against = f"the card's own bfloat16 product of {SIDE} x {SIDE} matrices"
    if not torch.cuda.is_available():
        blank: Line = {"bench": "step", "case": case, "value": None, "unit": "FLOP/s", "against": against, "ratio": None}
        return blank | {"skipped": "torch finds no CUDA device on this machine"}
    work = Work(sized("base", batch_size=batch_size), "image", torch.get_num_threads())
    with prepared(work, device="cuda") as (ours, batch):
        flops = Products.of(ours.learner, batch, ours.precision).flops
        torch.cuda.reset_peak_memory_stats()
        seconds = in_turns({"ours": ours, "product": _large_product(work.num_steps)})
        peak = torch.cuda.max_memory_allocated()
    achieved, measured = flops / seconds["ours"], 2 * SIDE**3 / seconds["product"]
    line = _line(case, achieved, "FLOP/s", f"{against}: {work}", achieved / measured)
    return line | {"images_per_s": batch_size / seconds["ours"], "peak_bytes": peak, "card": torch.cuda.get_device_name()}


CASES: dict[str, Callable[[], Line]] = {
    "floor": lambda: floor("floor", small("image"), **ADAMW),
    "floor_text": lambda: floor("floor_text", small("text"), **ADAMW),
    "floor_paired": lambda: floor("floor_paired", small("paired"), **ADAMW),
    "floor_muon": lambda: floor("floor_muon", small("image")),
    "plain": lambda: plain("plain", small("image", num_steps=3)),
    "floor_demo": lambda: floor("floor_demo", demo("image")),
    "floor_demo_text": lambda: floor("floor_demo_text", demo("text")),
    "floor_demo_paired": lambda: floor("floor_demo_paired", demo("paired")),
    "plain_demo": lambda: plain("plain_demo", demo("image")),
    "compile": lambda: compiled("compile", small("image")),
    "compile_demo": lambda: compiled("compile_demo", demo("image")),
    "gpu_mfu": gpu_mfu,
}


def _large_product(num_steps: int) -> Contestant:
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def job() -> None:
        torch.mm(left, right)

    return repeated(job, num_steps)


def _line(case: str, value: float, unit: str, against: str, ratio: float) -> Line:
    return {"bench": "step", "case": case, "value": round(value, 5), "unit": unit, "against": against, "ratio": round(ratio, 4)}
