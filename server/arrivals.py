"""How far the answers of sites have come, by the SuperLink's database: sizes and times, and nothing of what is in them."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmix.deployment.passage import Passage, amount

BUSY_S = 5.0  # that a question waits for a database that is being written to

# A reply's objects hang below one that has its message's id; they are announced first, and come one by one. Flower says
# ``delivered_at`` of a reply that the ServerApp has taken. SQLite tells a blob's length without reading it, but not while it
# sorts by site: hence the table between.
ON_THEIR_WAY = """
WITH RECURSIVE parts(site, object_id) AS (
    SELECT node.name, roots.root_object_id
    FROM object_push_session_roots AS roots
    JOIN object_push_sessions AS sessions ON sessions.session_id = roots.session_id AND sessions.pending_count > 0
    JOIN message_res AS reply ON reply.message_id = roots.root_object_id AND reply.delivered_at = ''
    JOIN node ON node.node_id = reply.src_node_id
    UNION
    SELECT parts.site, child_id FROM parts JOIN object_children ON parent_id = parts.object_id
),
sizes AS MATERIALIZED (SELECT site, LENGTH(content) AS size, is_available FROM parts JOIN objects USING (object_id))
SELECT site, SUM(size), AVG(is_available) FROM sizes GROUP BY site
"""


@dataclass(frozen=True)
class Arrival:
    """An answer on its way: bytes that are here, and the share of its parts, from 0 to 1; how large it will be is not known."""

    num_bytes: int
    share: float

    def __str__(self) -> str:
        """For a person."""
        return amount(self.num_bytes, self.share)


def arrivals(database: Path) -> dict[str, Arrival]:
    """By site, the answers that are on their way; none while there is no database, or it cannot be asked."""
    try:
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as opened:
            return {str(site): Arrival(int(size), float(share)) for site, size, share in opened.execute(ON_THEIR_WAY)}
    except sqlite3.OperationalError:
        return {}


class Arriving:
    """Says how far answers have come, for as long as they take."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock, self._passages = say, clock, dict[str, Passage]()

    def update(self, found: Mapping[str, Arrival]) -> None:
        """What is on its way now, by site."""
        self._passages = {site: self._passages.get(site) or self._begun(site) for site in found}
        for site, arrival in found.items():
            self._passages[site].at(arrival.num_bytes, arrival.share)

    def _begun(self, site: str) -> Passage:
        return Passage(f"{site}: of its answer has come", self._say, clock=self._clock)
