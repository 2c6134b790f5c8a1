"""The transformer block that image patches and words share, and the patch arithmetic around it.

Attention is shared by both modalities, FFN and LayerNorm are experts of their own (VLMo, 2111.02358): only the small
shared part mixes gradients of different kinds of sites.

Shapes: B studies, P patches, K visible patches, C pixels of a patch, L words, T tokens, D width, H heads, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MODALITIES = ("image", "text")
PAIR = "pair"  # the expert of joint sequences


class Attention(nn.Module):
    """Multi-head self-attention as in ViT: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BTD: Tensor, attend_B11T: Tensor | None = None) -> Tensor:
        """Every token looks at all tokens, or at those where ``attend_B11T`` is True."""
        query, key, value = self.qkv(tokens_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed_BTD: Tensor = self.proj(_look(query, key, value, attend_B11T).transpose(1, 2).flatten(2))
        return mixed_BTD


def _look(query: Tensor, key: Tensor, value: Tensor, attend_B11T: Tensor | None) -> Tensor:
    """Scaled dot-product attention, [B, H, T, D / H] to the same.

    On a CPU in bfloat16 torch's flash kernel takes two to four times as long as the two products and a float32 softmax, at
    12 to 1025 tokens, and its MATH kernel computes the products in float32.
    """
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attend_B11T)
    scores_BHTT: Tensor = (query * query.shape[-1] ** -0.5) @ key.mT
    if attend_B11T is not None:
        scores_BHTT = scores_BHTT + torch.zeros_like(attend_B11T, dtype=scores_BHTT.dtype).masked_fill(~attend_B11T, -math.inf)
    seen: Tensor = scores_BHTT.softmax(dim=-1) @ value
    return seen


class MixedBlock(nn.Module):
    """Pre-norm transformer block over the tokens of one or both modalities.

    With ``modality_experts`` each modality has its own LayerNorm and FFN; without, one set serves both. With ``pair_expert``
    the tokens of a joint sequence have one FFN and its LayerNorm for both modalities (VLMo's VL-FFN, 2111.02358); a modality
    alone keeps its own. In every case no module runs twice in a forward pass, which per-sample gradients (Opacus) need.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, *, modality_experts: bool, pair_expert: bool = False
    ) -> None:
        super().__init__()
        names = MODALITIES if modality_experts else ("shared",)
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, num_heads)
        self.attention_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in names})
        experts = (*names, PAIR) if pair_expert else names
        self.mlp_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in experts})
        self.mlp = nn.ModuleDict({name: Mlp(width, hidden, act_layer=nn.GELU) for name in experts})
        self.keeps_activations = True  # False: the backward pass computes them anew (``keep_activations``)

    def forward(
        self, tokens: Mapping[str, Tensor], attend_B11T: Tensor | None, words_N: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One step for ``tokens`` (modality -> [B, T_m, D]); ``attend_B11T`` is True for tokens that may be attended to.

        ``words_N``: places of the words that are no padding among all B * L; then the text expert computes only these.
        """
        if self.keeps_activations or not torch.is_grad_enabled():
            return self._forward(tokens, attend_B11T, words_N)
        grown: dict[str, Tensor] = checkpoint(
            self._forward, tokens, attend_B11T, words_N, use_reentrant=False, preserve_rng_state=False
        )
        return grown

    def _forward(self, tokens: Mapping[str, Tensor], attend_B11T: Tensor | None, words_N: Tensor | None) -> dict[str, Tensor]:
        normed = torch.cat(list(each(self.attention_norm, tokens).values()), dim=1)
        tokens = add(tokens, split_like(self.attention(normed, attend_B11T), tokens))
        if len(tokens) > 1 and PAIR in self.mlp:
            joined = torch.cat(list(tokens.values()), dim=1)
            return add(tokens, split_like(self.mlp[PAIR](self.mlp_norm[PAIR](joined)), tokens))
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


def keep_activations(model: nn.Module, *, wanted: bool) -> None:
    """Whether the blocks of a model keep what their backward pass needs, or compute it anew from what they read.

    Without, a block keeps its tokens alone and a step computes about a third more (1604.06174); the
    gradient has the same bits, for the same operations are done again in the same order.
    """
    for module in model.modules():
        if isinstance(module, MixedBlock):
            module.keeps_activations = wanted


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
