"""On which patients a site has scored models: two sums over nearly the same patients tell, by their difference, about the few.

Whoever asks for scores sees exact sums. So a set of held-out patients is scored as often as the policy lets it, and another
one only if so many patients are in one of the two and not in the other that none of them stands alone. Sums of three or
more sets can still be combined; ``policy.yaml`` decides whether any may leave.
"""

from __future__ import annotations

import hashlib
import json

from client.home import Home
from fedmix.data.loading import Indices
from fedmix.data.shard import Shard
from fedmix.disk import reason_of, write_whole
from fedmix.errors import PolicyError, RunError


def patients_of(shard: Shard, rows: Indices) -> frozenset[str]:
    """A hash of every patient's studies, so that a patient with one study changed counts as another."""
    hashes: dict[str, hashlib._Hash] = {}
    for row in rows:
        patient = str(shard.patient[row])
        seen = hashes.setdefault(patient, hashlib.sha256(patient.encode()))
        for part in (shard.image(int(row)), shard.words(int(row))):
            seen.update(b"none" if part is None else part.tobytes())
    return frozenset(seen.hexdigest() for seen in hashes.values())


def check_apart(home: Home, patients: frozenset[str], fewest: int) -> None:
    """Refuse to score patients of whom all but a few were scored before, or the other way round; else remember them.

    Raises RunError where what was scored cannot be read or written, PolicyError for what is refused.
    """
    try:
        before = json.loads(home.scored_file.read_text()) if home.scored_file.exists() else []
        sets = [frozenset(one) for one in before]
        if any(0 < len(patients ^ earlier) < fewest for earlier in sets):
            raise PolicyError(
                "this site's held-out patients are those that it scored before but for a few, of whom the difference of the "
                f"sums would tell; score the same ones, or {fewest} others or more"
            )
        if patients not in sets:
            write_whole(home.scored_file, json.dumps([*map(sorted, sets), sorted(patients)]), mode=0o600)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"which patients this site has scored cannot be told: {reason_of(error)}; restore scored.json") from None
