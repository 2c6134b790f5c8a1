"""The parameters that an order stands for: those that it carries, and the rest from this site's own disk.

The server leaves out the groups that have not changed since this site received them. An order names every group's hash, so
nothing is trained on that is not, to the bit, what the server meant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from client.messages import Order
from client.state import SiteState
from fedmix import config
from fedmix.batch import Stream
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError
from fedmix.federation.update import REACHED_BY, base_of, digests, group_of, tower_of
from fedmix.model.encoder import MixedModel


class NeedsAllError(DataError):
    """This site does not hold what the order left out; the server answers with an order that carries everything."""


def model_of(experiment: config.Experiment, tokenizer: Tokenizer) -> MixedModel:
    """The experiment's model with chance parameters, all of which that matter here an order replaces."""
    return MixedModel(
        experiment.model,
        image_size=experiment.data.image_size,
        max_words=experiment.data.max_words,
        vocabulary=tokenizer.vocab_size,
    )


def reached(model: MixedModel, stream: Stream) -> dict[str, Tensor]:
    """The parameters that a stream's losses reach: those that a site of it is sent, and may send a change of."""
    return {name: value for name, value in model.named_parameters() if stream in REACHED_BY[tower_of(group_of(name))]}


def load(model: MixedModel, order: Order, stream: Stream, state: SiteState) -> dict[str, Tensor]:
    """Copy the order's parameters in, all that this site's stream reaches and no other, and return them."""
    own = reached(model, stream)
    _check_names(order, own)
    parameters = _complete(order, own, state)
    _copy(parameters, own)
    model.zero_grad(set_to_none=True)  # a job that failed midway may have left gradients
    return parameters


def load_whole(model: MixedModel, order: Order) -> None:
    """Copy in the whole model, all of which the order has to carry."""
    own = dict(model.named_parameters())
    _check_names(order, own)
    found = digests(order.parameters)
    if found != order.groups or base_of(found) != order.base:
        raise DataError("the server's model was damaged on the way (hash differs)")
    _copy(order.parameters, own)


def _copy(parameters: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            if own[name].shape != value.shape or own[name].dtype != value.dtype:
                raise ConfigError(
                    f"the server's {name} is {tuple(value.shape)} {value.dtype}, this experiment's is "
                    f"{tuple(own[name].shape)} {own[name].dtype}"
                )
            own[name].copy_(value)


def _check_names(order: Order, own: Mapping[str, Tensor]) -> None:
    """Refuse an order that is not of this site's groups, or that carries a part of one."""
    groups = {group_of(name) for name in own}
    carried = {group_of(name) for name in order.parameters if name in own}
    whole = {name for name in own if group_of(name) in carried}
    if order.groups.keys() != groups or order.parameters.keys() != whole:
        raise ConfigError(
            f"the server sent {len(order.parameters)} parameters and named {len(order.groups)} groups, this site trains "
            f"{len(own)} of {len(groups)}, and their names differ; are both of one version?"
        )


def _complete(order: Order, own: Mapping[str, Tensor], state: SiteState) -> dict[str, Tensor]:
    """The order's parameters and, where it left some out, those that this site kept; their hash is the order's."""
    parameters = order.parameters
    if parameters.keys() != own.keys():
        parameters = {name: value for name, value in state.received().items() if name in own} | parameters
    if parameters.keys() != own.keys():
        raise NeedsAllError("this site does not hold all parameters that the order left out; send them all")
    found = digests(parameters)
    if found == order.groups and base_of(found) == order.base:
        return parameters
    carried = {group_of(name) for name in order.parameters}
    if any(found[group] != wanted for group, wanted in order.groups.items() if group not in carried):
        raise NeedsAllError("this site holds other parameters than those that the order left out; send them all")
    raise DataError("the server's parameters were damaged on the way (hash differs); the next round sends them again")
