"""A hospital's home over the shard of one of the little federation's sites, and what its agent answers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from little import World, wired

from client import approval, home
from client.app import build_app, from_node_config
from client.home import Home, Settings
from fedmix.deployment import plan as plans
from server import messages as server_messages

COORDINATOR = "fedmix.example:9092"


def hospital(folder: Path, world: World, site: str = "west", **policy: Any) -> Home:
    """A home that has joined nothing yet; its policy lets the little federation's few studies take part."""
    settings = Settings(name=site, coordinator=COORDINATOR, shard=world.shards[site].absolute())
    made = home.create(folder, settings, b"no certificate")
    set_policy(made, **policy)
    return made


def set_policy(made: Home, **changes: Any) -> None:
    """Write a policy of the defaults but for some changes."""
    made.policy_file.write_text(yaml.safe_dump({"min_studies": 5} | changes))


def written_plan(folder: Path, world: World, *, name: str = "plan.yaml", **changes: Any) -> Path:
    """A plan of the little experiment over all its sites, some of its fields changed."""
    sites = [site.name for site in world.experiment.data.sites]
    plan = plans.Plan.of(world.experiment, sites, coordinator=COORDINATOR, valid_days=30)
    plans.write(plan.model_copy(update=changes), folder / name)
    return folder / name


def approved(made: Home, path: Path) -> str:
    """The digest of a plan that the home has approved."""
    return approval.approve(made, path)


def answer(made: Home, message: Message) -> Message:
    """What the agent answers."""
    message.metadata.__dict__["_message_id"] = "1"
    node_config: Any = {"site": made.settings().name, "home": str(made.folder)}
    context = Context(run_id=7, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
    return wired(build_app(from_node_config)(wired(message), context))


def refused(made: Home, message: Message) -> str:
    """Why the agent refuses a message, as the coordinator shows it."""
    said = answer(made, message)
    assert said.has_error()
    return server_messages.reason(said)


def query(plan: str, world: World) -> Message:
    """The server's question who is there."""
    asked = {"fingerprint": world.experiment.fingerprint(), "plan": plan}
    return Message(RecordDict({"query": ConfigRecord(asked)}), 2, "query")
