"""Images of a batch as another exposure of the same studies would show them: cropped, turned, brighter, with other contrast.

All images of a batch pass through one affine grid and one look-up; each has numbers of its own. These are a pure function
of (seed, step) and of an image's place in the batch, as the batch itself is, and each change has its own column of chance:
to turn one on moves no other.

A crop is square, lies inside the picture and shows no border. A turned picture's corners are filled with its edge pixels
(black wedges would tell the angle). Nothing is mirrored unless asked: the heart is on the left, and reports name sides.
A crop may cut off what a report speaks of, so keep it mild where pairs are aligned.

Shapes: B images, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch

PURPOSE = 0x6175676D  # parts these draws from the sampler's, which come from the same seed


@dataclass(frozen=True)
class Changes:
    """What is done to each image of a batch, [B] each.

    ``side``: of the square crop, a share of the picture's. ``across_B``, ``down_B``: where it lies, -1 at the left and upper
    edge, 1 at the right and lower. ``angle_B`` in degrees, anticlockwise as seen. ``mirrored_B``: bool. Grey values x become
    gain x ^ gamma + offset, cut to 0..1.
    """

    side_B: Tensor
    across_B: Tensor
    down_B: Tensor
    angle_B: Tensor
    mirrored_B: Tensor
    gamma_B: Tensor
    gain_B: Tensor
    offset_B: Tensor


def augmented(batch: Batch, wanted: config.Augment, *, seed: int, step: int) -> Batch:
    """The batch with its images changed; the batch itself where there is nothing to change."""
    if batch.image is None or not wanted.is_on:
        return batch
    changes = draw(len(batch.image), wanted, seed=seed, step=step)
    image_BSS = moved(batch.image, changes) if wanted.moves else batch.image
    return replace(batch, image=exposed(image_BSS, changes))


def draw(num_images: int, wanted: config.Augment, *, seed: int, step: int) -> Changes:
    """Changes of each image of a step's batch."""
    chance = np.random.default_rng([seed, step, PURPOSE]).random((num_images, 8)).astype(np.float32)
    share_B, across_B, down_B, angle_B, mirror_B, gamma_B, gain_B, offset_B = torch.from_numpy(chance).unbind(dim=1)
    return Changes(
        side_B=(wanted.smallest_crop + (1.0 - wanted.smallest_crop) * share_B).sqrt(),  # shares are of the area
        across_B=2.0 * across_B - 1.0,
        down_B=2.0 * down_B - 1.0,
        angle_B=wanted.rotation_deg * (2.0 * angle_B - 1.0),
        mirrored_B=mirror_B < wanted.mirror,
        gamma_B=(1.0 + wanted.gamma) ** (2.0 * gamma_B - 1.0),
        gain_B=1.0 + wanted.gain * (2.0 * gain_B - 1.0),
        offset_B=wanted.offset * (2.0 * offset_B - 1.0),
    )


def moved(image_BSS: Tensor, changes: Changes) -> Tensor:
    """Crop, turn and mirror [B, S, S]: each new pixel looks up, bilinearly, where it comes from."""
    angle_B = torch.deg2rad(changes.angle_B)
    cosine_B, sine_B = changes.side_B * angle_B.cos(), changes.side_B * angle_B.sin()
    sign_B = 1.0 - 2.0 * changes.mirrored_B.float()
    free_B = 1.0 - changes.side_B  # how far the middle of the crop may lie from the picture's
    rows = [
        torch.stack([sign_B * cosine_B, -sine_B, free_B * changes.across_B], dim=1),
        torch.stack([sign_B * sine_B, cosine_B, free_B * changes.down_B], dim=1),
    ]
    grid_BSS2 = F.affine_grid(torch.stack(rows, dim=1), [*image_BSS[:, None].shape], align_corners=False)
    found_B1SS = F.grid_sample(image_BSS[:, None], grid_BSS2, mode="bilinear", padding_mode="border", align_corners=False)
    return found_B1SS[:, 0]


def exposed(image_BSS: Tensor, changes: Changes) -> Tensor:
    """Grey values [B, S, S] in 0..1 with another gamma, gain and offset."""
    gamma_B11, gain_B11, offset_B11 = (one[:, None, None] for one in (changes.gamma_B, changes.gain_B, changes.offset_B))
    return (gain_B11 * image_BSS.clamp(0.0, 1.0) ** gamma_B11 + offset_B11).clamp(0.0, 1.0)
