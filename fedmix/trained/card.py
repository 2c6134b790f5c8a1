"""The model card: what an exported model is, what it was trained on, how it did, and what it is not for.

Site names and counts are those of report.json; nothing of a site's files, paths or texts is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from fedmix.data.images import ImageOptions
from fedmix.model.folder import Sizes
from fedmix.report import card, markdown, quantities
from fedmix.report.summary import Report


@dataclass(frozen=True)
class About:
    """What is known of a model; ``report`` is None and ``manifest`` empty for a model folder that lies in no completed run."""

    sizes: Sizes
    num_parameters: int
    preparation: ImageOptions
    preparation_is_assumed: bool
    phantoms_only: bool
    report: Report | None
    manifest: tuple[tuple[str, str], ...]
    licence: str


def model_card(about: About) -> str:
    """README.md of an exported folder, with the front matter that Hugging Face reads."""
    name = about.report.run.name if about.report else "fedmix model"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(about), sort_keys=False)}---\n",
        f"# {markdown.text(name)}\n",
        _what_it_is(about),
        USE,
        "## Intended use\n",
        markdown.items(card.USES),
        "## Training\n",
        card.training(about.report, phantoms_only=about.phantoms_only),
        "## Evaluation\n",
        card.evaluation(about.report),
        "## Limits\n",
        card.limits(about.report, phantoms_only=about.phantoms_only),
        "## Record\n",
        card.record(about.manifest),
        "## Licence\n",
        _licence(about.licence),
    ]
    return "\n".join(parts)


USE = """```python
import fedmix
from PIL import Image

model = fedmix.load("path of this folder")
model.probabilities([Image.open("image.png")], ["large effusion on the right.", "no effusion."])
```

Also `encode_image`, `encode_text`, `similarity`, `match`, `regenerate` and `fill_words`. `tokenizer.json` can be read by
`transformers.PreTrainedTokenizerFast` too; the model itself is read by fedmix alone.
"""


def _front_matter(about: About) -> dict[str, Any]:
    tags = ["fedmix", "federated-learning", "chest-x-ray", "radiology", "image-text"]
    return {
        "library_name": "fedmix",
        "license": about.licence,
        "language": ["en"],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": [*tags, *(["synthetic"] if about.phantoms_only else [])],
    }


def _what_it_is(about: About) -> str:
    sizes, options = about.sizes, about.preparation
    experts = "with experts for image and text" if sizes.model.modality_experts else "fully shared"
    if sizes.model.pair_experts:
        experts += f", in its last {quantities.plural(sizes.model.pair_experts, 'block')} also for both in one sequence"
    assumed = (
        " How the sites prepared their pictures was not recorded; this is assumed, and wrong if they did otherwise."
        if about.preparation_is_assumed
        else ""
    )
    return (
        f"One image-text transformer ({experts}; width {sizes.model.width}, {quantities.plural(sizes.model.depth, 'block')}, "
        f"{quantities.count(about.num_parameters)} parameters), pre-trained with fedmix over sites that keep their data.\n\n"
        f"Images: grey, {sizes.image_size} pixels a side, {'padded' if options.fit == 'pad' else 'cropped'} to a square, "
        f"normalisation {options.normalise}.{assumed} Texts: at most {sizes.max_words} tokens, the summary token included.\n"
    )


def _licence(licence: str) -> str:
    if licence == "unknown":
        return "The weights have no licence until whoever ran the federation gives them one. fedmix itself is Apache-2.0.\n"
    return f"The weights: {markdown.text(licence)}. fedmix itself is Apache-2.0.\n"
