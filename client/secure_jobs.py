"""What a node answers in the phases of a round's secure sum (client/secure.py has this site's part in it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Message

from client import messages, parameters
from client.place import Place, experiment_of, learner_of, rows_of, site_of, stage_of
from client.secure import SecureSite
from client.secure_state import Attempt
from fedmix import config
from fedmix.data.shard import Shard
from fedmix.errors import PolicyError


def secure_site(message: Message, place: Place) -> SecureSite:
    """This site in the attempt at a round's secure sum that a message is of."""
    phase, experiment = messages.read_phase(message), experiment_of(place.experiment)
    site = site_of(experiment, place.site)
    stage, _ = stage_of(phase, experiment, site)
    if experiment.secure_sum is None:
        raise PolicyError("the experiment given to this site has no secure sum")
    return SecureSite(
        site=site.name,
        phase=phase,
        streams={one.name: one.stream for one in config.sites_of(stage, experiment.data.sites)},
        studies=len(rows_of(Shard.open(place.shard, verify=False), site.stream)),
        stage=stage,
        settings=experiment.secure_sum,
        aggregation=experiment.aggregation,
        state=place.state,
        key=place.key,
        registered=place.registered,
    )


def keys(message: Message, place: Place) -> Message:
    """Keys for an attempt at a secure sum."""
    secure = secure_site(message, place)
    signed = secure.make_keys()
    keys = ConfigRecord({"content": signed.content, "signature": signed.signature, "signer": signed.signer})
    return messages.phase_reply(message, secure.phase, secure.site, "keys", keys)


def shares(message: Message, place: Place) -> Message:
    """Letters with shares of this site's secrets, one to each other site."""
    secure = secure_site(message, place)
    letters = secure.write_letters(messages.read_roster(message))
    return messages.phase_reply(message, secure.phase, secure.site, "shares", ConfigRecord(dict(letters)))


def unmask(message: Message, place: Place) -> Message:
    """What takes the masks off the survivors' sum."""
    secure = secure_site(message, place)
    revealed = secure.reveal(messages.read_by_site(message, "signatures"))
    shares = ConfigRecord({str(tower): each for tower, each in revealed.items()})
    return messages.phase_reply(message, secure.phase, secure.site, "unmask", shares)


def opened(message: Message, place: Place) -> tuple[SecureSite, Attempt]:
    """This site in its attempt at a secure sum, with the shares that the order brings from the other sites."""
    secure = secure_site(message, place)
    return secure, secure.read_letters(messages.read_by_site(message, "letters"))


def sealed(message: Message, answer: Message, place: Place) -> Message:
    """The answer as it leaves: an update with masks over it, if the experiment has secure sums, and any other as it is."""
    experiment = experiment_of(place.experiment)
    if message.metadata.message_type != "train" or experiment.secure_sum is None:
        return answer
    secure, attempt = opened(message, place)
    stage, _ = stage_of(secure.phase, experiment, site_of(experiment, place.site))
    model = learner_of(place.experiment, stage.name).model
    shapes = {name: value.shape for name, value in parameters.reached(model, secure.streams[secure.site]).items()}
    record = answer.content.array_records["deltas"]
    changes, base = {name: array.numpy() for name, array in record.items()}, messages.read_base(message)
    vectors, clipped, signature = secure.mask(attempt, changes, shapes, base)
    return messages.sealed(message, answer, secure.phase, vectors, clipped, signature)


PHASES: Mapping[str, Callable[[Message, Place], Message]] = {"keys": keys, "shares": shares, "unmask": unmask}
