"""Which parameters a site trains: all, only the heads, or only low-rank adapters of the trunk.

The rest stays to the bit. An update has the model's own names and shapes whatever was trained, so the server, its screening
and the site's gate need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedmix import config
from fedmix.federation.local import seed_of
from fedmix.federation.update import Update, group_of
from fedmix.model import adapters
from fedmix.model.encoder import MixedModel

HEADS = frozenset({"image.decoder", "text.head", "image.norm", "text.norm", "shared.norm"})


def is_trained(parameter: str, *, trainable: str) -> bool:
    """Whether a parameter is among those that the config lets a site train; adapters are named as ``narrowed`` puts them."""
    if trainable == "adapters":
        return adapters.learns(parameter)
    return trainable == "all" or group_of(parameter) in HEADS


@contextmanager
def narrowed(model: MixedModel, settings: config.Privacy, seed: int, stage: str) -> Iterator[Callable[[Update], Update]]:
    """Within, only what a site may train wants a gradient; yields what turns an update into one of the model's own names.

    ``seed``: the experiment's, from which the adapters' bases follow with the stage's name.
    """
    if settings.trainable != "adapters":
        with _frozen(model, settings.trainable):
            yield lambda update: update
        return

    def chance_of(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, stage, name, "adapter"))

    with adapters.adapted(model, settings.adapter_rank, chance_of) as bases, _frozen(model, settings.trainable):
        yield lambda update: replace(update, deltas=adapters.merged(update.deltas, bases))


@contextmanager
def _frozen(model: MixedModel, trainable: str) -> Iterator[None]:
    """Parameters that are not trained want no gradient within."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[parameter] and is_trained(name, trainable=trainable))
    try:
        yield
    finally:
        for parameter, was in wanted.items():
            parameter.requires_grad_(was)
