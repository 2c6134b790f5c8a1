"""The ClientApp at a site: what it greets with, what it trains, and what it refuses without saying too much."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from little import World, values, wired
from torch import Tensor

from client import app as client_app
from client import place as places
from client.app import build_app, from_node_config
from client.messages import NEEDS_ALL, REFUSED
from client.place import Place
from client.state import Memory, SiteState
from fedmix.config import Wire
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError
from fedmix.federation.compression import check_parts, decode_rows, parts_of
from fedmix.federation.local import seed_of
from fedmix.federation.update import REACHED_BY, base_of, digests, group_of, rows_of, tower_of
from server import messages as server_messages

RUN, NONCE = "little-000000000000", "0123456789abcdef" * 2


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


def for_stream(world: World, stream: str) -> dict[str, Tensor]:
    """The initial parameters that a site of the stream trains."""
    return {name: value for name, value in world.initial().items() if stream in REACHED_BY[tower_of(group_of(name))]}


def digests_of(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each group; a parameter that no model has is of none."""
    return digests({name: value for name, value in parameters.items() if name != "back.door"})


def order(
    world: World,
    stream: str,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    left_out: Iterable[str] = (),
    second_moments: Mapping[str, float] | None = None,
    **changes: Any,
) -> Message:
    """An order to train on ``parameters``, by default the initial ones, of which it carries all groups but ``left_out``.

    ``changes`` replace fields of its plan.
    """
    parameters = for_stream(world, stream) if parameters is None else parameters
    carried = {name: value for name, value in parameters.items() if not _is_of(name, left_out)}
    plan: dict[str, Any] = {
        "run": RUN,
        "round": 1,
        "fingerprint": world.experiment.fingerprint(),
        "base": base_of(digests_of(parameters)),
        "nonce": NONCE,
    }
    records: dict[str, Any] = {
        "order": ConfigRecord(plan | changes),
        "groups": ConfigRecord(dict(digests_of(parameters))),
        "parameters": ArrayRecord({name: Array(value.contiguous().numpy()) for name, value in carried.items()}),
    }
    if second_moments is not None:
        records["second_moments"] = MetricRecord(dict(second_moments))
    return Message(RecordDict(records), 2, "train")


def _is_of(name: str, groups: Iterable[str]) -> bool:
    return name != "back.door" and group_of(name) in groups


def sent_by(answer: Message) -> dict[str, bytes]:
    """Every coded array of an update."""
    assert not answer.has_error(), answer.error.reason
    return {name: array.data for name, array in answer.content.array_records["deltas"].items()}


def deltas_of(answer: Message, shapes: Mapping[str, Tensor], wire: Wire) -> dict[str, Tensor]:
    """The update as the server decodes it."""
    arrays = {name: array.numpy() for name, array in answer.content.array_records["deltas"].items()}
    found = {}
    for name, value in shapes.items():
        parts = {part: arrays.pop(name + part) for part in parts_of(value.shape, wire) if name + part in arrays}
        if parts:
            assert {part: (array.dtype, array.shape) for part, array in parts.items()} == parts_of(value.shape, wire)
            check_parts(parts, rows_of(value.shape)[1], wire)
            found[name] = decode_rows(parts, rows_of(value.shape)[1], wire).reshape(value.shape)
    assert not arrays
    return found


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
    parameters = for_stream(world, "image")
    content = ask(world.places[0], order(world, "image")).content
    receipt = dict(content.config_records["receipt"])
    assert receipt.pop("train_start") <= receipt.pop("train_end")  # type: ignore[operator]
    assert receipt == {
        "run": RUN,
        "round": 1,
        "base": base_of(digests_of(parameters)),
        "fingerprint": world.experiment.fingerprint(),
        "site": "north",
        "nonce": NONCE,
        "steps": 2,
        "ledger": "",
    }
    assert dict(content.metric_records["examples"]) == {"image": 8, "text": 0, "paired": 0}
    assert set(content.metric_records["metrics"]) == {"mvm/loss"}
    assert dict(content.metric_records["second_moments"]) == {}
    assert set(content) == {"receipt", "examples", "metrics", "second_moments", "deltas"}
    deltas = deltas_of(Message(content, 2, "train"), parameters, Wire())
    assert deltas
    assert all(bool(value.any()) for name, value in deltas.items() if "position" not in name)


def test_an_answer_is_the_same_whatever_the_process_did_before(world: World) -> None:
    first = sent_by(ask(world.places[1], order(world, "text")))
    ask(world.places[0], order(world, "image"))
    assert sent_by(ask(world.places[1], order(world, "text"))) == first


def test_a_job_that_failed_midway_leaves_no_gradient_for_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    place = world.places[0]
    honest = sent_by(ask(place, order(world, "image")))
    with monkeypatch.context() as patch:
        step = client_app.local.Optimisers.step
        patch.setattr(client_app.local.Optimisers, "step", lambda self, progress: 1 / 0)
        assert "ZeroDivisionError" in refused(place, order(world, "image"))
        assert step is not client_app.local.Optimisers.step
    assert sent_by(ask(place, order(world, "image"))) == honest


def test_a_bug_is_named_by_kind_and_told_in_full_only_at_the_site(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(*args: object, **options: object) -> object:
        raise KeyError("No pleural effusion. /data/jones")

    monkeypatch.setattr(client_app.local, "train", leak)
    why = refused(world.places[0], order(world, "image"))
    assert why == "the site's job failed with KeyError; last_error.txt in its state folder has the details"
    assert "/data/jones" in (world.places[0].state / "last_error.txt").read_text()


def test_moments_are_kept_before_the_reply_leaves(world: World) -> None:
    ask(world.places[1], order(world, "text"))
    kept = SiteState(world.places[1].state, RUN).before(2, stage_began=1)
    assert kept.moments
    assert not kept.residual  # float32 loses nothing


def test_a_stage_without_kept_moments_keeps_none(tmp_path: Path) -> None:
    world = World(tmp_path, stages_with(tmp_path, optimiser={"keep_state": False}))
    assert ask(world.places[1], order(world, "text")).has_content()
    assert SiteState(world.places[1].state, RUN).before(2, stage_began=1) == Memory()


def test_moments_of_the_stage_before_are_not_taken_into_the_next(tmp_path: Path) -> None:
    """West trains in both stages, misses the first round of the second, and begins its second round afresh."""
    world = World(tmp_path, stages_with(tmp_path, streams=["paired"]))
    west = world.places[2]
    assert ask(west, order(world, "paired", round=1)).has_content()
    later = sent_by(ask(west, order(world, "paired", round=3)))
    assert later == sent_by(ask(replace(west, state=tmp_path / "afresh"), order(world, "paired", round=3)))


def test_a_state_folder_that_cannot_be_written_is_a_refusal_before_any_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app.local, "train", lambda *args, **options: pytest.fail("trained for nothing"))
    why = refused(replace(world.places[0], state=Path("/proc/fedmix")), order(world, "image"))
    assert why.startswith("this site's state cannot be kept: No such file or directory; let the agent write")
    assert "/proc" not in why


def test_aggregated_second_moments_are_taken_from_the_order_and_given_in_the_reply(tmp_path: Path) -> None:
    world = World(tmp_path, stages_with(tmp_path, optimiser={"second_moment": "aggregated"}))
    first = ask(world.places[1], order(world, "text"))
    moments = dict(first.content.metric_records["second_moments"])
    assert moments
    assert all(isinstance(mean, float) and mean >= 0.0 for mean in moments.values())
    elsewhere = replace(world.places[1], state=tmp_path / "elsewhere")  # the same round of a site without a past
    large = ask(elsewhere, order(world, "text", second_moments=dict.fromkeys(moments, 1e6)))
    small, much = deltas_of(large, for_stream(world, "text"), Wire()), deltas_of(first, for_stream(world, "text"), Wire())
    name = next(iter(moments))
    assert float(small[name].abs().sum()) < 0.5 * float(much[name].abs().sum())  # a large second moment is a short step


# ---- the wire


def stages_with(folder: Path, **changes: Any) -> dict[str, Any]:
    """The little experiment with changes to its first stage."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    wanted = values(folder)
    wanted["stages"][0] |= changes
    return wanted


def coding_world(folder: Path, **wire: Any) -> World:
    """Three rounds of every site with a coding that loses something."""
    return World(folder, stages_with(folder, rounds=3) | {"wire": {"coding": "int8"} | wire})


def test_a_coded_update_is_the_exact_one_within_a_step(world: World, tmp_path: Path) -> None:
    shapes = for_stream(world, "image")
    exact = deltas_of(ask(world.places[0], order(world, "image", round=1)), shapes, Wire())
    other = World(tmp_path / "other", values(tmp_path) | {"wire": {"coding": "int8"}})
    answer = ask(other.places[0], order(other, "image"))
    coded = deltas_of(answer, shapes, Wire(coding="int8"))
    assert coded.keys() == exact.keys()
    for name, delta in exact.items():
        rows = delta.reshape(rows_of(delta.shape))
        error = (coded[name] - delta).reshape(rows.shape).abs().amax(dim=1)
        assert bool((error <= rows.abs().amax(dim=1) / 127 * 1.001).all()), name
    assert sum(map(len, sent_by(answer).values())) < 0.6 * sum(4 * value.numel() for value in exact.values())


def test_what_coding_lost_is_kept_and_sent_in_the_next_round(tmp_path: Path) -> None:
    world = coding_world(tmp_path)
    place, wire = world.places[0], world.experiment.wire
    shapes = for_stream(world, "image")
    ask(place, order(world, "image", round=1))
    residual = SiteState(place.state, RUN).before(2, stage_began=1).residual
    assert residual.keys() <= shapes.keys()
    with_it = deltas_of(ask(place, order(world, "image", round=2)), shapes, wire)
    for path in place.state.rglob("round-00002.safetensors"):
        path.unlink()
    state = SiteState(place.state, RUN)
    state.finish(1, {})
    without = deltas_of(ask(place, order(world, "image", round=2)), shapes, wire)
    assert with_it.keys() == without.keys()
    gained = torch.cat([(with_it[name] - without[name]).flatten() for name in with_it])
    lost = torch.cat([residual[name].flatten() for name in with_it])
    assert float(torch.nn.functional.cosine_similarity(gained, lost, dim=0)) > 0.3  # two roundings are between them


def test_a_repeated_round_gives_the_same_bits_and_leaves_the_same_state(tmp_path: Path) -> None:
    """The server lost rounds 2 and 3 and orders them again, the second time with another nonce and from another process."""
    world = coding_world(tmp_path, coding="int4", keep=0.5)
    place = world.places[0]
    for number in (1, 2, 3):
        first = sent_by(ask(place, order(world, "image", round=number)))
        if number == 2:
            second_round = first
    kept = {path.name: path.read_bytes() for path in place.state.rglob("*.safetensors")}
    places.learner_of.cache_clear()
    places.sampler_at.cache_clear()
    assert sent_by(ask(place, order(world, "image", round=2, nonce="f" * 32))) == second_round
    assert sent_by(ask(place, order(world, "image", round=3, nonce="f" * 32))) == first
    assert {path.name: path.read_bytes() for path in place.state.rglob("*.safetensors")} == kept


def test_rounding_follows_from_seed_site_and_round_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = coding_world(tmp_path)
    seeds = []
    honest = client_app.compression.encode

    def noting(deltas: Any, residual: Any, wire: Wire, chance: torch.Generator) -> Any:
        seeds.append(chance.initial_seed())
        return honest(deltas, residual, wire, chance)

    monkeypatch.setattr(client_app.compression, "encode", noting)
    for place, stream, changes in ((0, "image", {"round": 1}), (0, "image", {"round": 2}), (1, "text", {"run": "another"})):
        assert ask(world.places[place], order(world, stream, **changes)).has_content()  # type: ignore[arg-type]
    assert seeds == [seed_of(3, "north", 1, "wire"), seed_of(3, "north", 2, "wire"), seed_of(3, "south", 1, "wire")]


# ---- parameters that the order leaves out


def answer_code(place: Place, message: Message) -> int:
    answer = ask(place, message)
    return answer.error.code if answer.has_error() else 0


def test_an_order_that_leaves_groups_out_is_answered_as_one_that_carries_all(world: World, tmp_path: Path) -> None:
    place = world.places[0]
    parameters = for_stream(world, "image")
    ask(place, order(world, "image"))
    changed = {name: value + 0.01 if _is_of(name, ["image.embedding"]) else value for name, value in parameters.items()}
    left_out = set(digests_of(parameters)) - {"image.embedding"}
    some = sent_by(ask(place, order(world, "image", parameters=changed, left_out=left_out)))
    everything = order(world, "image", parameters=changed)
    assert some == sent_by(ask(replace(place, state=tmp_path / "afresh"), everything))
    assert some != sent_by(ask(replace(place, state=tmp_path / "first"), order(world, "image")))
    # What it received in part is now what it holds.
    none = order(world, "image", parameters=changed, left_out=digests_of(parameters))
    assert not none.content.array_records["parameters"]
    assert sent_by(ask(place, none)) == some


def test_a_site_that_holds_nothing_asks_for_everything(world: World) -> None:
    answer = ask(world.places[0], order(world, "image", left_out=["image.embedding"]))
    assert (answer.error.code, answer.error.reason) == (
        NEEDS_ALL,
        "this site does not hold all parameters that the order left out; send them all",
    )
    assert answer_code(world.places[0], order(world, "image")) == 0


def test_a_site_that_holds_other_parameters_asks_for_everything(world: World) -> None:
    place = world.places[0]
    ask(place, order(world, "image"))
    changed = {name: value + 0.01 for name, value in for_stream(world, "image").items()}
    answer = ask(place, order(world, "image", parameters=changed, left_out=["image.embedding"]))
    assert (answer.error.code, answer.error.reason) == (
        NEEDS_ALL,
        "this site holds other parameters than those that the order left out; send them all",
    )
    assert answer_code(place, order(world, "image", parameters=changed)) == 0


@pytest.mark.parametrize("damage", [change, cut_short, Path.unlink])
def test_a_damaged_cache_is_asked_for_again(damage: Callable[[Path], None], world: World) -> None:
    place = world.places[0]
    ask(place, order(world, "image"))
    every_group = digests_of(for_stream(world, "image"))
    assert answer_code(place, order(world, "image", left_out=every_group)) == 0
    damage(place.state / RUN / "received.safetensors")
    assert answer_code(place, order(world, "image", left_out=every_group)) == NEEDS_ALL


def test_what_another_run_left_is_not_taken(world: World) -> None:
    place = world.places[0]
    ask(place, order(world, "image"))
    assert answer_code(place, order(world, "image", run="another-run", left_out=["image.embedding"])) == NEEDS_ALL


def test_damage_to_what_the_order_carries_is_damage_and_not_a_lack(world: World) -> None:
    place = world.places[0]
    ask(place, order(world, "image"))
    whole = order(world, "image", left_out=["image.norm"])
    record = whole.content.array_records["parameters"]
    name = next(iter(record))
    record[name] = Array(record[name].numpy() + np.float32(1.0))
    answer = ask(place, whole)
    assert answer.error.code == REFUSED
    assert "damaged on the way" in answer.error.reason


WRONG_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "other experiment": ({"fingerprint": "0" * 64}, "another experiment than the one given to this site"),
    "damaged on the way": ({"base": "0" * 64}, "damaged on the way"),
    "round nought": ({"round": 0}, "rounds count from 1"),
    "a round too many": ({"round": 4}, "past the last stage"),
    "a stage of others": ({"round": 2}, "in which this site takes no part"),
    "a path for a run": ({"run": "../../etc"}, "names its run with signs that are not allowed"),
    "a root for a run": ({"run": "/etc"}, "names its run with signs that are not allowed"),
    "no run": ({"run": ""}, "names its run with signs that are not allowed"),
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_an_order_that_does_not_fit_is_refused(name: str, world: World, tmp_path: Path) -> None:
    changes, why = WRONG_ORDERS[name]
    assert why in refused(world.places[0], order(world, "image", **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_parameters_of_another_model_are_refused(world: World) -> None:
    place, own = world.places[0], for_stream(world, "image")

    def why(parameters: Mapping[str, Tensor]) -> str:
        return refused(place, order(world, "image", parameters=parameters))

    assert "their names differ" in why(dict(list(own.items())[1:]))
    assert "their names differ" in why(own | {"back.door": torch.zeros(1)})
    assert "their names differ" in why(world.initial())
    assert "their names differ" in why({})
    assert "this experiment's is" in why(
        {name: value.t().contiguous() if value.ndim == 2 else value for name, value in own.items()}
    )
    assert "this experiment's is" in why({name: value.double() for name, value in own.items()})
    assert not list(place.state.rglob("*.safetensors"))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1.0, 3])
def test_second_moments_that_are_none_are_refused(odd: float, world: World) -> None:
    why = refused(world.places[0], order(world, "image", second_moments={"patch_decoder.head.weight": odd}))
    assert "no means of squares" in why or "should be float" in why


PLAN: dict[str, Any] = {"run": RUN, "round": 1, "fingerprint": "", "base": "", "nonce": NONCE}
WITHOUT: dict[str, Any] = {"order": ConfigRecord(PLAN), "groups": ConfigRecord(), "parameters": ArrayRecord()}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"order": ConfigRecord({"run": RUN})}),
        RecordDict({"order": ConfigRecord({"run": RUN}), "parameters": ArrayRecord()}),
        RecordDict(WITHOUT | {"order": ConfigRecord({"run": RUN, "round": "1"})}),
        RecordDict(WITHOUT | {"order": ConfigRecord({"run": 3})}),
        RecordDict(WITHOUT | {"order": ConfigRecord(PLAN | {"nonce": 3})}),
        RecordDict(WITHOUT | {"order": ConfigRecord(PLAN), "groups": ConfigRecord({"image.norm": 3})}),
        RecordDict(WITHOUT | {"order": ConfigRecord(PLAN), "groups": MetricRecord({"image.norm": 3})}),
        RecordDict(WITHOUT | {"parameters": ArrayRecord({"a": Array("float32", (1,), "pickle", b"x")})}),
        RecordDict(WITHOUT | {"parameters": ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", b"")})}),
        RecordDict(WITHOUT | {"order": ArrayRecord({"a": Array(np.zeros(1))})}),
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
    places.sampler_at.cache_clear()
    ask(world.places[0], server_messages.query(2))
    ask(world.places[0], order(world, "image"))
    ask(world.places[0], order(world, "image"))
    assert verified == [True, False]
