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

    def predict(self, image_BSS: Tensor, hidden_BP: Tensor) -> Tensor:
        """Every patch [B, P, V] from a full sequence, in which mask tokens stand at the hidden places."""
        model = self._model
        places_BP = torch.arange(model.num_patches, device=image_BSS.device).expand(len(image_BSS), -1)
        tokens_BTD = model.embed_image(to_patches(image_BSS, model.patch_size), places_BP)
        hidden_BPD = self._mask_token_D + model.embed_image.position(places_BP)
        masked_BPD = torch.where(hidden_BP[..., None], hidden_BPD, tokens_BTD[:, 1:])
        tokens = {"image": torch.cat([tokens_BTD[:, :1], masked_BPD], dim=1)}
        for block in model.blocks:
            tokens = block(tokens, None)
        predicted_BPV: Tensor = model.patch_decoder(each(model.norm, tokens)["image"], places_BP)
        return predicted_BPV

    def _loss(self) -> Tensor:
        model, image_BSS = self._model, self._image_BSS
        hidden_BP = hide_patches(len(image_BSS), model.num_patches, self._hide, self._generator).hidden_BP.to(image_BSS.device)
        patches_BPC = to_patches(image_BSS, model.patch_size)
        return masked_patch_term(self.predict(image_BSS, hidden_BP), patches_BPC, hidden_BP, kind=model.vision_target).mean()
