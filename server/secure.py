"""The server's part in a round's secure sum (fedmix/federation/secure_sum.py): it passes keys and letters on, adds masked words
up, and learns one sum of each tower.

The phases: ``keys`` of every site, ``shares`` of their secrets in letters that only their readers can open, the order to train
with its masked upload, ``unmask``. A site that fails before its letters came is left out, one that fails later has its masks
taken away with the shares that others kept for it. Whatever does not fit gives the round up, before anything is committed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.serverapp import Grid
from torch import Size, Tensor

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation import secure_keys, secure_sum
from fedmix.federation.secure_keys import Signed, Statement
from fedmix.federation.secure_sum import Member, Words
from fedmix.federation.update import REACHED_BY, Tower, group_of, typed
from server import messages
from server.accounts import add
from server.books import Books
from server.messages import Order, Summing
from server.roster import Roster

PHASE_S = 300.0  # a phase without training takes seconds; a site that does not answer may not hold the others up for longer
SHARE_BYTES = {52, 68}  # of a seed and of a key (flwr's shamir: a number, then blocks of 16 with padding)
MAX_LETTER_BYTES = 4096

SWITCHED_OFF = ("screening of each site's update", "clipping of long updates at the server", "numbers that compare sites")

Told = Mapping[str, list[bytes] | list[str]]  # what a phase's message says beside its attempt


class SecureRound:
    """One attempt at a round's secure sum."""

    def __init__(
        self,
        grid: Grid,
        experiment: config.Experiment,
        settings: config.SecureSum,
        roster: Roster,
        *,
        run: str,
        round_number: int,
        books: Books | None,
    ) -> None:
        self._grid, self._experiment, self._settings = grid, experiment, settings
        self._stage, _ = experiment.stage_of(round_number)
        plan = "" if books is None else books.plan
        self._summing = Summing(run, round_number, experiment.fingerprint(), plan, secrets.token_hex(16))
        self._roster, self._books = roster, books
        self._streams = {site.name: site.stream for site in experiment.data.sites}
        self._signed: dict[str, Signed] = {}
        self._statements: dict[str, Statement] = {}
        self._letters: dict[str, dict[str, bytes]] = {}  # writer -> reader -> letter
        self._sums: dict[Tower, Words] = {}
        self._uploads: dict[str, bytes] = {}  # site -> its signature over whose masks are in its upload
        self.failures: dict[str, str] = {}
        self.num_clipped = 0
        self.num_sites: dict[Tower, int] = dict.fromkeys(REACHED_BY, 0)  # whose sum was revealed

    # ---- before training

    def agree(self, sites: Sequence[config.Site]) -> list[config.Site]:
        """Have the sites exchange keys and letters; returns those that did, ``failures`` says why others did not.

        Raises UpdateError where fewer than the threshold are left.
        """
        for name, values in self._ask("keys", {site.name: {} for site in sites}).items():
            self._try(name, self._take_keys, values)
        self._check_left(self._statements)
        roster = self._roster_values()
        for name, values in self._ask("shares", dict.fromkeys(self._statements, roster)).items():
            self._try(name, self._take_letters, values)
        self._check_left(self._letters)
        return [site for site in sites if site.name in self._letters]

    def part_of(self, site: str) -> ConfigRecord:
        """What a site's order to train holds beside the rest: whose masks to use, and the letters to this site."""
        members = sorted(self._letters)
        letters = [b"" if one == site else self._letters[one][site] for one in members]
        return ConfigRecord({"attempt": self._summing.attempt, "sites": members, "letters": letters})

    def _take_keys(self, site: str, values: ConfigRecord) -> None:
        signed = Signed(typed(values, "content", bytes), typed(values, "signature", bytes), typed(values, "signer", str))
        if self._books is not None and self._books.keys.get(site) != signed.signer:
            raise UpdateError("its keys are not signed by the key that it registered")
        statement = signed.opened(run=self._summing.run, round_number=self._summing.round_number, attempt=self._summing.attempt)
        towers = set(secure_sum.towers_of(self._streams[site]))
        studies = secure_sum.counted(self._stage, self._roster.studies[site])
        if (statement.site, statement.studies, set(statement.masks)) != (site, studies, towers):
            raise UpdateError("its keys are another site's, or not those of its towers and of the studies that it registered")
        self._signed[site], self._statements[site] = signed, statement

    def _roster_values(self) -> Told:
        signed = [self._signed[site] for site in sorted(self._signed)]
        return {
            "contents": [one.content for one in signed],
            "signatures": [one.signature for one in signed],
            "signers": [one.signer for one in signed],
        }

    def _take_letters(self, site: str, values: ConfigRecord) -> None:
        letters = {reader: typed(values, reader, bytes) for reader in values}
        if letters.keys() != self._statements.keys() - {site}:
            raise UpdateError("it has not written one letter to each other site")
        if any(len(letter) > MAX_LETTER_BYTES for letter in letters.values()):
            raise UpdateError(f"it wrote a letter of more than {MAX_LETTER_BYTES} bytes")
        self._letters[site] = letters

    # ---- masked uploads

    def take(self, message: Message, order: Order) -> None:
        """Add a site's masked words to the sums; nothing of the message is kept. Raises UpdateError if they do not fit."""
        site = order.site.name
        vectors, seal = messages.read_masked(message)
        if site in self._uploads or typed(seal, "attempt", str) != self._summing.attempt or len(seal) != 3:
            raise UpdateError("the masked update is of another attempt, or comes a second time")
        signature, num_clipped = typed(seal, "signature", bytes), typed(seal, "clipped", int)
        secure_keys.verify(self._signed[site].signer, signature, secure_keys.ROSTER, self._digest())
        mine = [tower for tower, cohort in self._cohorts().items() if site in cohort]
        sizes = {tower: sum(size for _, size in secure_sum.layout(order.shapes, tower)) for tower in mine}
        if vectors.keys() != sizes.keys() or not 0 <= num_clipped <= sum(sizes.values()):
            raise UpdateError("the masked update is not of the towers that it should be of")
        for tower, words in vectors.items():
            if words.dtype != np.dtype(np.uint32) or words.shape != (sizes[tower],):  # type: ignore[index]
                raise UpdateError("the masked update is not words of the right number")
        for tower in mine:
            total = self._sums.setdefault(tower, np.zeros(sizes[tower], np.uint32))
            np.add(total, vectors[tower], out=total)
        self._uploads[site] = signature
        self.num_clipped += num_clipped

    # ---- the sum

    def unmask(self) -> None:
        """Have the survivors reveal what takes the masks off each tower's sum that enough of them are in.

        Raises UpdateError where too few help, or a share is not one of what a site has signed.
        """
        sites = sorted(self._uploads)
        values: Told = {"sites": sites, "signatures": [self._uploads[site] for site in sites]}
        revealed: dict[Tower, dict[str, list[bytes]]] = {tower: {} for tower in REACHED_BY}
        expected = {
            tower: cohort for tower, cohort in self._cohorts().items() if len(self._alive(tower)) >= self._settings.threshold
        }
        for site, shares in self._ask("unmask", dict.fromkeys(sites, values)).items():
            for tower, cohort in expected.items():
                if site in cohort:
                    revealed[tower][site] = _shares(shares, tower, len(cohort))
        for tower in expected:
            self._take_masks_off(tower, revealed[tower])
            self.num_sites[tower] = len(self._alive(tower))

    def changes(self, shapes: Mapping[str, Size], reach: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 change of every parameter whose sum was revealed and that a site trained.

        The mean is over the survivors: their sum over their weights, times all weights of the sites that were agreed on.
        Raises UpdateError for a sum that its sites cannot have sent together: out of range, or longer than ``reach``, which is
        how far a round's steps can lead in each parameter group.
        """
        for tower, num_sites in self.num_sites.items():
            if num_sites:
                weights = secure_sum.weights(self._members(), tower, self._experiment.aggregation)
                left = sum(weights[site] for site in self._alive(tower))
                yield from self._means(tower, left, sum(weights.values()) / left, shapes, reach)

    def facts(self) -> dict[str, float]:
        """What metrics.jsonl tells of a round's secure sum; a tower with 0 sites stayed as it was."""
        counts = {f"secure_sum/sites/{tower}": float(number) for tower, number in self.num_sites.items()}
        return counts | {"secure_sum/clipped": float(self.num_clipped)}

    def count(self, totals: dict[str, float]) -> None:
        """Add this round to what the whole run reports of its secure sums."""
        add(totals, "secure_sum/rounds", 1.0)
        add(totals, "secure_sum/clipped", float(self.num_clipped))
        for tower, number in self.num_sites.items():
            kept, least = f"secure_sum/summed/{tower}", f"secure_sum/fewest/{tower}"
            add(totals, kept, float(number > 0))
            if number:
                totals[least] = min(totals.get(least, float(number)), float(number))

    def _means(
        self, tower: Tower, left: float, factor: float, shapes: Mapping[str, Size], reach: Mapping[str, float]
    ) -> Iterator[tuple[str, Tensor]]:
        num_sites, total, start = self.num_sites[tower], self._sums[tower], 0
        groups: dict[str, list[tuple[str, Words]]] = {}
        for name, size in secure_sum.layout(shapes, tower):
            groups.setdefault(group_of(name), []).append((name, total[start : start + size]))
            start += size
        for group, parts in groups.items():
            if not any(bool(words.any()) for _, words in parts):
                continue  # no site trained it, and the outer optimiser is to leave it be
            squared, count = 0.0, sum(words.size for _, words in parts)
            for name, words in parts:
                secure_sum.check_range(words, left, num_sites, self._settings)
                values = secure_sum.dequantise(words, factor, self._settings)
                squared += float(np.square(values, dtype=np.float64).sum())
                yield name, torch.from_numpy(values).reshape(shapes[name])
            rounded = factor * num_sites * secure_sum.step_of(self._settings) * count**0.5
            if squared**0.5 > reach[group] + rounded:
                raise UpdateError(f"{group}: the sum is longer than its sites' steps can lead; look at their data and rates")

    def _take_masks_off(self, tower: Tower, revealed: Mapping[str, Sequence[bytes]]) -> None:
        threshold, total = self._settings.threshold, self._sums[tower]
        if len(revealed) < threshold:
            raise UpdateError(f"{len(revealed)} sites helped to unmask the sum of the {tower} tower, {threshold} are needed")
        helpers = sorted(revealed)[:threshold]
        alive = self._alive(tower)
        for number, site in enumerate(self._cohorts()[tower]):
            secret = _combined([revealed[helper][number] for helper in helpers])
            if site in alive:
                if secure_sum.commitment(secret) != self._statements[site].seeds[tower]:
                    raise UpdateError(f"the shares of site {site}'s seed are not of the one that it committed itself to")
                secure_sum.add_stream(total, secret, -1)
                continue
            key = secure_keys.private_key(secret)
            if secure_keys.public_point(key) != self._statements[site].masks[tower]:
                raise UpdateError(f"the shares of site {site}'s key are not of the one that it signed")
            for other in alive:
                seed = secure_keys.shared_seed(key, self._statements[other].masks[tower])
                secure_sum.add_stream(total, seed, -secure_sum.sign_of(other, site))

    # ---- who

    def _members(self) -> list[Member]:
        return [Member(site, self._streams[site], self._statements[site].studies) for site in sorted(self._letters)]

    def _cohorts(self) -> dict[Tower, tuple[str, ...]]:
        return secure_sum.cohorts(self._members(), self._settings.threshold)

    def _alive(self, tower: Tower) -> list[str]:
        return [site for site in self._cohorts()[tower] if site in self._uploads]

    def _digest(self) -> bytes:
        return secure_keys.roster_digest(list(self._statements.values()), set(self._letters))

    def _check_left(self, left: Mapping[str, object]) -> None:
        if len(left) < self._settings.threshold:
            raise UpdateError(f"{len(left)} sites agreed on a secure sum, {self._settings.threshold} are needed")

    # ---- messages

    def _ask(self, phase: str, values: Mapping[str, Told]) -> dict[str, ConfigRecord]:
        """What the sites answer in a phase, by site in name order; ``failures`` has the others."""
        deadline_s = min(PHASE_S, self._experiment.federation.deadline_s)
        asked = []
        for site, told in sorted(values.items()):
            record = ConfigRecord({"attempt": self._summing.attempt, **told})
            asked.append(messages.phase_message(self._roster.nodes[site], phase, self._summing, record, deadline_s=deadline_s))
            if self._books is not None:
                self._books.asked(asked[-1], site, self._summing.run, round_number=self._summing.round_number)
        sites = {self._roster.nodes[site]: site for site in values}
        answers: dict[str, ConfigRecord] = {}
        silent = set(values)
        for message in self._grid.send_and_receive(asked, timeout=deadline_s):
            site = sites.get(message.metadata.src_node_id, "")
            if site in silent:
                silent.discard(site)
                self._try(site, self._read, message, phase, answers)
        self.failures |= dict.fromkeys(silent, f"no reply before the deadline of a secure sum's phase ({phase})")
        return dict(sorted(answers.items()))

    def _read(self, site: str, message: Message, phase: str, answers: dict[str, ConfigRecord]) -> None:
        head, why = "", None
        try:
            answers[site], head = messages.read_phase(message, phase, site, self._summing)
        except UpdateError as error:
            why = str(error)
            raise
        finally:
            if self._books is not None:
                number = self._summing.round_number
                self._books.answered(message, site, self._summing.run, head=head, why=why, round_number=number)

    def _try(self, site: str, job: Callable[..., None], *values: object) -> None:
        """Do something with what a site sent; if it does not fit, the site has failed and nobody else."""
        try:
            job(site, *values)
        except UpdateError as error:
            self.failures[site] = str(error)


def privacy_of(experiment: config.Experiment, totals: Mapping[str, float]) -> dict[str, Any]:
    """What report.json's privacy says of secure sums; nothing where updates come as they are.

    ``towers``: by tower, in how many rounds its sum was revealed, and over how few sites at least.
    """
    settings = experiment.secure_sum
    if settings is None:
        return {}
    towers = {
        tower: {
            "rounds": int(totals.get(f"secure_sum/summed/{tower}", 0)),
            "fewest_sites": int(totals.get(f"secure_sum/fewest/{tower}", 0)),
        }
        for tower in REACHED_BY
    }
    said = {
        "threshold": settings.threshold,
        "clip": settings.clip,
        "bits": settings.bits,
        "step": secure_sum.step_of(settings),
        "rounds": int(totals.get("secure_sum/rounds", 0)),
        "clipped": int(totals.get("secure_sum/clipped", 0)),
        "towers": towers,
        "switched_off": list(SWITCHED_OFF),
    }
    return {"secure_sum": said}


def _shares(record: ConfigRecord, tower: Tower, number: int) -> list[bytes]:
    """A site's shares of a tower. Raises UpdateError unless they are as many, and as long, as shares are."""
    shares = typed(record, tower, list)
    if len(shares) != number or not all(isinstance(share, bytes) and len(share) in SHARE_BYTES for share in shares):
        raise UpdateError("a site revealed something else than one share of each site")
    return shares


def _combined(shares: Sequence[bytes]) -> bytes:
    """The secret that shares are of. Raises UpdateError where they are of none."""
    try:
        if len({len(share) for share in shares}) != 1:
            raise ValueError
        return combine_shares(list(shares))
    except ValueError:
        raise UpdateError("the shares that were revealed do not fit together") from None
