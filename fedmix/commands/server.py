"""`fedmix server`: a coordinator's machine, from nothing to a run over real sites."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedmix.commands.consoles import out_console
from fedmix.commands.screen import Screen
from fedmix.errors import ConfigError, RunError

if TYPE_CHECKING:
    from server.home import Home
    from server.standing import Standing

server_app = typer.Typer(
    no_args_is_help=True,
    help="Coordinate runs over hospitals: keys, plans, rounds, reports.\n\nExample:  fedmix server init --host hub.example.org",
)

Place = Annotated[Path, typer.Option("--home", help="the coordinator's folder")]
HOME = Path("fedmix-server")
PORT = 9443


@server_app.command("init")
def init(
    host: Annotated[str, typer.Option(help="the name or address that sites dial")],
    home: Place = HOME,
    port: Annotated[int, typer.Option(min=1, max=65535, help="for sites; the only one to open in the firewall")] = PORT,
    control_port: Annotated[int | None, typer.Option(help="for these commands, on 127.0.0.1; the next one if left out")] = None,
    health_port: Annotated[
        int | None, typer.Option(help="for health checks (grpc.health.v1), on 127.0.0.1; the one after that if left out")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="address to take sites' calls on; every one of this machine, or 127.0.0.1 for localhost")
    ] = None,
) -> None:
    """Make a coordinator's folder: certificate authority, server certificate, settings, a systemd unit and a compose file.

    Hand its ca.crt to every site. Nothing is started and nothing is sent.

    Example:  fedmix server init --host hub.example.org
    """
    from pydantic import ValidationError

    from server import coordinator
    from server.home import Home, Settings, is_loopback

    try:
        settings = Settings(
            host=host,
            listen=listen or ("127.0.0.1" if is_loopback(host) else "0.0.0.0"),
            port=port,
            control_port=control_port or port + 1,
            health_port=health_port or port + 2,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: {first['msg'].lower()}") from None
    coordinator.init(Home(home), settings)
    _say(f"{home} is ready; give {home / 'ca.crt'} to every site, which dials {settings.address}")
    _say(f"next: fedmix server register SITE --key key.pub --home {home}, and: fedmix server start --home {home}")


@server_app.command("register")
def register(
    site: Annotated[str, typer.Argument(metavar="SITE", help="its name, as in data.sites")],
    key: Annotated[Path, typer.Option(help="the key.pub that the site's `fedmix site init` made")],
    home: Place = HOME,
) -> None:
    """Let a site connect, under this name and with this key. Compare the key with the site over another channel first.

    Repeating it changes nothing. To take a site off, remove its file from sites/ and start again.

    Example:  fedmix server register north --key north/key.pub
    """
    at = _home(home)
    from fedmix.deployment.fingerprint import fingerprint
    from server import coordinator

    is_new = at.register(site, key)
    _say(f"the key's fingerprint, which the site should read out to you: {fingerprint(key.read_text())}")
    if coordinator.running(at) is None:
        _say(f"{site} is {'kept' if is_new else 'known'}, and is let in when the coordinator starts")
        return
    from server import serving

    for change in serving.register_pending(at):
        _say(change)
    _say(f"{site} may connect")


@server_app.command("start")
def start(home: Place = HOME) -> None:
    """Take calls from registered sites until Ctrl-C, SIGTERM or `fedmix server stop`; what ends by itself is started again.

    Example:  fedmix server start
    """
    at = _home(home)
    from server import serving

    serving.start(at, say=_say)


@server_app.command("plan")
def plan(
    experiment_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="experiment as YAML")],
    sites: Annotated[str, typer.Option(help="who takes part, comma-separated, of the experiment's data.sites")],
    out: Annotated[Path, typer.Option(help="the plan's file, for the sites to review and approve")],
    home: Place = HOME,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one value")] = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="days that it may be run")] = 30,
) -> None:
    """Write the plan of a run: what would happen at each site, with which code, until when. Each site approves these bytes.

    Example:  fedmix server plan configs/smoke.yaml --sites north,south,west --out plan.yaml
    """
    at, names = _home(home), [name.strip() for name in sites.split(",") if name.strip()]
    from fedmix import config
    from server import planning

    agreed = planning.make_plan(at, config.load(experiment_file, overrides or []), names, out=out, valid_days=days)
    _say(f"{out}: {agreed.plan.name} over {', '.join(agreed.plan.sites)} until {agreed.plan.valid_until}")
    _say(f"its SHA-256, which sites should read back to you: {agreed.digest}")
    if missing := sorted(set(agreed.plan.sites) - set(at.registered())):
        _say(f"not registered yet: {', '.join(missing)}")


@server_app.command("run")
def run(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="what `fedmix server plan` wrote")],
    home: Place = HOME,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that ended, or follow one")] = False,
) -> None:
    """Run a plan over the sites on its list and no others, show its rounds, evaluate the model and write the report.

    Ctrl-C stops the run after what is committed. If only this terminal goes away, the run goes on: follow it with --resume.

    Example:  fedmix server run plan.yaml
    """
    at = _home(home)
    from server import planning

    agreed = planning.read_plan(at, plan_file)
    from fedmix.report.summary import read_report
    from fedmix.report.terminal import LiveView, final_table, remarks
    from server import running

    with LiveView(out_console) as live:
        page = running.run(at, agreed, resume=resume, view=Screen(live))
    report = read_report(page.parent)
    out_console.print(final_table(report), *remarks(report), sep="\n")
    _say(f"report: {page}")


@server_app.command("status")
def status(home: Place = HOME) -> None:
    """Say whether the coordinator serves, which sites are online, and how runs stand; exit code 0 if it serves.

    Example:  fedmix server status
    """
    at = _home(home)
    from server.standing import standing

    found = standing(at)
    settings = at.settings()
    _say(f"{'serving' if found.is_healthy else 'not serving'} {settings.address}; server.crt ends on {found.certificate_ends}")
    for table in _tables(found):
        out_console.print(table)
    if not found.is_healthy:
        raise RunError(f"the SuperLink is not healthy; start it with: fedmix server start --home {home}")


@server_app.command("stop")
def stop(home: Place = HOME) -> None:
    """Stop runs, which go on with --resume later, and then the coordinator.

    Example:  fedmix server stop
    """
    at = _home(home)
    from server import serving

    serving.stop(at, say=_say)
    _say("stopped")


def _tables(found: Standing) -> list[Table]:
    sites, runs = Table(title="sites", box=None), Table(title="runs", box=None)
    for column in ("site", "state", "last came online", "answer received"):
        sites.add_column(column)
    if not found.sites:
        sites.add_row("none yet; `fedmix server register` lets one in")
    for site in found.sites:
        sites.add_row(Text(site.name), site.state, Text(site.seen), str(site.arrival or ""))
    for column in ("run", "state", "rounds", "last error"):
        runs.add_column(column)
    for one in found.runs:
        runs.add_row(Text(one.name), one.state, str(one.rounds), Text(one.last_error))
    return [sites, *([runs] if found.runs else [])]


def _home(folder: Path) -> Home:
    """The coordinator's folder, with this process set up as Flower's own are before Flower is imported."""
    from fedmix.deployment.environment import flower_environment
    from server.home import Home

    home = Home(folder)
    home.settings()
    wanted: Mapping[str, str] = flower_environment(home.flower("user"))
    os.environ.update(wanted)
    return home


def _say(sentence: str) -> None:
    out_console.print(Text(sentence), soft_wrap=True)
