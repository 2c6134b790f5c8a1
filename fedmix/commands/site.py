"""`fedmix site`: a hospital's end of a federation, from nothing to joined, and what left since."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import out_console
from fedmix.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from client.approval import Review
    from client.home import Home
    from fedmix import config

site_app = typer.Typer(
    no_args_is_help=True,
    help="A hospital's end: set up, approve plans, run the agent, see what left.\n\nExample:  fedmix site doctor",
)
audit_app = typer.Typer(no_args_is_help=True, help="Check ledgers.\n\nExample:  fedmix site audit verify")
site_app.add_typer(audit_app, name="audit")

HomeOption = Annotated[Path, typer.Option("--home", help="the site's home folder")]
DEFAULT_HOME = Path("fedmix-site")


@site_app.command("init")
def init(
    name: Annotated[str, typer.Argument(help="the site's name, as the coordinator registers it")],
    coordinator: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the coordinator listens")],
    ca: Annotated[Path, typer.Option(help="the coordinator's ca.crt, got from a person you know")],
    shard: Annotated[Path, typer.Option(help="the prepared shard to train on")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="loopback port between the agent's programs; 0 is any")] = 0,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Make a site's home: a key pair, a policy to read and change, a ledger, a systemd unit for the agent.

    Example:  fedmix site init west --coordinator fedmix.example.org:9443 --ca ca.crt --shard shards/west
    """
    from client import home as homes
    from fedmix.deployment.fingerprint import fingerprint

    try:
        certificate = ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the coordinator's certificate authority: {error.strerror}") from None
    made = homes.create(home, homes.settings_of(name, coordinator, shard.absolute(), port), certificate)
    _say(f"wrote {made.folder}")
    read_out = fingerprint(made.public_key.read_text())
    _say(f"1. send {made.public_key} to the coordinator, and read out its fingerprint: {read_out}")
    _say(f"2. read {made.policy_file} and make it yours")
    _say("3. fedmix site doctor")
    _say(f"4. fedmix site start; as a service that starts with this machine: see {made.folder / 'systemd'}")


@site_app.command("doctor")
def doctor(home: HomeOption = DEFAULT_HOME) -> None:
    """Look for what could keep this site from taking part, and say how to mend it; exit code 1 if something could.

    Nobody but the coordinator is asked: its name, port, certificate and clock.

    Example:  fedmix site doctor --home fedmix-site
    """
    from client.doctor import examine

    num_bad = 0
    for finding in examine(_home(home)):
        mark = Text("ok  ", style="green") if finding.is_fine else Text("BAD ", style="bold red")
        out_console.print(Text.assemble(mark, f"{finding.what}: {finding.said}"), soft_wrap=True)
        if finding.mend:
            out_console.print(Text(f"    mend: {finding.mend}"), soft_wrap=True)
        num_bad += not finding.is_fine
    if num_bad:
        _say(f"{num_bad} to mend")
        raise typer.Exit(1)


@site_app.command("review")
def review(plan: Annotated[Path, typer.Argument(metavar="PLAN")], home: HomeOption = DEFAULT_HOME) -> None:
    """Say in plain words what a plan would do at this site; exit code 1 if it could not be approved.

    Example:  fedmix site review plan.yaml
    """
    from client import approval

    found = approval.review(_home(home), plan)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a digest is of use only whole
    for what, said in _reviewed(found):
        table.add_row(Text(what), Text(said))
    out_console.print(table)
    for why in found.hindrances:
        _say(f"it cannot be approved: {why}")
    if found.hindrances:
        raise typer.Exit(1)
    _say(f"if you agree: fedmix site approve {plan}")


@site_app.command("approve")
def approve(plan: Annotated[Path, typer.Argument(metavar="PLAN")], home: HomeOption = DEFAULT_HOME) -> None:
    """Let a plan run here, in exactly these bytes.

    Example:  fedmix site approve plan.yaml
    """
    from client import approval

    _say(f"approved {approval.approve(_home(home), plan)}")


@site_app.command("deny")
def deny(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="the plan's file, or its digest")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Refuse a plan for good; one that was approved ends at its next message.

    Example:  fedmix site deny plan.yaml
    """
    from client import approval

    _say(f"denied {approval.deny(_home(home), plan)}")


@site_app.command("pause")
def pause(home: HomeOption = DEFAULT_HOME) -> None:
    """Let nothing begin and nothing leave, at once; a round that is going on ends with a refusal.

    Example:  fedmix site pause
    """
    site = _home(home)
    site.paused_file.touch()
    site.ledger().append("paused")
    _say("paused; `fedmix site resume` ends that")


@site_app.command("resume")
def resume(home: HomeOption = DEFAULT_HOME) -> None:
    """End a pause.

    Example:  fedmix site resume
    """
    site = _home(home)
    site.ledger().append("resumed")
    site.paused_file.unlink(missing_ok=True)
    _say("resumed")


@site_app.command("start")
def start(home: HomeOption = DEFAULT_HOME) -> None:
    """Run the agent until Ctrl-C or SIGTERM: it dials the coordinator, and waits where it is not registered yet.

    Example:  fedmix site start --home fedmix-site
    """
    from client import agent

    def say(sentence: str) -> None:
        out_console.print(Text(f"{datetime.now(UTC):%H:%M:%S} {sentence}"), soft_wrap=True)

    agent.run(_home(home), say)


@site_app.command("ledger")
def ledger(
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="every entry as it stands, one JSON line each")] = False,
) -> None:
    """List what came and what left, and the sums by plan.

    Example:  fedmix site ledger --json
    """
    entries = list(_home(home).ledger().entries())
    if as_json:
        sys.stdout.writelines(json.dumps(entry) + "\n" for entry in entries)
        return
    table = Table("time (UTC)", "event", "message", "round", "bytes", "tensors", "norm", "why", box=None)
    for entry in entries:
        table.add_row(*(Text(said) for said in _row(entry)))
    out_console.print(table)
    for plan, sent in _sums(entries).items():
        _say(f"plan {plan[:12]}: {len(sent)} messages left, {sum(entry['bytes'] for entry in sent)} bytes")


@audit_app.command("verify")
def verify(
    home: HomeOption = DEFAULT_HOME,
    peer: Annotated[Path | None, typer.Option(help="the coordinator's ledger.jsonl, which holds heads of this one")] = None,
) -> None:
    """Check the ledger from its first entry to its last; with the coordinator's, that its tail was not cut off.

    Example:  fedmix site audit verify --peer coordinator-ledger.jsonl
    """
    from fedmix.deployment import ledger as ledgers

    site = _home(home)
    found = ledgers.verify(site.ledger_file, peer=peer, name=site.settings().name)
    if not found.entries:
        raise LedgerError(
            "the ledger is gone: its first entry was written with this home; put back the newest copy that verifies"
        )
    held = "" if peer is None else ", and every head that the peer wrote down is in it"
    _say(f"whole: {found.entries} entries, head {found.head}{held}")


def _say(sentence: str) -> None:
    out_console.print(Text(sentence), soft_wrap=True)


def _home(folder: Path) -> Home:
    """The site's home; raises ConfigError where there is none."""
    from client.home import Home as Folder

    if not folder.is_dir():
        raise ConfigError(f"there is no site's home at {folder}; make one with `fedmix site init`, or name it with --home")
    return Folder(folder.absolute())


def _reviewed(found: Review) -> list[tuple[str, str]]:
    """A review line by line."""
    plan = found.plan
    same = {True: "the same as here", False: "NOT the same as here"}
    leaving = f"{len(found.groups)} parameter groups: {', '.join(found.groups)}" if found.groups else "nothing"
    total = found.bytes_a_round * found.rounds
    return [
        ("plan", f"{plan.name}, made {plan.created:%Y-%m-%d} by {plan.coordinator}, valid until {plan.valid_until}"),
        ("digest of its bytes", found.digest),
        ("code", f"{plan.code}, {same[found.is_same_code]}"),
        ("libraries", f"{plan.lock}, {same[found.is_same_lock]}"),
        *(("", other) for other in found.other_versions),
        ("sites", ", ".join(plan.sites)),
        (
            "this site",
            f"trains on {found.stream} studies in {found.rounds} round{'s' if found.rounds != 1 else ''}"
            if found.stream
            else "is not named in it",
        ),
        ("leaves in a round", f"the change of {leaving}"),
        ("", "losses as sums, the number of studies processed, when training began and ended"),
        *(("leaves at the end", sentence) for sentence in _scored(found)),
        (
            "bytes of weights",
            f"{found.bytes_a_round} a round at most, {total} in all, repeated rounds apart; a message adds some 10 kB and more",
        ),
        ("never leaves", "images, reports, labels, names, identifiers, paths"),
        ("privacy", _protected(plan.resolved().privacy)),
        ("", _summed(plan.resolved().secure_sum)),
    ]


def _scored(found: Review) -> Iterator[str]:
    """What a plan asks this site to measure on its own held-out patients."""
    if found.scores:
        kept = ", which this site's policy does not let leave" if found.keeps_scores else ""
        yield f"the last model's scores on patients that this site never trains on, as sums: {', '.join(found.scores)}{kept}"


def _protected(privacy: config.Privacy) -> str:
    """What a plan does against updates that tell of patients."""
    if privacy.mode == "none":
        return "updates are not noised: who sees them can learn of training data"
    budget = "no limit" if privacy.epsilon is None else f"epsilon {privacy.epsilon:g}"
    kinds = {
        "dp": "DP-SGD, patients as the unit",
        "noisy_updates": "whole updates noised here, this site as the unit",
        "central_noise": "sums noised at the coordinator, who sees this site's updates, this site as the unit",
    }
    over = "the run" if privacy.mode == "central_noise" else "all plans"
    return f"{kinds[privacy.mode]}: {budget} at delta {privacy.delta:g} over {over}"


def _summed(secure: config.SecureSum | None) -> str:
    """What a plan lets the coordinator see of updates."""
    if secure is None:
        return "updates are not summed in secret: the coordinator sees this site's own"
    return (
        f"updates are summed in secret: the coordinator sees sums of {secure.threshold} sites or more, with changes cut to "
        f"{secure.clip:g}; other sites are known by the keys that the plan names"
    )


def _row(entry: dict[str, Any]) -> list[str]:
    groups, norm = entry.get("groups"), entry.get("norm")
    return [
        str(entry["time"])[:19],
        str(entry["event"]),
        str(entry.get("kind") or ""),
        str(entry.get("round") or ""),
        str(entry.get("bytes", "")),
        str(sum(groups.values())) if groups else "",
        f"{norm:.3g}" if norm is not None else "",
        str(entry.get("why", "")),
    ]


def _sums(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What left, by plan."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["event"] == "sent":
            found.setdefault(entry["plan"], []).append(entry)
    return found
