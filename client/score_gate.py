"""The gate's part in scores: known sums over enough patients, of the one model that the plan has this site score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message, MetricRecord

from client import scored
from client.fields import check_fields
from client.home import Home
from client.scores import asked_of, check_asked
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError, PolicyError
from fedmix.federation import scoring
from fedmix.federation.update import typed

if TYPE_CHECKING:
    from client.gate import Admitted

RECEIPT = {"run": str, "round": int, "base": str, "fingerprint": str, "site": str, "nonce": str, "ledger": str}
ECHOED = ("run", "round", "base", "fingerprint", "nonce")
MAX_ANSWERS = 3  # under one plan: a run that was taken up asks again, and models made to probe patients get no further


def check_scores(admitted: Admitted, home: Home, message: Message, answer: Message) -> None:
    """Refuse an answer that holds anything but sums and weights of this site's measures, or that is of too few patients."""
    order, content = message.content.config_records["order"], answer.content
    try:
        check_asked(typed(order, "fingerprint", str), typed(order, "round", int), admitted.experiment)
    except ConfigError as error:
        raise PolicyError(str(error)) from None
    receipt, scores = content.get("receipt"), content.get("scores")
    if set(content) != {"receipt", "scores"} or not isinstance(receipt, ConfigRecord) or not isinstance(scores, MetricRecord):
        raise PolicyError("the reply holds records that are none of a site's scores, or lacks one")
    check_fields(receipt, RECEIPT)
    if receipt["site"] != admitted.site or any(receipt[key] != order[key] for key in ECHOED):
        raise PolicyError("the reply's receipt is not of the order that it answers")
    known = scoring.measures_of(admitted.stream, admitted.experiment.trained_on)
    if set(scores) - set(known) or not all(map(_is_pair, scores.values())):
        raise PolicyError("the reply holds scores that are no pairs of sum and weight of this site's measures")
    patients = _patients(admitted)
    if scores and len(patients) < admitted.policy.min_patients:
        raise PolicyError("the reply holds scores of fewer patients than this site's policy lets one be of")
    answered = [one for one in home.ledger().entries() if (one["event"], one.get("kind")) == ("sent", "evaluate")]
    if sum(one["plan"] == admitted.plan for one in answered) >= MAX_ANSWERS:
        raise PolicyError(f"this site has scored {MAX_ANSWERS} models under the plan, and scores no more")
    if scores:
        scored.check_apart(home, patients, admitted.policy.min_patients)


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, list)
        and [type(value) for value in pair] == [float, float]
        and all(map(math.isfinite, pair))
        and pair[1] > 0
    )


def _patients(admitted: Admitted) -> frozenset[str]:
    shard = Shard.open(admitted.shard, verify=False)
    site = next(site for site in admitted.experiment.data.sites if site.name == admitted.site)
    return scored.patients_of(shard, asked_of(shard, site, admitted.experiment)[1])
