"""A trained model for pictures of another size: its patch positions resampled to the new grid. Patches stay as they are.

Bicubic with antialiasing, as timm does for ViTs, in the trunk and in the patch decoder, the only tables that know how many
patches there are. The model has then never seen such a picture: it is a start, or a measurement of what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fedmix import config
from fedmix.errors import ConfigError

POSITIONS = ("embed_image.position.weight", "patch_decoder.position.weight")


def check_size(image_size: int, sizes: config.Model) -> None:
    """Raise ConfigError unless pictures of so many pixels a side can be cut into the model's patches."""
    patch = sizes.patch_size
    if image_size % patch or image_size < 2 * patch:
        raise ConfigError(
            f"image size {image_size} must be twice the model's patch of {patch} pixels, or a larger multiple of it"
        )


def resized(parameters: Mapping[str, Tensor], num_patches: int) -> dict[str, Tensor]:
    """A model's parameters with both tables [P, D] of patch positions resampled to ``num_patches``, a square number."""
    side = math.isqrt(num_patches)
    found = dict(parameters)
    for name in POSITIONS:
        if len(found[name]) != num_patches:
            found[name] = resample_abs_pos_embed(found[name][None], [side, side], num_prefix_tokens=0)[0]
    return found
