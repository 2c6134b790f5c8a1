"""The ClientApp at a site: what it greets with, what it trains, and what it refuses without saying too much."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from little import World, values, wired

from client import app as client_app
from client.app import Place, build_app, from_node_config
from client.state import OptimiserStore
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError
from fedmix.federation.update import digest
from server import messages as server_messages
from server.rounds import for_stream

RUN = "little-000000000000"


@pytest.fixture
def world(tmp_path: Path) -> World:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    return World(tmp_path, values(tmp_path))


def ask(place: Place, message: Message) -> Message:
    """What the site's app answers."""
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=7, node_id=2, node_config={}, state=RecordDict(), run_config={})
    return wired(build_app(lambda context: place)(wired(message), context))


def refused(place: Place, message: Message) -> str:
    answer = ask(place, message)
    assert answer.has_error()
    return server_messages.reason(answer)


def order(world: World, stream: str, **changes: Any) -> Message:
    """A first order; ``changes`` replace fields of it."""
    parameters = for_stream(world.initial(), stream)  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "run": RUN,
        "round_number": 1,
        "fingerprint": world.experiment.fingerprint(),
        "base": digest(parameters),
        "parameters": parameters,
    }
    content, _ = server_messages.order_content(**(fields | changes))
    return server_messages.order(2, content, round_number=1, deadline_s=10.0)


# ---- greeting


def test_a_site_says_who_it_is_and_what_it_holds(world: World) -> None:
    greeting = server_messages.read_greeting(ask(world.places[2], server_messages.query(2)))
    assert (greeting.site, greeting.stream, greeting.studies) == ("west", "paired", 24)
    assert greeting.fingerprint == world.experiment.fingerprint()


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


MEMBERS = ("shard.json", "studies.parquet", "images.npy", "tokens.npy", "offsets.npy", "quarantine.jsonl")
DAMAGE = [(member, damage) for member in MEMBERS for damage in (change, cut_short, Path.unlink)]
DAMAGE.remove(("quarantine.jsonl", cut_short))  # nothing was left out of phantoms, so it is empty


@pytest.mark.parametrize(("member", "damage"), DAMAGE)
def test_a_damaged_member_is_named_and_the_place_of_the_shard_is_not(
    member: str, damage: Callable[[Path], None], world: World, tmp_path: Path
) -> None:
    place = world.places[2]
    damage(place.shard / member)
    why = refused(place, server_messages.query(2))
    assert why.startswith(f"site west: shard member {member} ")
    assert why.endswith("prepare the shard again")
    assert str(tmp_path) not in why


def test_a_missing_shard_is_said(world: World, tmp_path: Path) -> None:
    shutil.rmtree(world.places[0].shard)
    why = refused(world.places[0], server_messages.query(2))
    assert why.startswith("site north: there is no shard folder")
    assert str(tmp_path) not in why


def test_a_shard_of_another_stream_is_refused_with_what_it_holds(world: World) -> None:
    why = refused(replace(world.places[0], shard=world.places[1].shard), server_messages.query(2))
    assert why == (
        "site north: it is to train on image studies, but its shard's training split holds none (24 text over all splits); "
        "give it the stream it holds, or another shard"
    )


def test_a_shard_of_another_image_size_is_refused(world: World, tmp_path: Path) -> None:
    wanted = values(tmp_path)
    wanted["data"]["image_size"] = 60
    other = World(tmp_path / "other", wanted)
    why = refused(replace(world.places[0], shard=other.places[0].shard), server_messages.query(2))
    assert why == ("site north: its shard holds images of 60 px, the experiment wants 48; prepare it again with --size 48")


def test_a_shard_of_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    own = tmp_path / "tokenizer.json"
    own.write_text((Path(client_app.__file__).parents[1] / "fedmix/data/tokenizer.json").read_text() + "\n")
    wanted = values(tmp_path)
    wanted["data"]["tokenizer"] = str(own)
    other = World(tmp_path / "other", wanted)
    assert "prepared with another tokenizer than the experiment's" in refused(
        replace(world.places[1], shard=other.places[1].shard), server_messages.query(2)
    )
    # Images alone have no words, whatever tokenizer was at hand.
    assert not ask(replace(world.places[0], shard=other.places[0].shard), server_messages.query(2)).has_error()


@pytest.mark.parametrize("text", ["name: [", "name: Jones\nsecret: 3", None])
def test_a_wrong_experiment_file_is_refused_without_its_path(text: str | None, world: World, tmp_path: Path) -> None:
    path = tmp_path / "jones-1948" / "plan.yaml"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    why = refused(replace(world.places[0], experiment=path), server_messages.query(2))
    assert "the site's experiment file" in why
    assert "jones-1948" not in why


def test_a_site_that_the_experiment_does_not_know_is_refused(world: World) -> None:
    why = refused(replace(world.places[0], site="nowhere"), server_messages.query(2))
    assert why == "the experiment knows no site 'nowhere'; add it to data.sites"


# ---- training


def test_a_site_answers_with_an_update_of_its_own_towers_and_counts(world: World) -> None:
    parameters = for_stream(world.initial(), "image")
    message = order(world, "image")
    reply = server_messages.read_reply(
        ask(world.places[0], message),
        site="north",
        run=RUN,
        round_number=1,
        fingerprint=world.experiment.fingerprint(),
        base=digest(parameters),
        parameters=parameters,
    )
    assert reply.update.examples == {"image": 8, "text": 0, "paired": 0}
    assert reply.update.steps == 2
    assert set(reply.update.deltas) <= set(parameters)
    assert set(reply.update.metrics) == {"mvm/loss"}
    assert reply.bytes_up > 4 * sum(value.numel() for value in reply.update.deltas.values())
    assert reply.train_start <= reply.train_end


def test_an_answer_is_the_same_whatever_the_process_did_before(world: World) -> None:
    def deltas_of(message: Message, place: Place) -> dict[str, bytes]:
        return {name: array.data for name, array in ask(place, message).content.array_records["deltas"].items()}

    first = deltas_of(order(world, "text"), world.places[1])
    ask(world.places[0], order(world, "image"))
    assert deltas_of(order(world, "text"), world.places[1]) == first


def test_a_job_that_failed_midway_leaves_no_gradient_for_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    place = world.places[0]
    honest = {name: array.data for name, array in ask(place, order(world, "image")).content.array_records["deltas"].items()}
    with monkeypatch.context() as patch:
        step = client_app.local.Optimisers.step
        patch.setattr(client_app.local.Optimisers, "step", lambda self, progress: 1 / 0)
        assert "ZeroDivisionError" in refused(place, order(world, "image"))
        assert step is not client_app.local.Optimisers.step
    again = ask(place, order(world, "image")).content.array_records["deltas"]
    assert {name: array.data for name, array in again.items()} == honest


def test_a_bug_is_named_by_kind_and_told_in_full_only_at_the_site(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(*args: object, **options: object) -> object:
        raise KeyError("No pleural effusion. /data/jones")

    monkeypatch.setattr(client_app.local, "train", leak)
    why = refused(world.places[0], order(world, "image"))
    assert why == "the site's job failed with KeyError; last_error.txt in its state folder has the details"
    assert "/data/jones" in (world.places[0].state / "last_error.txt").read_text()


def test_moments_are_kept_before_the_reply_leaves(world: World) -> None:
    ask(world.places[1], order(world, "text"))
    assert OptimiserStore(world.places[1].state, RUN).before(2, since=1) is not None


def test_a_stage_without_kept_moments_keeps_none(tmp_path: Path) -> None:
    wanted = values(tmp_path)
    wanted["stages"][0]["optimiser"] = {"keep_state": False}
    world = World(tmp_path, wanted)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    assert ask(world.places[1], order(world, "text")).has_content()
    assert not list(world.places[1].state.rglob("*.safetensors"))


def test_moments_of_the_stage_before_are_not_taken_into_the_next(tmp_path: Path) -> None:
    """West trains in both stages, misses the first round of the second, and begins its second round afresh."""
    wanted = values(tmp_path)
    wanted["stages"][0]["streams"] = ["paired"]
    world = World(tmp_path, wanted)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    west = world.places[2]
    assert ask(west, order(world, "paired", round_number=1)).has_content()
    later = ask(west, order(world, "paired", round_number=3)).content.array_records["deltas"]
    afresh = ask(replace(west, state=tmp_path / "afresh"), order(world, "paired", round_number=3))
    assert {name: array.data for name, array in later.items()} == {
        name: array.data for name, array in afresh.content.array_records["deltas"].items()
    }


def test_a_full_disk_at_the_site_is_a_refusal(world: World) -> None:
    place = replace(world.places[0], state=Path("/proc/fedmix"))
    why = refused(place, order(world, "image"))
    assert why.startswith("the optimiser state cannot be kept at this site")
    assert "/proc" not in why


WRONG_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "other experiment": ({"fingerprint": "0" * 64}, "another experiment than the one given to this site"),
    "damaged on the way": ({"base": "0" * 64}, "damaged on the way"),
    "round nought": ({"round_number": 0}, "rounds count from 1"),
    "a round too many": ({"round_number": 4}, "past the last stage"),
    "a stage of others": ({"round_number": 2}, "in which this site takes no part"),
    "a path for a run": ({"run": "../../etc"}, "names its run with signs that are not allowed"),
    "a root for a run": ({"run": "/etc"}, "names its run with signs that are not allowed"),
    "no run": ({"run": ""}, "names its run with signs that are not allowed"),
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_an_order_that_does_not_fit_is_refused(name: str, world: World, tmp_path: Path) -> None:
    changes, why = WRONG_ORDERS[name]
    assert why in refused(world.places[0], order(world, "image", **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def sent(world: World, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Message:
    parameters = change(dict(for_stream(world.initial(), "image")))
    return order(world, "image", parameters=parameters, base=digest(parameters))


def test_parameters_of_another_model_are_refused(world: World) -> None:
    place = world.places[0]
    assert "their names differ" in refused(place, sent(world, lambda all_: dict(list(all_.items())[1:])))
    assert "their names differ" in refused(place, sent(world, lambda all_: all_ | {"back.door": torch.zeros(1)}))
    assert "their names differ" in refused(place, sent(world, lambda all_: dict(world.initial())))
    transposed = sent(
        world, lambda all_: {name: value.t().contiguous() if value.ndim == 2 else value for name, value in all_.items()}
    )
    assert "this experiment's is" in refused(place, transposed)
    assert "this experiment's is" in refused(
        place, sent(world, lambda all_: {name: value.double() for name, value in all_.items()})
    )


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"order": ConfigRecord({"run": RUN})}),
        RecordDict({"order": ConfigRecord({"run": RUN, "round": "1"}), "parameters": ArrayRecord()}),
        RecordDict({"order": ConfigRecord({"run": 3}), "parameters": ArrayRecord()}),
        RecordDict(
            {"order": ConfigRecord({"run": RUN}), "parameters": ArrayRecord({"a": Array("float32", (1,), "pickle", b"x")})}
        ),
        RecordDict(
            {
                "order": ConfigRecord({"run": RUN}),
                "parameters": ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"")}),
            }
        ),
        RecordDict({"order": ArrayRecord({"a": Array(np.zeros(1))}), "parameters": ArrayRecord()}),
    ],
)
def test_an_order_of_another_form_is_refused(content: RecordDict, world: World) -> None:
    why = refused(world.places[0], Message(content, 2, "train"))
    assert "not one that this version understands" in why or "of a message should be" in why


def test_a_deployed_node_is_told_what_its_config_lacks() -> None:
    context = Context(run_id=1, node_id=2, node_config={"site": "north"}, state=RecordDict(), run_config={})
    with pytest.raises(ConfigError, match="--node-config lacks experiment, shard, state"):
        from_node_config(context)
    context.node_config.update({"experiment": "a.yaml", "shard": "b", "state": "c"})
    assert from_node_config(context) == Place("north", Path("a.yaml"), Path("b"), Path("c"))


def test_training_reads_the_shard_s_sizes_and_greeting_its_every_byte(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    honest = Shard.open

    def noting(path: Path, *, verify: bool = True) -> Shard:
        verified.append(verify)
        return honest(path, verify=verify)

    monkeypatch.setattr(Shard, "open", noting)
    client_app._sampler.cache_clear()
    ask(world.places[0], server_messages.query(2))
    ask(world.places[0], order(world, "image"))
    ask(world.places[0], order(world, "image"))
    assert verified == [True, False]
