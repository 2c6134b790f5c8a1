"""How much electricity a run took, as a range: no meter was read, so the report says how it was reckoned, or why it was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Watts that a busy core draws with its share of the package, from a small server's to a workstation's: an assumption.
WATTS_PER_CORE = (5.0, 15.0)
JOULES_PER_KWH = 3.6e6


def estimate(hardware: Mapping[str, Any], wall_s: float, *, is_on_one_machine: bool) -> dict[str, Any]:
    """The ``energy`` of report.json: ``kwh`` as low and high with ``how``, or null with the ``reason``.

    ``hardware`` is the manifest's: cores and gpus of the machine that the run was started on.
    """
    cores = hardware.get("cores")
    if not is_on_one_machine:
        return {"kwh": None, "reason": "the sites trained on machines of their own, which the coordinator does not know"}
    if hardware.get("gpus"):
        return {"kwh": None, "reason": "the machine has a GPU, whose power was not measured"}
    if not isinstance(cores, int):
        return {"kwh": None, "reason": "the machine's number of cores is not known"}
    low, high = (wall_s * cores * watts / JOULES_PER_KWH for watts in WATTS_PER_CORE)
    how = (
        f"{wall_s:.0f} s of the run with its baselines and evaluation x {cores} cores, all taken as busy, x "
        f"{WATTS_PER_CORE[0]:g} to {WATTS_PER_CORE[1]:g} W a core, an assumption; nothing was metered, and memory, cooling "
        "and network are left out"
    )
    return {"kwh": (low, high), "how": how}
