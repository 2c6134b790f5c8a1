"""A synthetic leakage.json: every number in it is written down here, none was measured."""

from __future__ import annotations

from typing import Any

SIZES = {"num_members": 1480, "num_non_members": 1502, "num_member_patients": 1200, "num_non_member_patients": 1200}


def block(auc: float, half: float = 0.02, **changes: Any) -> dict[str, Any]:
    return {
        "auc": auc,
        "auc_ci95": [auc - half, auc + half],
        "tpr@fpr_0.01": 0.031,
        "tpr@fpr_0.01_ci95": [0.011, 0.052],
        "tpr@fpr_0.001": None,
        "tpr@fpr_0.001_reason": "not enough data: 900 non-members, a false positive rate of 0.001 needs 1000",
    } | (SIZES | changes)


def found(**changes: Any) -> dict[str, Any]:
    """An audit with made-up numbers: pairs are remembered, the rest is not."""
    side = {"studies": 1480, "patients": 1200, "images": 1480, "reports": 1480, "pairs": 1480}
    values: dict[str, Any] = {
        "schema": 1,
        "audited": {
            "run": "demo", "run_id": "demo-0123", "weights_sha256": "ab" * 32, "when": "2026-11-23T13:05:39+00:00",
        },
        "has_reference": True,
        "subjects": {"members": side, "non_members": side, "are_alike": True, "num_shared_patients_left_out": 0},
        "membership": {
            "text": block(0.504) | {"control": block(0.5)},
            "image": block(0.61) | {"control": block(0.62)},
            "pair": block(0.71) | {"control": block(0.497)},
            "patient": block(0.68) | {"control": block(0.51)},
        },
        "relinkage": {
            "difference_r@1": 0.061, "difference_r@1_ci95": [0.026, 0.099], "members_r@1": 0.242, "non_members_r@1": 0.181,
            "members_r@1_ci95": [0.21, 0.27], "non_members_r@1_ci95": [0.15, 0.21], "num_members": 1200,
            "num_non_members": 1200, "gallery": 200, "chance": 0.005,
        },
        "epsilon": {
            "lower_bound": 0.42, "largest_possible": 4.9, "delta": 1e-5, "confidence": 0.95, "true_positives": 88,
            "num_members": 600, "false_positives": 31, "num_non_members": 600,
        },
    }  # fmt: skip
    return values | changes


def exposed(mean_bits: dict[str, float], p_values: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Canaries by how many patients held them; "all" is everyone's."""
    blocks = {
        times: {"mean_exposure_bits": bits, "exposure_bits": [bits - 0.5, bits + 0.5], "p_value": p_values[times]}
        for times, bits in mean_bits.items()
    }
    whole = blocks.pop("all")
    sizes = {"num_planted": 8, "num_candidates": 511, "most_possible_bits": 9.0, "chance_bits": 1.44}
    return sizes | {"all": whole, "by_times": blocks} | changes


def canaries_and_update() -> dict[str, Any]:
    """Texts are exposed where many held them, pictures are not; the update gives members and words away."""
    texts = exposed({"all": 4.2, "1": 1.5, "8": 6.9}, {"all": 1e-6, "1": 0.4, "8": 1e-9})
    level = dict.fromkeys(("all", "1", "8"), 0.5)
    images = exposed(dict.fromkeys(level, 1.4), level, psnr_db=14.2, candidates_psnr_db=14.1)
    words = {
        "precision": 0.93, "recall": 0.71, "average_precision": 0.9, "chance": 0.12, "p_value": 1e-30, "num_recovered": 410,
        "num_seen": 537,
    }  # fmt: skip
    whole = {"text": block(0.8), "patient": block(0.85)}
    return {"canaries": {"texts": texts, "images": images}, "update": {"membership": whole, "words": words}}
