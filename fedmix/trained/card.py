"""The model card: what an exported model is, what it was trained on, how it did, and what it is not for.

Site names and counts are those of report.json; nothing of a site's files, paths or texts is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from fedmix.batch import STREAMS
from fedmix.data.images import ImageOptions
from fedmix.model.folder import Sizes
from fedmix.report import quantities
from fedmix.report.measures import headline, markdown, markdown_line
from fedmix.report.summary import Report

HOLDS = {"image": "images", "text": "reports", "paired": "images with their reports"}


@dataclass(frozen=True)
class About:
    """What is known of a model; ``report`` is None for a model folder that lies in no completed run."""

    sizes: Sizes
    num_parameters: int
    preparation: ImageOptions
    preparation_is_assumed: bool
    phantoms_only: bool
    report: Report | None
    licence: str


def model_card(about: About) -> str:
    """README.md of an exported folder, with the front matter that Hugging Face reads."""
    name = about.report.run.name if about.report else "fedmix model"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(about), sort_keys=False)}---\n",
        f"# {_plain(name)}\n",
        _what_it_is(about),
        USE,
        "## Training\n",
        _training(about),
        "## Evaluation\n",
        _evaluation(about),
        "## Limits\n",
        _limits(about),
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


def _training(about: About) -> str:
    if about.report is None:
        return "Not known: the model was exported from outside a completed run.\n"
    sites = about.report.sites
    lines = [markdown_line(["site", "holds", "studies", "examples seen"]), markdown_line(["---", "---", "---:", "---:"])]
    for site in sites:
        holds = HOLDS.get(site.stream, site.stream)
        lines.append(markdown_line([site.name, holds, quantities.count(site.studies), quantities.count(site.examples)]))
    counts = []
    for stream in STREAMS:
        studies = [site.studies or 0 for site in sites if site.stream == stream]
        if studies:
            counts.append(
                f"{quantities.plural(len(studies), 'site')} with {HOLDS[stream]} ({quantities.count(sum(studies))} studies)"
            )
    rounds = "" if about.report.run.rounds is None else f" {quantities.plural(about.report.run.rounds, 'round')}."
    source = " All of them are synthetic phantoms." if about.phantoms_only else ""
    return "\n".join([f"{quantities.listing(counts)}.{rounds}{source}\n", *lines, ""])


def _evaluation(about: About) -> str:
    if about.report is None:
        return "None came with the model; `fedmix evaluate` measures it on prepared shards.\n"
    return (
        "On held-out studies of patients that no site trained on, 95 % intervals over patients; the best of each column is "
        "bold. Baselines and guesses that need no model stand beside it.\n\n" + markdown(headline(about.report))
    )


def _limits(about: About) -> str:
    source = (
        "It was trained on drawings, not on patients: no number above says anything about real radiographs."
        if about.phantoms_only
        else "It knows the sites it was trained on; on other devices, patients or languages it may do worse, so measure first."
    )
    privacy = about.report.privacy if about.report else None
    if privacy is None or privacy.mode == "none":
        protection = (
            "Updates were not protected by differential privacy" if privacy else "Whether updates were protected is not known"
        )
        leak = f"{protection}: the weights may reveal something of the training data."
    else:
        spent = (
            "" if privacy.epsilon is None else f", epsilon {privacy.epsilon:.3g} at delta {privacy.delta} per {privacy.unit}"
        )
        leak = f"Differential privacy: {privacy.mode}{spent}."
    limits = (
        "Not a medical device; not for diagnosis, treatment or triage.",
        source,
        "Regenerated images and filled-in words are the model's guesses and show nothing that was in the patient.",
        "Similarities compare given texts with each other; they are no probabilities of disease.",
        leak,
    )
    return "".join(f"- {limit}\n" for limit in limits)


def _licence(licence: str) -> str:
    if licence == "unknown":
        return "The weights have no licence until whoever ran the federation gives them one. fedmix itself is Apache-2.0.\n"
    return f"The weights: {_plain(licence)}. fedmix itself is Apache-2.0.\n"


def _plain(text: str) -> str:
    """One line without markup of its own."""
    return " ".join(text.replace("<", "&lt;").split())
