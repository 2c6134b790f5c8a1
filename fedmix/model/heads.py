"""What is read off the trunk: patches, words, embeddings for contrast, and whether image and report belong together.

Shapes: B studies, P patches, K visible patches, T tokens, D width, E embedding, V values or vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmix.model.layers import MixedBlock, sincos_grid

LOWEST = -1e4  # below any token's value after LayerNorm, and finite in every precision


class PatchDecoder(nn.Module):
    """Light decoder from visible patch tokens to every patch (MAE, section 3)."""

    def __init__(self, width: int, *, side: int, decoder_width: int, depth: int, num_heads: int, num_values: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, decoder_width)
        self.hidden_tag = nn.Embedding(1, decoder_width)
        self.position = nn.Embedding(side * side, decoder_width)
        self.blocks = nn.ModuleList(MixedBlock(decoder_width, num_heads, 4.0, modality_experts=False) for _ in range(depth))
        self.norm = nn.LayerNorm(decoder_width)
        self.values = nn.Linear(decoder_width, num_values)
        nn.init.normal_(self.hidden_tag.weight, std=0.02)
        self.position.weight.data.copy_(sincos_grid(side, decoder_width))

    def forward(self, tokens_BTD: Tensor, visible_BK: Tensor) -> Tensor:
        """Predict all patches, [B, P, V], from the summary token followed by the visible patches."""
        narrow_BTD = self.narrow(tokens_BTD)
        summary_B1D, seen_BKD = narrow_BTD[:, :1], narrow_BTD[:, 1:]
        num_studies, _, width = seen_BKD.shape
        places = torch.arange(self.position.num_embeddings, device=tokens_BTD.device)
        # Look-ups run over [B, P], not once for all studies: per-sample gradients need the study as the first dimension.
        hidden_BPD = self.hidden_tag(torch.zeros_like(places).expand(num_studies, -1)).to(seen_BKD.dtype)
        all_BPD = hidden_BPD.scatter(1, visible_BK.unsqueeze(-1).expand(-1, -1, width), seen_BKD)
        all_BPD = all_BPD + self.position(places.expand(num_studies, -1))
        tokens = {"image": torch.cat([summary_B1D, all_BPD], dim=1)}
        for block in self.blocks:
            tokens = block(tokens, None)
        values_BPV: Tensor = self.values(self.norm(tokens["image"][:, 1:]))
        return values_BPV


class WordHead(nn.Module):
    """Logits over the vocabulary (BERT's head, untied: a module run twice has no per-sample gradient)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, tokens_ND: Tensor) -> Tensor:
        """Logits [N, V] for tokens [N, D]."""
        logits_NV: Tensor = self.logits(self.transform(tokens_ND))
        return logits_NV


def pooled(tokens_BTD: Tensor, present_BT: Tensor | None) -> Tensor:
    """Mean and maximum of the present tokens after the summary: [B, 2 D].

    The maximum lets one patch with a nodule, or one word, speak for the whole study; a mean alone drowns it.
    """
    body_BTD = tokens_BTD[:, 1:]
    if present_BT is None:
        mean_BD, highest_BD = body_BTD.mean(dim=1), body_BTD.amax(dim=1)
    else:
        absent_BT1 = ~present_BT[:, 1:, None]
        num_present_B1 = (~absent_BT1).sum(dim=1).clamp_min(1)
        mean_BD = body_BTD.masked_fill(absent_BT1, 0.0).sum(dim=1) / num_present_B1
        # Padding may not win; zero is what a report of the summary alone is left with.
        highest_BD = body_BTD.masked_fill(absent_BT1, LOWEST).amax(dim=1).masked_fill(absent_BT1.all(dim=1), 0.0)
    return torch.cat([mean_BD, highest_BD], dim=-1)


class Projection(nn.Module):
    """Unit-norm embeddings for contrast and retrieval, the temperature they are compared at, and for sigmoids a bias."""

    MIN_TEMPERATURE, MAX_TEMPERATURE, START = 0.01, 0.5, 0.1
    BIAS_START = -10.0  # most pairs do not belong together: else the first steps only learn that (SigLIP, 2303.15343)

    def __init__(self, width: int, embedding: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.image = nn.Linear(2 * width, embedding)
        self.text = nn.Linear(2 * width, embedding)
        self.log_temperature = nn.Embedding(1, 1)
        nn.init.constant_(self.log_temperature.weight, torch.tensor(self.START).log().item())
        if has_bias:  # made without chance, so that the rest of the model starts as it would without
            self.contrast_bias = nn.Embedding(1, 1, _weight=torch.full((1, 1), self.BIAS_START))

    def embed(self, modality: str, tokens_BTD: Tensor, present_BT: Tensor | None) -> Tensor:
        """The pooled tokens projected to the unit sphere: [B, E] float32."""
        projection: nn.Linear = getattr(self, modality)
        return F.normalize(projection(pooled(tokens_BTD, present_BT)).float(), dim=-1)

    def embed_tokens(self, modality: str, tokens_BTD: Tensor) -> Tensor:
        """Each token as if it were a whole study of one token: [B, T, E] float32, unit norm."""
        projection: nn.Linear = getattr(self, modality)
        return F.normalize(projection(torch.cat([tokens_BTD, tokens_BTD], dim=-1)).float(), dim=-1)

    def embed_parts(self, modality: str, tokens_BTD: Tensor, part_BMT: Tensor) -> Tensor:
        """Each part as if it were a whole study: [B, M, E] float32; ``part_BMT`` is True for the tokens of the m-th part."""
        absent_BMT1 = ~part_BMT.unsqueeze(-1)
        num_BM1 = part_BMT.sum(dim=-1, keepdim=True).clamp_min(1)
        mean_BMD = part_BMT.to(tokens_BTD.dtype) @ tokens_BTD / num_BM1
        highest_BMD = tokens_BTD[:, None].masked_fill(absent_BMT1, LOWEST).amax(dim=2)
        highest_BMD = highest_BMD.masked_fill(absent_BMT1.all(dim=2), 0.0)
        projection: nn.Linear = getattr(self, modality)
        return F.normalize(projection(torch.cat([mean_BMD, highest_BMD], dim=-1)).float(), dim=-1)

    def temperature(self) -> Tensor:
        """The learned temperature, kept inside [.01, .5]."""
        zero = torch.zeros(1, dtype=torch.long, device=self.log_temperature.weight.device)
        temperature: Tensor = self.log_temperature(zero).exp()
        return temperature.clamp(self.MIN_TEMPERATURE, self.MAX_TEMPERATURE).squeeze()

    def bias(self) -> Tensor:
        """The learned bias of the sigmoid form."""
        bias: Tensor = self.contrast_bias(torch.zeros(1, dtype=torch.long, device=self.contrast_bias.weight.device))
        return bias.squeeze()


class MatchHead(nn.Module):
    """Logit that the image and the report of a joint sequence belong together (ALBEF's ITM).

    The product of the summaries says directly where they agree, which two summaries side by side would have to learn.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, image_summary_BD: Tensor, text_summary_BD: Tensor) -> Tensor:
        """Logits [B] from both summaries of the joint sequence."""
        agreement_BD = image_summary_BD * text_summary_BD
        logit_B1: Tensor = self.logit(torch.cat([image_summary_BD, text_summary_BD, agreement_BD], dim=-1))
        return logit_B1.squeeze(-1)
