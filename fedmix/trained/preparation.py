"""preprocessor_config.json: how a picture becomes numbers, said to readers in full and to fedmix by four choices.

What fedmix cannot do otherwise (Lanczos, percentiles, 1/255) stands in the file for other programs. A file that says
something else there is of another fedmix and is refused: to ignore it would move every embedding without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmix.data.images import HIGH_PERCENTILE, LOW_PERCENTILE, STANDARD_MEAN, STANDARD_STD, ImageOptions
from fedmix.errors import DataError, RunError

FILE = "preprocessor_config.json"


def described(options: ImageOptions) -> dict[str, Any]:
    """What preprocessor_config.json holds."""
    return {
        "image_processor_type": "FedmixImageProcessor",
        "size": {"height": options.size, "width": options.size},
        "fit": options.fit,
        "border": options.border,
        "normalise": options.normalise,
        "standard_mean": STANDARD_MEAN,
        "standard_std": STANDARD_STD,
        "percentiles_of_16_bit": [LOW_PERCENTILE, HIGH_PERCENTILE],
        "num_channels": 1,
        "colours": "grey (ITU-R 601-2 luma), 0 black",
        "resample": "lanczos",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def read_preparation(folder: Path) -> ImageOptions:
    """The choices that a folder's preprocessor_config.json stands for."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        options = ImageOptions(
            size=values["size"]["height"], fit=values["fit"], border=values["border"], normalise=values["normalise"]
        )
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        raise RunError(f"{folder}: {FILE} cannot be read ({type(error).__name__}); export the model again") from None
    expected = described(options)
    wrong = sorted(name for name in values.keys() | expected.keys() if values.get(name) != expected.get(name))
    if wrong:
        raise RunError(f"{folder}: {FILE} says of {', '.join(wrong)} what this fedmix does not do; export the model again")
    return options
