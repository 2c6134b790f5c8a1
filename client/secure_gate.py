"""The gate's part in a secure sum: what a phase's answer may hold, and what a masked update is.

The update itself was found fit to leave before it was masked (client/gate.py): its names, types and sizes, that its values are
finite, and its length. Here nothing is known of what a word, a share or a signature says, so all of them have one size, and no
other word leaves beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Size

from client.fields import check_fields, exact
from client.home import Home
from client.messages import Phase, read_phase
from client.secure import KEY_SHARE_BYTES, SEED_SHARE_BYTES, letter_bytes
from fedmix import config
from fedmix.deployment.plan import Plan
from fedmix.errors import PolicyError, UpdateError
from fedmix.federation import secure_sum
from fedmix.federation.secure_keys import Signed
from fedmix.federation.update import REACHED_BY

if TYPE_CHECKING:
    from client.gate import Admitted

RECEIPT = {"run": str, "round": int, "fingerprint": str, "attempt": str, "site": str, "ledger": str}
KEYS = {"content": bytes, "signature": bytes, "signer": str}
SEAL = {"attempt": str, "clipped": int, "signature": bytes}
MAX_SIGNATURE_BYTES = 104  # of ECDSA over P-384, as DER
MASKED = {"receipt", "examples", "metrics", "second_moments", "masked", "sum"}


def check_own_key(plan: Plan, home: Home) -> None:
    """Refuse a plan with a secure sum that does not name every site's key, or names another for this site than its own."""
    if plan.resolved().secure_sum is None:
        return
    if plan.keys.keys() != set(plan.sites):
        raise PolicyError("the plan has a secure sum and does not name the registered key of each site; ask for a new plan")
    if plan.keys[home.settings().name] != _own_key(home):
        raise PolicyError("the plan names another key for this site than its own; have the coordinator register key.pub")


def check_phase(admitted: Admitted, home: Home, message: Message, answer: Message) -> None:
    """Refuse an answer in a phase of a secure sum that is not exactly what its phase has a site send."""
    phase, content = read_phase(message), answer.content
    name = message.metadata.message_type.removeprefix("query.")
    if name not in ("keys", "shares", "unmask") or admitted.experiment.secure_sum is None:
        raise PolicyError("the message is of a kind that this site does not answer under the plan")
    if set(content) != {"receipt", name} or not all(isinstance(record, ConfigRecord) for record in content.values()):
        raise PolicyError("the reply holds records that are none of a secure sum's, or lacks one")
    receipt, values = content.config_records["receipt"], content.config_records[name]
    check_fields(receipt, RECEIPT)
    expected = (phase.run, phase.round_number, phase.fingerprint, phase.attempt, admitted.site)
    if tuple(receipt[key] for key in ("run", "round", "fingerprint", "attempt", "site")) != expected:
        raise PolicyError("the reply's receipt is not of the message that it answers")
    if name == "keys":
        _check_keys(admitted, home, phase, values)
    elif name == "shares":
        _check_letters(admitted, phase, values)
    else:
        _check_revealed(admitted, phase, values)


def check_masked(admitted: Admitted, message: Message, answer: Message, shapes: Mapping[str, Size]) -> None:
    """Refuse a masked update that holds anything but whole vectors of words of this site's towers, and its signature."""
    content = answer.content
    wanted = MASKED | ({"privacy"} if admitted.experiment.privacy.mode == "dp" else set())
    vectors, seal = content.get("masked"), content.get("sum")
    if set(content) != wanted or not isinstance(vectors, ArrayRecord) or not isinstance(seal, ConfigRecord):
        raise PolicyError("the reply holds records that are none of a masked update, or lacks one")
    check_fields(seal, SEAL)
    _check_signature(seal["signature"])
    num_values = 0
    for tower, array in vectors.items():
        if tower not in secure_sum.towers_of(admitted.stream):
            raise PolicyError("the reply holds a vector that is of none of this site's towers")
        size = sum(size for _, size in secure_sum.layout(shapes, tower))
        words = exact(array)
        if words.dtype != np.dtype(np.uint32) or words.shape != (size,):
            raise PolicyError(f"the reply's vector of the {tower} tower is not {size} words")
        num_values += size
    if not vectors or seal["attempt"] != read_phase(message).attempt or not 0 <= int(seal["clipped"]) <= num_values:  # type: ignore[arg-type]
        raise PolicyError("the reply's seal is not of the order that it answers")


def _check_keys(admitted: Admitted, home: Home, phase: Phase, values: ConfigRecord) -> None:
    check_fields(values, KEYS)
    signed = Signed(values["content"], values["signature"], values["signer"])  # type: ignore[arg-type]
    _check_signature(signed.signature)
    try:
        statement = signed.opened(run=phase.run, round_number=phase.round_number, attempt=phase.attempt)
    except UpdateError as error:
        raise PolicyError(str(error)) from None
    stage, _ = admitted.experiment.stage_of(phase.round_number)
    is_own = (
        signed.signer == _own_key(home)
        and statement.site == admitted.site
        and statement.studies == secure_sum.counted(stage, admitted.studies)
        and statement.masks.keys() == set(secure_sum.towers_of(admitted.stream))
    )
    if not is_own:
        raise PolicyError("the keys that the reply holds are not this site's")


def _check_letters(admitted: Admitted, phase: Phase, values: ConfigRecord) -> None:
    """A letter has the size of as many towers as its reader trains too; which of them are summed up the job knows."""
    streams = _streams(admitted, phase)
    for site, letter in values.items():
        most = len(set(secure_sum.towers_of(admitted.stream)) & set(secure_sum.towers_of(streams.get(site, admitted.stream))))
        sizes = {letter_bytes(number) for number in range(most + 1)}
        if site not in streams or site == admitted.site or not isinstance(letter, bytes) or len(letter) not in sizes:
            raise PolicyError("the reply holds letters that are none, or to no other site of the stage")


def _check_revealed(admitted: Admitted, phase: Phase, values: ConfigRecord) -> None:
    streams = _streams(admitted, phase)
    for tower, shares in values.items():
        most = sum(tower in secure_sum.towers_of(stream) for stream in streams.values())
        is_fit = (
            tower in REACHED_BY
            and isinstance(shares, list)
            and len(shares) <= most
            and all(isinstance(share, bytes) and len(share) in (SEED_SHARE_BYTES, KEY_SHARE_BYTES) for share in shares)
        )
        if not is_fit:
            raise PolicyError("the reply reveals something else than one share of each site")


def _streams(admitted: Admitted, phase: Phase) -> dict[str, config.StreamName]:
    stage, _ = admitted.experiment.stage_of(phase.round_number)
    return {site.name: site.stream for site in config.sites_of(stage, admitted.experiment.data.sites)}


def _check_signature(signature: object) -> None:
    if not isinstance(signature, bytes) or len(signature) > MAX_SIGNATURE_BYTES:
        raise PolicyError("the reply holds a signature of another size than signatures have")


def _own_key(home: Home) -> str:
    return " ".join(home.public_key.read_text().split()[:2])
