"""How far one wrong site can move the model: clipped summands, coordinate-wise rules, and what they promise.

Everything is per parameter group among the sites that trained it. Over whole updates a robust rule would take the sites
with only images for outliers, because they leave the text side as it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedmix import config
from fedmix.federation.update import REACHED_BY, Tower

MIN_SITES_OF_CLIP = 3  # the median of two lengths is swayed by either
MIN_SITES_OF_MEDIAN = 3
MIN_SITES_OF_TRIMMED_MEAN = 5


def clip_factors(norms: Mapping[str, float], settings: config.Aggregation) -> dict[str, float]:
    """By what each site's summand is shortened to ``clip`` times the median length; at most 1.

    Where the median is zero the limit is zero: most sites say that nothing moves.
    """
    if settings.clip is None or len(norms) < MIN_SITES_OF_CLIP:
        return dict.fromkeys(norms, 1.0)
    limit = settings.clip * statistics.median(norms.values())
    return {site: limit / norm if norm > limit else 1.0 for site, norm in norms.items()}


def num_cut(num_sites: int, settings: config.Aggregation) -> int | None:
    """Values of each coordinate left out at either end; None where the weighted mean is taken instead.

    The mean stands in where the coordinate-wise rule could outvote nobody: a site that drops out must not end a run.
    """
    if settings.combine == "median" and num_sites >= MIN_SITES_OF_MEDIAN:
        return (num_sites - 1) // 2
    if settings.combine == "trimmed_mean" and num_sites >= MIN_SITES_OF_TRIMMED_MEAN:
        # A hair more, because 0.29 x 100 is 28.999999999999996 to a computer.
        return min(math.floor(settings.trim * num_sites + 1e-9), (num_sites - 1) // 2) or None
    return None


def middle(values_SRC: Tensor, cut: int) -> Tensor:
    """Coordinate-wise mean of what is left without the ``cut`` smallest and largest (1803.01498); sorts ``values`` in place.

    With (S - 1) // 2 cut off it is the median. S sites, R rows, C columns.
    """
    values_SRC.numpy().sort(axis=0)
    return values_SRC[cut : len(values_SRC) - cut].mean(dim=0)


def promises(num_sites_of_tower: Mapping[Tower, int], settings: config.Aggregation) -> list[str]:
    """What is promised against wrong sites at the present number of sites: a sentence for the towers of each number."""
    towers: dict[int, list[str]] = {}
    for tower, num_sites in num_sites_of_tower.items():
        towers.setdefault(num_sites, []).append(tower)
    return [
        f"{_towers(names)}, {_sites(num_sites)}: {_promise(num_sites, settings)}"
        for num_sites, names in towers.items()
        if num_sites > 0
    ]


def num_sites_of_tower(stage: config.Stage, sites: Sequence[config.Site]) -> dict[Tower, int]:
    """How many of an experiment's sites train each tower in a stage."""
    taking_part = config.sites_of(stage, sites)
    counts = {tower: sum(site.stream in streams for site in taking_part) for tower, streams in REACHED_BY.items()}
    if stage.objectives.contrast + stage.objectives.match == 0:
        counts["pair"] = 0
    return counts


def _promise(num_sites: int, settings: config.Aggregation) -> str:
    cut = num_cut(num_sites, settings)
    if cut is not None:
        rule = "the coordinate-wise median" if settings.combine == "median" else "the trimmed mean"
        return (
            f"{rule} keeps every coordinate between the smallest and the largest value of the right sites, as long as at most "
            f"{_sites(cut)} of the {num_sites} {'is' if cut == 1 else 'are'} wrong; what a wrong site sends within that range "
            "is not noticed."
        )
    if num_sites == 1:
        return "nothing outvotes the only site; what screening lets through is taken as it is."
    if settings.clip is None or num_sites < MIN_SITES_OF_CLIP:
        bound = "its weight times its own length, which screening alone bounds"
    else:
        bound = f"its weight times {settings.clip:g} median lengths of the round's updates"
    return (
        f"{_why_mean(num_sites, settings)}bounded influence and no more: one wrong site moves the weighted mean by at most "
        f"{bound}, in any direction."
    )


def _why_mean(num_sites: int, settings: config.Aggregation) -> str:
    if settings.combine == "mean":
        return ""
    needed = {"median": MIN_SITES_OF_MEDIAN, "trimmed_mean": MIN_SITES_OF_TRIMMED_MEAN}[settings.combine]
    name = settings.combine.replace("_", " ")
    if num_sites < needed:
        return f"the {name} needs {needed} sites and is not used here; "
    return f"aggregation.trim = {settings.trim:g} leaves out none of {num_sites} sites, so the {name} is not used here; "


def _towers(names: Sequence[str]) -> str:
    return f"{names[0]} tower" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} towers"


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"
