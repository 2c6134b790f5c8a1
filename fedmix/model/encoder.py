"""One shared transformer that reads visible image patches, words, or both in one sequence.

Absent modalities are absent from the computation: an image alone is a sequence of patches, a report alone a sequence of
words, a pair may be either or one joint sequence. The image side follows MAE (2111.06377): only visible patches enter.
Patches are cut and picked before they are projected, which equals a strided convolution and skips the hidden ones.

Shapes: B studies, S pixels a side, P patches, K visible patches, L words, T tokens, D width, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmix import config
from fedmix.batch import placed
from fedmix.errors import DataError
from fedmix.model import pyramid
from fedmix.model.heads import MatchHead, PatchDecoder, Projection, WordHead, pooled
from fedmix.model.layers import MODALITIES, MixedBlock, each, pick, sincos_grid, to_image, to_patches

PAD = 0  # token id of padding; never attended to


class Encoded(NamedTuple):
    """What the trunk says of some studies: tokens per modality with the summary first, and which words are not padding."""

    tokens: dict[str, Tensor]
    present_BL: Tensor | None


class ImageEmbedding(nn.Module):
    """Visible patches to tokens: [B, K, C] and places [B, K] to [B, 1 + K, D]."""

    def __init__(self, patch_size: int, side: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(patch_size * patch_size, width)
        self.position = nn.Embedding(side * side, width)
        self.tags = nn.Embedding(2, width)  # 0: "this is an image", added to every token; 1: the summary token
        self.position.weight.data.copy_(sincos_grid(side, width))
        nn.init.normal_(self.tags.weight, std=0.02)

    def forward(self, patches_BKC: Tensor, places_BK: Tensor) -> Tensor:
        """Project the patches, say where they were, and put the summary token before them."""
        tokens_BKD: Tensor = self.project((patches_BKC - pyramid.GREY) / 0.25) + self.position(places_BK)
        tag_B2D = self.tags(torch.arange(2, device=places_BK.device).expand(len(places_BK), -1))
        # The summary goes in after patches were hidden: a hidden summary would leave nothing to read.
        tokens_BTD: Tensor = torch.cat([tag_B2D[:, 1:], tokens_BKD], dim=1) + tag_B2D[:, :1]
        return tokens_BTD


class TextEmbedding(nn.Module):
    """Token ids [B, L] to tokens [B, L, D]; the first id is the summary token."""

    def __init__(self, vocabulary: int, max_words: int, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(max_words, width)
        self.tag = nn.Embedding(1, width)
        for table in (self.word, self.position, self.tag):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, words_BL: Tensor, vectors_BLD: Tensor | None = None) -> Tensor:
        """Look words and their places up; with ``vectors_BLD`` these stand for the words."""
        word_BLD = self.word(words_BL) if vectors_BLD is None else vectors_BLD
        places_BL = torch.arange(words_BL.shape[1], device=words_BL.device).expand_as(words_BL)
        tokens_BLD: Tensor = word_BLD + self.position(places_BL) + self.tag(torch.zeros_like(words_BL))
        return tokens_BLD


class MixedModel(nn.Module):
    """The shared image-text transformer with its decoder and heads (after Wang et al. 2021, 2103.16022)."""

    def __init__(self, sizes: config.Model, *, image_size: int, max_words: int, vocabulary: int) -> None:
        super().__init__()
        side = image_size // sizes.patch_size
        self.image_size, self.patch_size, self.num_patches = image_size, sizes.patch_size, side * side
        self.vision_target, self.contrast_form = sizes.vision_target, sizes.contrast_form
        # On: the text experts skip padding, 40 % of a batch of pairs. Off where gradients are taken study by study (Opacus),
        # because skipping flattens studies into one long list of words.
        self.skips_padding = False
        names = MODALITIES if sizes.modality_experts else ("shared",)
        self.embed_image = ImageEmbedding(sizes.patch_size, side, sizes.width)
        self.embed_text = TextEmbedding(vocabulary, max_words, sizes.width)
        self.blocks = nn.ModuleList(
            MixedBlock(
                sizes.width,
                sizes.num_heads,
                sizes.mlp_ratio,
                modality_experts=sizes.modality_experts,
                pair_expert=layer >= sizes.depth - sizes.pair_experts,
            )
            for layer in range(sizes.depth)
        )
        self.norm = nn.ModuleDict({name: nn.LayerNorm(sizes.width) for name in names})
        self.patch_decoder = PatchDecoder(
            sizes.width,
            side=side,
            decoder_width=sizes.decoder_width,
            depth=sizes.decoder_depth,
            num_heads=sizes.decoder_heads,
            num_values=pyramid.num_values(sizes.vision_target, sizes.patch_size),
        )
        self.word_head = WordHead(sizes.width, vocabulary)
        self.projection = Projection(sizes.width, sizes.embedding, has_bias=sizes.contrast_form == "sigmoid")
        self.match_head = MatchHead(sizes.width)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.embed_image.project.weight.device

    def encode(
        self,
        *,
        image_BSS: Tensor | None = None,
        visible_BK: Tensor | None = None,
        words_BL: Tensor | None = None,
        vectors_BLD: Tensor | None = None,
    ) -> Encoded:
        """Run the trunk over what is there: patches, words, or both as one sequence.

        ``visible_BK`` holds the places of the patches to show; None shows all. ``vectors_BLD`` is read in place of the words'
        own vectors; which of them are padding is said by the words all the same. Images are grey values in 0..1. What lies
        elsewhere is sent to the model's device; words should come from the CPU, which is asked which of them are padding.
        """
        tokens: dict[str, Tensor] = {}
        present_BL = attend_B11T = words_N = None
        if image_BSS is not None:
            if visible_BK is None:
                visible_BK = torch.arange(self.num_patches).expand(len(image_BSS), -1)
            visible_BK = placed(visible_BK, self.device)
            patches_BPC = to_patches(placed(image_BSS, self.device), self.patch_size)
            tokens["image"] = self.embed_image(pick(patches_BPC, visible_BK), visible_BK)
        if words_BL is not None:
            tokens["text"] = self.embed_text(placed(words_BL, self.device), vectors_BLD)
            is_word_BL = words_BL != PAD
            present_BL = placed(is_word_BL, self.device)
            if not bool(is_word_BL.all()):
                attend_B11T = _attend(tokens, present_BL)
                words_N = placed(is_word_BL.flatten().nonzero().flatten(), self.device) if self.skips_padding else None
        for block in self.blocks:
            tokens = block(tokens, attend_B11T, words_N)
        return Encoded(each(self.norm, tokens), present_BL)

    def decode_patches(self, encoded: Encoded, visible_BK: Tensor) -> Tensor:
        """Predict every patch as [B, P, values] (fedmix/model/pyramid.py says what the values are)."""
        values_BPV: Tensor = self.patch_decoder(encoded.tokens["image"], placed(visible_BK, self.device))
        return values_BPV

    def embed(self, modality: str, encoded: Encoded) -> Tensor:
        """Unit-norm embeddings [B, E] of one modality, for contrast and retrieval."""
        return self.projection.embed(modality, encoded.tokens[modality], encoded.present_BL if modality == "text" else None)

    def embed_patches(self, encoded: Encoded) -> Tensor:
        """Unit-norm embeddings [B, K, E] of each visible patch, in the space of whole images."""
        return self.projection.embed_tokens("image", encoded.tokens["image"][:, 1:])

    def embed_sentences(self, encoded: Encoded, sentence_BML: Tensor) -> Tensor:
        """Unit-norm embeddings [B, M, E] of sentences, in the space of whole reports; True for the words of the m-th."""
        return self.projection.embed_parts("text", encoded.tokens["text"], sentence_BML)

    def pool(self, modality: str, encoded: Encoded) -> Tensor:
        """Pooled tokens [B, 2 D] of one modality: what the projection reads."""
        return pooled(encoded.tokens[modality], encoded.present_BL if modality == "text" else None)

    # What evaluation and users call; each runs the trunk unmasked unless told otherwise.

    def encode_image(self, image_BSS: Tensor) -> Tensor:
        """Unit-norm image embeddings [B, E]."""
        return self.embed("image", self.encode(image_BSS=image_BSS))

    def encode_text(self, words_BL: Tensor) -> Tensor:
        """Unit-norm report embeddings [B, E]; ids are padded with 0."""
        return self.embed("text", self.encode(words_BL=words_BL))

    def word_vectors(self, words_BL: Tensor) -> Tensor:
        """What words stand for before the trunk reads them, [B, L, D]."""
        vectors_BLD: Tensor = self.embed_text.word(placed(words_BL, self.device))
        return vectors_BLD

    def encode_vectors(self, vectors_BLD: Tensor, words_BL: Tensor) -> Tensor:
        """Unit-norm embeddings [B, E] of texts given by vectors; where ``words_BL`` is 0 there is nothing to read."""
        return self.embed("text", self.encode(words_BL=words_BL, vectors_BLD=vectors_BLD))

    def image_features(self, image_BSS: Tensor) -> Tensor:
        """Summary, mean and maximum of the patch tokens [B, 3 D], for probes."""
        tokens_BTD = self.encode(image_BSS=image_BSS).tokens["image"]
        return torch.cat([tokens_BTD[:, 0], tokens_BTD[:, 1:].mean(dim=1), tokens_BTD[:, 1:].amax(dim=1)], dim=-1).float()

    def text_features(self, words_BL: Tensor) -> Tensor:
        """Summary, mean and maximum of the word tokens [B, 3 D], for probes."""
        encoded = self.encode(words_BL=words_BL)
        tokens_BLD, absent_BL1 = encoded.tokens["text"], (words_BL == PAD).unsqueeze(-1)
        num_B1 = (~absent_BL1).sum(dim=1).clamp_min(1)
        mean_BD = tokens_BLD.masked_fill(absent_BL1, 0.0).sum(dim=1) / num_B1
        highest_BD = tokens_BLD.masked_fill(absent_BL1, float("-inf")).amax(dim=1)
        return torch.cat([tokens_BLD[:, 0], mean_BD, highest_BD], dim=-1).float()

    def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
        """Draw every patch [B, S, S] from those not hidden and, if given, the report; every row hides the same number."""
        num_visible = int((~hidden_BP[0]).sum())
        if not bool(((~hidden_BP).sum(dim=1) == num_visible).all()):  # else some rows would be shown what they should draw
            raise DataError(
                "regenerate needs the same number of hidden patches in every image; draw the mask with hide_patches"
            )
        visible_BK = hidden_BP.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
        encoded = self.encode(image_BSS=image_BSS, visible_BK=visible_BK, words_BL=words_BL)
        values_BPV = self.decode_patches(encoded, visible_BK).float()
        return to_image(pyramid.join(self.vision_target, values_BPV), self.patch_size)

    def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] for every word, read with or without the image."""
        tokens_BLD = self.encode(words_BL=words_BL, image_BSS=image_BSS).tokens["text"]
        logits_BLV: Tensor = self.word_head(tokens_BLD)
        return logits_BLV.float()

    def match_logits(self, image_BSS: Tensor, words_BL: Tensor) -> Tensor:
        """Logits [B] that image and report of each row belong together, read as one sequence."""
        tokens = self.encode(image_BSS=image_BSS, words_BL=words_BL).tokens
        logit_B: Tensor = self.match_head(tokens["image"][:, 0], tokens["text"][:, 0])
        return logit_B.float()


def _attend(tokens: Mapping[str, Tensor], present_BL: Tensor) -> Tensor:
    """True for tokens that may be attended to, [B, 1, 1, T]: all patches, and the words that are no padding."""
    parts = [present_BL if name == "text" else present_BL.new_ones(tokens_BTD.shape[:2]) for name, tokens_BTD in tokens.items()]
    return torch.cat(parts, dim=1)[:, None, None, :]
