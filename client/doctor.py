"""What could keep this site from taking part, looked for before it does; each finding says how to mend it.

The coordinator is the only machine that is asked anything: its name, its port, its certificate, and the time it has.
"""

from __future__ import annotations

import ctypes
import datetime
import email.utils
import http.client
import shutil
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from client import agent
from client.home import Home, Settings
from fedmix.data import inspection
from fedmix.data.shard import Shard
from fedmix.deployment import ledger
from fedmix.deployment import plan as plans
from fedmix.deployment.environment import LOOPBACK
from fedmix.disk import reason_of
from fedmix.errors import DataError, FedmixError

TIMEOUT_S = 10.0
AHEAD_S, BEHIND_S = 5.0, 305.0  # what Flower 1.41 takes of a SuperNode's clock against its own
EXPIRY_DAYS = 30
MIN_DISK_BYTES, MIN_MEMORY_BYTES = 5 << 30, 2 << 30
FLOWER = "1.41.0"
TIME_ERROR = 5  # what adjtimex says of a clock that nothing keeps


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, what was found, and how to mend it where that is needed."""

    what: str
    is_fine: bool
    said: str
    mend: str = ""


def examine(home: Home) -> Iterator[Finding]:
    """Look at everything, one finding after the other; what depends on something that is not fine is left out."""
    yield from _files(home)
    try:
        settings = home.settings()
    except FedmixError:
        return
    yield _versions()
    yield _disk(home)
    yield _memory()
    yield _shard(home, settings)
    yield _port(home, settings)
    yield _agent(home)
    yield _proxy(settings)
    yield from _link(home, settings)


def _files(home: Home) -> Iterator[Finding]:
    yield _asked("settings", lambda: f"site {home.settings().name}", "write site.yaml as `fedmix site init` does")
    yield _asked("policy", lambda: _policy(home), "mend policy.yaml; until then nothing leaves")
    mend = "put the newest copy of ledger.jsonl and ledger.head back, and tell the coordinator"
    yield _asked("ledger", lambda: f"whole, {ledger.verify(home.ledger_file).entries} entries", mend)
    yield _key(home)
    yield from _plans(home)


def _asked(what: str, ask: Callable[[], str], mend: str) -> Finding:
    """A finding about something that raises a FedmixError where it is not fine."""
    try:
        return Finding(what, True, ask())
    except FedmixError as error:
        return Finding(what, False, str(error), mend)


def _policy(home: Home) -> str:
    home.policy()
    return "understood; this site is paused, `fedmix site resume` ends that" if home.is_paused else "understood"


def _key(home: Home) -> Finding:
    try:
        mode = home.key.stat().st_mode & 0o777
    except OSError as error:
        return Finding("key", False, reason_of(error), "put the key back, or make a new home and have its key registered")
    if mode & 0o077:
        return Finding("key", False, f"others may read it (mode {mode:o})", f"chmod 600 {home.key}")
    return Finding("key", True, "readable by its owner alone")


def _plans(home: Home) -> Iterator[Finding]:
    """Approved plans that could no longer run."""
    for path in sorted(home.plans.glob("*.yaml")):
        what = f"plan {path.stem[:12]}"
        try:
            plan = plans.read(path)
            if plans.digest(path) != path.stem:
                yield Finding(what, False, "its file was changed after it was approved", "approve the coordinator's file anew")
            elif not plan.is_valid_on(datetime.datetime.now(datetime.UTC).date()):
                yield Finding(what, True, f"{plan.name}, was valid until {plan.valid_until}; it is over")
            elif plan.code != plans.code_hash():
                mend = f"install fedmix {plan.versions.get('fedmix', '')} as the coordinator has it, or ask for a new plan"
                yield Finding(what, False, f"{plan.name} was written for another fedmix than the one here", mend)
            else:
                yield Finding(what, True, f"{plan.name}, valid until {plan.valid_until}")
        except FedmixError as error:
            yield Finding(what, False, str(error), f"fedmix site deny {path.stem}")


# ---- this machine


def _versions() -> Finding:
    found = {name: metadata.version(name) for name in ("fedmix", "flwr", "torch")}
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    if found["flwr"] != FLOWER:
        return Finding("versions", False, said, f"install flwr {FLOWER}: its messages change with every version")
    return Finding("versions", True, said)


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.folder).free
    said = f"{free / (1 << 30):.1f} GiB free"
    if free < MIN_DISK_BYTES:
        return Finding("disk", False, said, f"make room: a round keeps several copies of the model, {MIN_DISK_BYTES >> 30} GiB")
    return Finding("disk", True, said)


def _memory() -> Finding:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    said = f"{free / (1 << 30):.1f} GiB available"
    if free < MIN_MEMORY_BYTES:
        return Finding("memory", False, said, f"have {MIN_MEMORY_BYTES >> 30} GiB to spare on this machine")
    return Finding("memory", True, said)


def _shard(home: Home, settings: Settings) -> Finding:
    mend = "prepare the shard again with `fedmix prepare`, or name another in site.yaml"
    try:
        shard = Shard.open(settings.shard)
        counts = {stream: count for stream, count in inspection.declaration(shard).streams.items() if count}
        fewest = home.policy().min_studies
    except (DataError, OSError) as error:
        return Finding("shard", False, str(error) if isinstance(error, DataError) else reason_of(error), mend)
    except FedmixError:
        return Finding("shard", True, "whole; how many studies the policy asks for is not known")
    most = max((len(shard.select("train", stream)) for stream in ("image", "text", "paired")), default=0)
    said = "whole, " + ", ".join(f"{count} {stream} studies" for stream, count in counts.items())
    if most < fewest:
        return Finding("shard", False, f"{said}, {most} for training", f"the policy asks for {fewest}: min_studies")
    return Finding("shard", True, said)


def _port(home: Home, settings: Settings) -> Finding:
    if not settings.port:
        return Finding("port", True, "any that is free")
    if agent.is_running(home):
        return Finding("port", True, f"{settings.port} is this site's agent's, which runs")
    try:
        with socket.create_server((LOOPBACK, settings.port)):
            return Finding("port", True, f"{settings.port} is free")
    except OSError as error:
        return Finding("port", False, f"{settings.port}: {reason_of(error)}", "set port to 0 in site.yaml for any that is free")


def _agent(home: Home) -> Finding:
    """What a running agent says of the coordinator, which knows what no look from outside shows: whether the key is known."""
    standing = agent.standing(home)
    if standing is None:
        return Finding("agent", True, "does not run; `fedmix site start` starts it")
    return Finding("agent", not standing.mend, standing.said, standing.mend)


def _proxy(settings: Settings) -> Finding:
    proxy = urllib.request.getproxies_environment().get("https")
    if not proxy or urllib.request.proxy_bypass(settings.host):
        return Finding("proxy", True, "none; the coordinator is dialled directly")
    return Finding(
        "proxy",
        False,
        "HTTPS_PROXY is set, so the agent would dial the coordinator through the proxy, which may break TLS open",
        f"allow the connection in the firewall and add {settings.host} to NO_PROXY for the agent",
    )


# ---- the coordinator


def _link(home: Home, settings: Settings) -> Iterator[Finding]:
    """Its name, its port, its certificate and its clock, as far as each can be reached."""
    host, port = settings.host, settings.link_port
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError:
        mend = "ask the coordinator for the right name, or have your DNS or /etc/hosts know it"
        yield Finding("name", False, f"{host} is not found", mend)
        return
    yield Finding("name", True, f"{host} is {', '.join(addresses)}")
    try:
        socket.create_connection((host, port), TIMEOUT_S).close()
    except OSError as error:
        mend = f"let this machine connect out to {host} TCP {port} in your firewall, and ask whether the coordinator is up"
        yield Finding("connection", False, f"{host} port {port}: {reason_of(error)}", mend)
        return
    yield Finding("connection", True, f"port {port} answers")
    yield from _certificate(home, host, port)


def _certificate(home: Home, host: str, port: int) -> Iterator[Finding]:
    try:
        context = ssl.create_default_context(cafile=str(home.ca))
    except OSError:
        yield Finding("certificate", False, "ca.crt is no certificate", "ask the coordinator for its ca.crt again")
        return
    link = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        link.connect()
        assert isinstance(link.sock, ssl.SSLSocket)
        yield _expiry(link.sock)
        before = time.time()
        link.request("HEAD", "/")
        date = link.getresponse().getheader("Date")
        yield clock((before + time.time()) / 2, date)
    except ssl.SSLCertVerificationError as error:
        yield Finding("certificate", False, error.verify_message, _meaning(error).mend)
    except (OSError, http.client.HTTPException) as error:
        mend = "is a TLS proxy or another service at this port? Ask the coordinator which port it is"
        yield Finding("certificate", False, f"no TLS is spoken there: {type(error).__name__}", mend)
    finally:
        link.close()


def _meaning(error: ssl.SSLCertVerificationError) -> agent.Meaning:
    """Why a certificate is not taken; any other cause than a known one is that ca.crt does not vouch for it."""
    return agent.MEANINGS[agent.known_words(str(error)) or "CERTIFICATE_VERIFY_FAILED"]


def _expiry(link: ssl.SSLSocket) -> Finding:
    certificate = link.getpeercert() or {}
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400
    said = f"fits ca.crt and the name, {link.version()}, {days:.0f} days left"
    return Finding("certificate", True, said if days >= EXPIRY_DAYS else f"{said}: tell the coordinator to renew it soon")


def clock(own: float, date: str | None, *, is_kept: bool | None = None) -> Finding:
    """This machine's time (seconds since 1970) against the coordinator's Date header, which counts whole seconds.

    ``is_kept``: whether something keeps this machine's clock right; the system is asked if left out. With it a wrong clock
    can be told from a right one, without asking a third machine.
    """
    try:
        theirs = email.utils.parsedate_to_datetime(date or "").timestamp() + 0.5
    except ValueError:
        return Finding("clock", False, "the coordinator does not say its time", "is another service at this port?")
    ahead = own - theirs
    said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if -BEHIND_S + 5 < ahead < AHEAD_S - 1:
        return Finding("clock", True, said)
    if _is_kept() if is_kept is None else is_kept:
        mend = "a time service keeps this machine's clock, so the coordinator's is probably the wrong one: tell it"
    else:
        mend = "no time service keeps this machine's clock, so it is probably the wrong one: switch on NTP (chrony, timesyncd)"
    return Finding("clock", False, f"{said}; Flower takes {AHEAD_S:.0f} s ahead to {BEHIND_S:.0f} s behind", mend)


def _is_kept() -> bool:
    """Whether the kernel says that its clock is synchronised (adjtimex)."""
    asked = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; all zeros ask and change nothing
    return int(ctypes.CDLL(None, use_errno=True).adjtimex(asked)) not in (-1, TIME_ERROR)
