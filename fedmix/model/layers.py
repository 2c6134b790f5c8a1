"""The transformer block that image patches and words share, and the patch arithmetic around it.

Attention is shared by both modalities, FFN and LayerNorm are experts of their own (VLMo, 2111.02358): only the small
shared part mixes gradients of different kinds of sites.

Shapes: B studies, P patches, K visible patches, C pixels of a patch, L words, T tokens, D width, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

MODALITIES = ("image", "text")

# tanh: on CPUs the erf form costs a tenth of a training step at demo sizes.
gelu = partial(nn.GELU, approximate="tanh")


class MixedBlock(nn.Module):
    """Pre-norm transformer block over the tokens of one or both modalities.

    With ``modality_experts`` each modality has its own LayerNorm and FFN; without, one set serves both. Either way no
    module runs twice in a forward pass, which per-sample gradients (Opacus) need.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, modality_experts: bool) -> None:
        super().__init__()
        names = MODALITIES if modality_experts else ("shared",)
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, num_heads, qkv_bias=True)
        self.attention_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in names})
        self.mlp_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in names})
        self.mlp = nn.ModuleDict({name: Mlp(width, hidden, act_layer=gelu) for name in names})

    def forward(
        self, tokens: Mapping[str, Tensor], attend_B11T: Tensor | None, words_N: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One step for ``tokens`` (modality -> [B, T_m, D]); ``attend_B11T`` is True for tokens that may be attended to.

        ``words_N``: places of the words that are no padding among all B * L; then the text expert computes only these.
        """
        normed = torch.cat(list(each(self.attention_norm, tokens).values()), dim=1)
        tokens = add(tokens, split_like(self.attention(normed, attend_B11T), tokens))
        if words_N is None or "text" not in self.mlp:
            return add(tokens, each(self.mlp, each(self.mlp_norm, tokens)))
        image = {name: tokens_BTD for name, tokens_BTD in tokens.items() if name != "text"}
        grown = add(image, each(self.mlp, each(self.mlp_norm, image)))
        return {**grown, "text": self._grow_words(tokens["text"], words_N)}

    def _grow_words(self, tokens_BLD: Tensor, words_N: Tensor) -> Tensor:
        """Add the text expert's answer to the words at flat places ``words_N``; padding stays as it is."""
        flat_MD = tokens_BLD.flatten(0, 1)
        answer_ND = self.mlp["text"](self.mlp_norm["text"](flat_MD[words_N]))
        return flat_MD.index_add(0, words_N, answer_ND.to(flat_MD.dtype)).view_as(tokens_BLD)


def each(modules: nn.ModuleDict, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply every modality's own module, or the shared one once over all tokens."""
    if "shared" in modules:
        return split_like(modules["shared"](torch.cat(list(tokens.values()), dim=1)), tokens)
    return {name: modules[name](tokens_BTD) for name, tokens_BTD in tokens.items()}


def split_like(joined_BTD: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a joint sequence back into the segments of ``tokens``."""
    parts = joined_BTD.split([tokens_BTD.shape[1] for tokens_BTD in tokens.values()], dim=1)
    return dict(zip(tokens, parts, strict=True))


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Residual sum, segment by segment."""
    return {name: left[name] + right[name] for name in left}


def to_patches(image_BSS: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches [B, P, C], numbered row by row."""
    num_studies, height, width = image_BSS.shape
    grid = image_BSS.reshape(num_studies, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.transpose(2, 3).reshape(num_studies, -1, patch_size * patch_size)


def to_image(patches_BPC: Tensor, patch_size: int) -> Tensor:
    """Inverse of ``to_patches`` for square images: [B, S, S]."""
    num_studies, num_patches, _ = patches_BPC.shape
    side = round(num_patches**0.5)
    grid = patches_BPC.reshape(num_studies, side, side, patch_size, patch_size)
    return grid.transpose(2, 3).reshape(num_studies, side * patch_size, side * patch_size)


def pick(items_BPD: Tensor, index_BK: Tensor) -> Tensor:
    """Rows ``index_BK`` of every study: [B, K, D]."""
    return items_BPD.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, items_BPD.shape[-1]))


def sincos_grid(side: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine table [side * side, width], the start of the learned patch positions (MAE, A.1)."""
    position = torch.arange(side, dtype=torch.float32)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angle = position[:, None] * frequency[None]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    down = line[:, None].expand(side, side, -1)
    across = line[None].expand(side, side, -1)
    return torch.cat([down, across], dim=2).reshape(side * side, width)
