"""The step that a user would write first: every patch goes through the trunk, mask tokens stand in for hidden ones, float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmix.model.encoder import MixedModel
from fedmix.model.layers import each, to_patches
from fedmix.objectives.masking import hide_patches
from fedmix.objectives.reconstruction import masked_patch_term


class PlainStep:
    """Masked image modelling with mask tokens (SimMIM, 2111.09886) on a MixedModel's trunk and decoder, trained by AdamW."""

    def __init__(self, model: MixedModel, image_BSS: Tensor, *, hide: float) -> None:
        self._model, self._image_BSS, self._hide = model.train(), image_BSS, hide
        width = model.embed_image.position.embedding_dim
        self._mask_token_D = nn.Parameter(torch.zeros(width, device=image_BSS.device))
        self._parameters = [*model.parameters(), self._mask_token_D]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=1e-3)
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        """Forward, backward, clip and step."""
        self._loss().backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()

    def _loss(self) -> Tensor:
        model, device = self._model, self._image_BSS.device
        num_studies, num_patches = len(self._image_BSS), model.num_patches
        hidden_BP = hide_patches(num_studies, num_patches, self._hide, self._generator).hidden_BP.to(device)
        places_BP = torch.arange(num_patches, device=device).expand(num_studies, -1)
        patches_BPC = to_patches(self._image_BSS, model.patch_size)
        tokens_BTD = model.embed_image(patches_BPC, places_BP)
        hidden_BPD = self._mask_token_D + model.embed_image.position(places_BP)
        masked_BPD = torch.where(hidden_BP[..., None], hidden_BPD, tokens_BTD[:, 1:])
        tokens = {"image": torch.cat([tokens_BTD[:, :1], masked_BPD], dim=1)}
        for block in model.blocks:
            tokens = block(tokens, None)
        predicted_BPV = model.patch_decoder(each(model.norm, tokens)["image"], places_BP)
        return masked_patch_term(predicted_BPV, patches_BPC, hidden_BP, kind=model.vision_target).mean()
