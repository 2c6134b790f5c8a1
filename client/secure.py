"""This site's part in a secure sum (fedmix/federation/secure_sum.py): keys, shares of secrets, a masked upload, and unmasking.

A deployed node starts a new process for every message, so an attempt's secrets lie in the site's state folder, readable by its
owner alone, until the attempt is over. Each phase follows the one before it, once: keys, shares, masked, done. So nothing is
masked twice with the same masks, and of one site either the seed's share or the key's is revealed, never both.

A run that was killed repeats its round with fresh keys, and one that is begun anew begins with the same parameters; a site
then trains to the same change again. Two sums of that over different sites, or with different weights, would show by their
difference what a single site sent: so once this site has helped to unmask a sum, it helps with another from the same
parameters, in whatever run, only where sites, weights and survivors are the same.

Between hospitals a site's keys are signed by the key that it registered, which the plan names. A simulated place has no such
key: it makes one, which is believed to be its own, so there nothing is authenticated.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from numpy.typing import NDArray
from torch import Size

from client.messages import Phase
from client.secure_state import Attempt, SecureState, Shares, signing_key
from fedmix import config
from fedmix.errors import PolicyError, UpdateError
from fedmix.federation import secure_keys, secure_sum
from fedmix.federation.secure_keys import Signed, Statement
from fedmix.federation.secure_sum import Member, Words
from fedmix.federation.update import Tower

SEED_SHARE_BYTES, KEY_SHARE_BYTES = 52, 68  # a share's number, and 32 or 48 bytes padded to blocks of 16
LETTER_HEAD_BYTES = 20  # who writes to whom, and where the second part begins


@dataclass(frozen=True)
class SecureSite:
    """One site in one phase of a round's sum.

    ``streams``: of the stage's sites; ``studies``: that this site trains on. ``key``: the file of the registered key, and
    ``registered``: the sites' public keys; both None at a simulated place.
    """

    site: str
    phase: Phase
    streams: Mapping[str, config.StreamName]
    studies: int
    stage: config.Stage
    settings: config.SecureSum
    aggregation: config.Aggregation
    state: Path
    key: Path | None
    registered: Mapping[str, str] | None

    # ---- the phases

    def make_keys(self) -> Signed:
        """Begin an attempt with fresh keys and seeds; whatever was left of another attempt is forgotten."""
        towers = secure_sum.towers_of(self.streams[self.site])
        letters = ec.generate_private_key(secure_keys.CURVE)
        masks = {tower: ec.generate_private_key(secure_keys.CURVE) for tower in towers}
        seeds = {tower: secrets.token_bytes(secure_sum.SEED_BYTES) for tower in towers}
        statement = Statement(
            run=self.phase.run,
            round_number=self.phase.round_number,
            attempt=self.phase.attempt,
            site=self.site,
            studies=secure_sum.counted(self.stage, self.studies),
            letters=secure_keys.public_point(letters),
            masks={tower: secure_keys.public_point(key) for tower, key in masks.items()},
            seeds={tower: secure_sum.commitment(seed) for tower, seed in seeds.items()},
        )
        attempt = Attempt(
            round_number=self.phase.round_number,
            attempt=self.phase.attempt,
            phase="keys",
            letters=secure_keys.scalar(letters).hex(),
            masks={tower: secure_keys.scalar(key).hex() for tower, key in masks.items()},
            seeds={tower: seed.hex() for tower, seed in seeds.items()},
            roster={self.site: statement.to_bytes().decode()},
        )
        self._state.keep(attempt)
        key = signing_key(self.key, self.state)
        signature = secure_keys.sign(key, secure_keys.KEYS, statement.to_bytes())
        return Signed(statement.to_bytes(), signature, secure_keys.signer_of(key))

    def write_letters(self, roster: list[Signed]) -> dict[str, bytes]:
        """Share this site's secrets out among the sites whose keys came, each share encrypted to its keeper.

        Raises PolicyError for keys that are not those of the stage's sites in this attempt.
        """
        attempt = self._attempt("keys")
        statements = self._opened(roster, attempt)
        given, order = self._shared_out(attempt, statements), sorted(statements)
        own = secure_keys.private_key(bytes.fromhex(attempt.letters))
        letters = {}
        for site in order:
            if site != self.site:
                shared = generate_shared_key(own, secure_keys.public_key(statements[site].letters))
                letters[site] = encrypt(shared, _letter(order.index(self.site), order.index(site), given[site]))
        self._advance(
            attempt,
            phase="shares",
            roster={site: one.to_bytes().decode() for site, one in statements.items()},
            signers={Statement.read(signed.content).site: signed.signer for signed in roster},
            shares={self.site: given[self.site]},
        )
        return letters

    def read_letters(self, letters: Mapping[str, bytes]) -> Attempt:
        """The attempt with what other sites gave this one to keep. ``letters``: by sender, of all sites that are summed up.

        Raises PolicyError for a letter that is not of the site, to this site, in this attempt.
        """
        attempt = self._attempt("shares")
        if self.site not in letters or not letters.keys() <= attempt.roster.keys():
            raise PolicyError("the order's sum is not over this site and others whose keys it was shown")
        order = sorted(attempt.roster)
        own = secure_keys.private_key(bytes.fromhex(attempt.letters))
        shares = dict(attempt.shares)
        for site in sorted(letters.keys() - {self.site}):
            shared = generate_shared_key(own, secure_keys.public_key(attempt.statement(site).letters))
            try:
                content = decrypt(shared, letters[site])
            except InvalidToken:
                raise PolicyError(f"the shares of site {site} were changed on the way, or are not of this attempt") from None
            shares[site] = _read_letter(content, order.index(site), order.index(self.site), self._towers_with(attempt, site))
        opened = attempt.model_copy(update={"shares": shares, "sites": tuple(sorted(letters))})
        if not self.cohorts(opened):
            raise PolicyError(f"fewer than {self.settings.threshold} sites are left in every sum of this site")
        return opened

    def mask(
        self, attempt: Attempt, changes: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, Size], base: str
    ) -> tuple[dict[str, Words], int, bytes]:
        """The masked vectors by tower, how many values were clipped, and the signature over whose masks are in them.

        ``base``: which parameters the site has trained from. Before anything is returned it is on the disk that this attempt's
        masks are used.
        """
        members = self._members({site: attempt.statement(site) for site in attempt.sites})
        vectors: dict[str, Words] = {}
        num_clipped = 0
        for tower, cohort in self.cohorts(attempt).items():
            weight = secure_sum.weights(members, tower, self.aggregation)[self.site]
            vectors[tower], clipped = secure_sum.vector_of(changes, shapes, tower, weight, self.settings)
            num_clipped += clipped
            self._add_masks(vectors[tower], tower, cohort, attempt)
        digest = self._digest(attempt)
        self._advance(attempt, phase="masked", base=base)
        return vectors, num_clipped, secure_keys.sign(signing_key(self.key, self.state), secure_keys.ROSTER, digest)

    def reveal(self, survivors: Mapping[str, bytes]) -> dict[Tower, list[bytes]]:
        """By tower the shares that unmask the survivors' sum, in the order of its sites, and the end of this attempt.

        ``survivors``: the sites whose uploads are in the sum, and what each signed with it. Of a survivor it is the seed's
        share, of a site that dropped out the key's. A tower with fewer survivors than the threshold is left out.
        """
        attempt = self._attempt("masked")
        digest = self._digest(attempt)
        if self.site not in survivors or not survivors.keys() <= set(attempt.sites):
            raise PolicyError("the sum to unmask is not over this site and others whose masks it used")
        for site, signature in survivors.items():
            secure_keys.verify(attempt.signers[site], signature, secure_keys.ROSTER, digest)
        self._check_repeat(attempt, survivors)
        revealed = {}
        for tower, cohort in self.cohorts(attempt).items():
            if sum(site in survivors for site in cohort) >= self.settings.threshold:
                revealed[tower] = [bytes.fromhex(attempt.shares[site][tower][0 if site in survivors else 1]) for site in cohort]
        self._state.finish(attempt.base, self._meaning(attempt, survivors) if revealed else None)
        return revealed

    def cohorts(self, attempt: Attempt) -> dict[Tower, tuple[str, ...]]:
        """The sums that this site takes part in."""
        members = self._members({site: attempt.statement(site) for site in attempt.sites})
        found = secure_sum.cohorts(members, self.settings.threshold)
        return {tower: cohort for tower, cohort in found.items() if self.site in cohort}

    # ---- shares and masks

    def _shared_out(self, attempt: Attempt, statements: Mapping[str, Statement]) -> dict[str, Shares]:
        """What each site, this one too, is to keep of this site's secrets."""
        given: dict[str, Shares] = {site: {} for site in statements}
        threshold = self.settings.threshold
        for tower, cohort in secure_sum.cohorts(self._members(statements), threshold).items():
            if self.site in cohort:
                seeds = create_shares(bytes.fromhex(attempt.seeds[tower]), threshold, len(cohort))
                keys = create_shares(bytes.fromhex(attempt.masks[tower]), threshold, len(cohort))
                for site, seed, key in zip(cohort, seeds, keys, strict=True):
                    given[site][tower] = seed.hex(), key.hex()
        if not given[self.site]:
            raise PolicyError(f"fewer than {threshold} sites take part in every sum of this site")
        return given

    def _add_masks(self, vector: Words, tower: Tower, cohort: tuple[str, ...], attempt: Attempt) -> None:
        """Add this site's own stream, and those that it shares with the others of a tower, in place."""
        secure_sum.add_stream(vector, bytes.fromhex(attempt.seeds[tower]), 1)
        own = secure_keys.private_key(bytes.fromhex(attempt.masks[tower]))
        for other in cohort:
            if other != self.site:
                seed = secure_keys.shared_seed(own, attempt.statement(other).masks[tower])
                secure_sum.add_stream(vector, seed, secure_sum.sign_of(self.site, other))

    # ---- what is believed

    def _opened(self, roster: list[Signed], attempt: Attempt) -> dict[str, Statement]:
        """The statements by site. Raises PolicyError unless all are of the stage's sites, signed by their own keys, and new."""
        statements = {}
        for signed in roster:
            one = signed.opened(run=self.phase.run, round_number=self.phase.round_number, attempt=self.phase.attempt)
            if one.site in statements or one.site not in self.streams:
                raise PolicyError("the keys that were passed on name a site twice, or one that takes no part in this stage")
            if self.registered is not None and self.registered.get(one.site) != signed.signer:
                raise PolicyError(f"the keys of site {one.site} are not signed by the key that the plan names")
            if one.masks.keys() != set(secure_sum.towers_of(self.streams[one.site])):
                raise PolicyError(f"the keys of site {one.site} are not those of the towers that it trains")
            statements[one.site] = one
        if self.site not in statements or statements[self.site] != attempt.statement(self.site):
            raise PolicyError("the keys that were passed on for this site are not its own")
        points = [point for one in statements.values() for point in (one.letters, *one.masks.values())]
        if len(set(points)) != len(points):
            raise PolicyError("two sites say that the same key is theirs")
        return statements

    def _members(self, statements: Mapping[str, Statement]) -> list[Member]:
        return [Member(site, self.streams[site], one.studies) for site, one in sorted(statements.items())]

    def _towers_with(self, attempt: Attempt, other: str) -> list[Tower]:
        """The towers of which this site and another keep each other's shares."""
        members = self._members({site: attempt.statement(site) for site in attempt.roster})
        found = secure_sum.cohorts(members, self.settings.threshold)
        return [tower for tower, cohort in found.items() if self.site in cohort and other in cohort]

    def _digest(self, attempt: Attempt) -> bytes:
        return secure_keys.roster_digest([attempt.statement(site) for site in attempt.sites], attempt.sites)

    def _meaning(self, attempt: Attempt, survivors: Mapping[str, bytes]) -> str:
        """A hash of which sum it is: over which sites, with which weights, of which survivors."""
        counts = [[site, attempt.statement(site).studies] for site in attempt.sites]
        return hashlib.sha256(json.dumps([counts, sorted(survivors)]).encode()).hexdigest()

    def _check_repeat(self, attempt: Attempt, survivors: Mapping[str, bytes]) -> None:
        before = self._state.unmasked(attempt.base)
        if before is not None and before != self._meaning(attempt, survivors):
            raise PolicyError(
                "this site has helped to unmask a sum from the same parameters over other sites or weights, and the two "
                "together could show what one site sent; have the same sites answer, or plan the experiment with another seed"
            )

    # ---- what is kept

    def _attempt(self, phase: str) -> Attempt:
        """The attempt that goes on, if it is the message's and in the phase that comes before this one."""
        attempt = self._state.attempt()
        expected = (self.phase.round_number, self.phase.attempt, phase)
        if attempt is None or (attempt.round_number, attempt.attempt, attempt.phase) != expected:
            raise PolicyError("the message is of another attempt at a secure sum, or comes a second time or too early")
        return attempt

    def _advance(self, attempt: Attempt, **changes: Any) -> None:
        self._state.keep(attempt.model_copy(update=changes))

    @property
    def _state(self) -> SecureState:
        return SecureState(self.state, self.phase.run)


def letter_bytes(num_towers: int) -> int:
    """Bytes of an encrypted letter: Fernet adds a head, padding and a code, and writes the whole in base64."""
    plain = LETTER_HEAD_BYTES + num_towers * (SEED_SHARE_BYTES + KEY_SHARE_BYTES)
    return 4 * -(-(57 + 16 * (plain // 16 + 1)) // 3)


def _letter(writer: int, reader: int, shares: Shares) -> bytes:
    seeds = b"".join(bytes.fromhex(seed) for seed, _ in shares.values())
    keys = b"".join(bytes.fromhex(key) for _, key in shares.values())
    return share_keys_plaintext_concat(writer, reader, seeds, keys)


def _read_letter(content: bytes, writer: int, reader: int, towers: list[Tower]) -> Shares:
    sizes = len(towers) * SEED_SHARE_BYTES, len(towers) * KEY_SHARE_BYTES
    if len(content) != LETTER_HEAD_BYTES + sum(sizes):
        raise UpdateError("a site's shares are of another size than shares have")
    source, destination, seeds, keys = share_keys_plaintext_separate(content)
    if (source, destination, len(seeds), len(keys)) != (writer, reader, *sizes):
        raise UpdateError("a site's shares are not those that it has for this site")
    return {
        tower: (
            seeds[number * SEED_SHARE_BYTES :][:SEED_SHARE_BYTES].hex(),
            keys[number * KEY_SHARE_BYTES :][:KEY_SHARE_BYTES].hex(),
        )
        for number, tower in enumerate(towers)
    }
