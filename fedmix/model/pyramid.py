"""What a hidden patch is predicted as, and how a prediction becomes pixels again.

``multi_scale`` is a Laplacian pyramid inside the patch with one fixed weight a scale: fine detail counts
as much as the coarse grey, and an image can be drawn without statistics of the truth. ``single_scale`` predicts raw
pixels; ``norm_pix`` predicts pixels normalised by the patch's own mean and deviation (MAE, section 3), which cannot be
undone without the truth, so ``join`` then gives every patch the same fixed statistics.

Shapes: B studies, P patches, C pixels of a patch, V values a patch is predicted as.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 0.5  # prepared images are centred here
SCALES = (4, 2, 1)  # pixels averaged, coarse to fine
# Deviation of each pyramid level over phantom and public radiographs brought to mean .5, deviation .2. Fixed for all sites.
DEVIATIONS = {4: 0.20, 2: 0.06, 1: 0.06}
PIXEL_DEVIATION = 0.20


def num_values(kind: str, patch_size: int) -> int:
    """How many values a patch of ``patch_size`` squared pixels is predicted as."""
    if kind == "multi_scale":
        return sum(level_sizes(patch_size))
    return patch_size * patch_size


def level_sizes(patch_size: int) -> list[int]:
    """Values a patch has at each scale, coarse to fine."""
    return [(patch_size // scale) * (patch_size // scale) for scale in SCALES]


def split(kind: str, patches_BPC: Tensor) -> Tensor:
    """Targets [B, P, V] of unit scale for patches of grey values in 0..1."""
    if kind == "norm_pix":
        mean = patches_BPC.mean(dim=-1, keepdim=True)
        return (patches_BPC - mean) / (patches_BPC.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    if kind == "single_scale":
        return (patches_BPC - GREY) / PIXEL_DEVIATION
    with torch.autocast(patches_BPC.device.type, enabled=False):  # targets are never rounded to bfloat16
        return (patches_BPC - GREY) @ _filters(patches_BPC)


def join(kind: str, values_BPV: Tensor) -> Tensor:
    """Patches [B, P, C] in grey values that predictions [B, P, V] stand for."""
    if kind != "multi_scale":
        return values_BPV * PIXEL_DEVIATION + GREY
    num_studies, num_patches, total = values_BPV.shape
    patch_size = _patch_size(total)
    image: Tensor | None = None
    for scale, level in zip(SCALES, values_BPV.split(level_sizes(patch_size), dim=-1), strict=True):
        side = patch_size // scale
        residual = level.reshape(num_studies * num_patches, 1, side, side) * DEVIATIONS[scale]
        image = residual if image is None else _enlarge(image, side) + residual
    assert image is not None
    return image.reshape(num_studies, num_patches, patch_size * patch_size) + GREY


def _filters(patches_BPC: Tensor) -> Tensor:
    """The pyramid as a matrix [C, V]: it is linear, and one product takes half the time of pooling and enlarging, or less."""
    return torch.cat(_levels(torch.eye(patches_BPC.shape[-1], device=patches_BPC.device)[:, None]), dim=-1)[:, 0]


def _levels(patches_BPC: Tensor) -> list[Tensor]:
    """Low-pass at the coarsest scale, then what each finer scale adds; pooling never crosses the patch's border."""
    num_studies, num_patches, num_pixels = patches_BPC.shape
    side = round(num_pixels**0.5)
    image = patches_BPC.reshape(num_studies * num_patches, 1, side, side)
    levels, coarser = [], None
    for scale in SCALES:
        smooth = F.avg_pool2d(image, scale) if scale > 1 else image
        residual = smooth if coarser is None else smooth - _enlarge(coarser, side // scale)
        levels.append(residual.reshape(num_studies, num_patches, -1) / DEVIATIONS[scale])
        coarser = smooth
    return levels


def _enlarge(image: Tensor, side: int) -> Tensor:
    return F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)


def _patch_size(total: int) -> int:
    """Invert ``num_values`` for the pyramid: V = p^2 (1 + 1/4 + 1/16)."""
    return math.isqrt(round(total / sum(1.0 / (scale * scale) for scale in SCALES)))
