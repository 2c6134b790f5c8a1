"""Sizes of the shared transformer, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedmix.config.base import Count, Positive, Section

# ViT-Ti, S and B (2012.12877, table 1) at patch 16, for 224 px and up. Decoders stay light, at four of MAE's eight blocks and
# at most its 512 wide (2111.06377, table 1); CLIP's ViT-B embeds in 512.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "patch_size": 16, "width": 192, "depth": 12, "num_heads": 3,
        "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4, "embedding": 128,
    },
    "small": {
        "patch_size": 16, "width": 384, "depth": 12, "num_heads": 6,
        "decoder_width": 256, "decoder_depth": 4, "decoder_heads": 8, "embedding": 256,
    },
    "base": {
        "patch_size": 16, "width": 768, "depth": 12, "num_heads": 12,
        "decoder_width": 512, "decoder_depth": 4, "decoder_heads": 16, "embedding": 512,
    },
}  # fmt: skip


class WarmStart(Section):
    """Local files that the server's initial model starts from (fedmix/model/pretrained.py); sites read none of them."""

    image: Path | None = Field(
        default=None, description="a ViT or MAE as .safetensors, or a folder that holds it as model.safetensors"
    )
    text: Path | None = Field(
        default=None, description="a BERT's folder with config.json, model.safetensors and tokenizer.json"
    )
    model: Path | None = Field(
        default=None, description="a fedmix model folder such as runs/demo/model, of these sizes and vocabulary; taken whole"
    )

    @model_validator(mode="after")
    def _something_to_read(self) -> WarmStart:
        if self.model is None and self.image is None and self.text is None:
            raise ValueError(
                "give warm_start an image file, a text folder, or both, or else a model folder; null starts at random"
            )
        if self.model is not None and (self.image is not None or self.text is not None):
            raise ValueError("warm_start.model replaces every parameter; give it alone, or image and text without it")
        return self


class Model(Section):
    """Sizes of the shared transformer (fedmix/model/encoder.py)."""

    size: Literal["tiny", "small", "base"] | None = Field(
        default=None, description="ViT-Ti, S or B with patch 16; keys given beside it override. Null takes the defaults below"
    )
    patch_size: Annotated[int, Field(ge=4, multiple_of=4)] = Field(
        default=8, description="pixels a side; the coarsest scale averages 4"
    )
    vision_target: Literal["multi_scale", "single_scale", "norm_pix"] = Field(
        default="multi_scale",
        description="what hidden patches are predicted as: Laplacian pyramid, raw pixels, or MAE's normalised pixels",
    )
    width: Count = 96
    depth: Count = 4
    num_heads: Count = 4
    mlp_ratio: Positive = 4.0
    modality_experts: bool = Field(
        default=True, description="separate FFN and LayerNorm for image and text (VLMo); false shares them"
    )
    pair_experts: int = Field(
        default=0,
        ge=0,
        description="last blocks with an FFN and LayerNorm of their own for joint sequences of pairs (VLMo, 2111.02358); only "
        "sites with pairs train and receive them",
    )
    decoder_width: Count = 64
    decoder_depth: Count = 1
    decoder_heads: Count = 4
    embedding: Count = Field(default=64, description="size of the contrastive embedding")
    contrast_form: Literal["softmax", "sigmoid", "margin"] = Field(
        default="softmax",
        description="contrast as one choice among the batch (CLIP), a yes or no for each two with a learned bias (SigLIP), or "
        "cosines that differ by a margin (multi-margin loss)",
    )
    warm_start: WarmStart | None = Field(
        default=None, description="null starts at random; not in the fingerprint, manifest.json has the files' hashes"
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        """Fill what ``size`` stands for in under the keys that are given."""
        size = values.get("size") if isinstance(values, dict) else None
        return SIZES[size] | values if isinstance(size, str) and size in SIZES else values

    @model_validator(mode="after")
    def _pair_experts_fit(self) -> Model:
        if self.pair_experts > self.depth:
            raise ValueError(f"pair_experts = {self.pair_experts} is more than the {self.depth} blocks of depth")
        if self.pair_experts and not self.modality_experts:
            raise ValueError(
                "pair_experts stand beside those of image and text: set modality_experts to true, or pair_experts to 0"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        for width, heads, name in (
            (self.width, self.num_heads, "width"),
            (self.decoder_width, self.decoder_heads, "decoder_width"),
        ):
            if width % heads or width % 4:
                raise ValueError(f"{name} = {width} must be a multiple of its number of heads ({heads}) and of 4")
        return self
