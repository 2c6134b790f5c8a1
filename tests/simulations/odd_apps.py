"""ClientApps that misbehave in a worker process. Each takes what a WorkerPool gives to the real one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from little import hostile

from simulations.engine import client_app

Places = Mapping[int, Mapping[str, str]]


def odd_at(places: Places, site: str, act: object) -> ClientApp:
    """The real app, which does something else first when this site is ordered to train."""
    honest = client_app(places)
    app = hostile(honest, lambda reply: reply)
    odd = ClientApp()

    @odd.query()
    def greet(message: Message, context: Context) -> Message:
        return app(message, context)

    @odd.train()
    def train(message: Message, context: Context) -> Message:
        place = places[context.node_id]
        if place["site"] == site:
            assert callable(act)
            act(Path(place["state"]))
        return app(message, context)

    return odd


def is_first(state: Path) -> bool:
    """Whether this has not been asked before at this site."""
    state.mkdir(parents=True, exist_ok=True)
    mark = state / "asked"
    if mark.exists():
        return False
    mark.touch()
    return True


def crashing(places: Places) -> ClientApp:
    """South's worker is gone without a word, every time."""
    return odd_at(places, "south", lambda state: os._exit(13))


def crashing_once(places: Places) -> ClientApp:
    """South's worker is gone without a word, the first time."""
    return odd_at(places, "south", lambda state: os._exit(13) if is_first(state) else None)


def raising(places: Places) -> ClientApp:
    """North's job raises something whose text must not travel."""

    def fail(state: Path) -> None:
        raise LookupError("No pleural effusion in /data/jones")

    return odd_at(places, "north", fail)


def hanging_once(places: Places) -> ClientApp:
    """West's job hangs, the first time."""
    return odd_at(places, "west", lambda state: time.sleep(600) if is_first(state) else None)


def hanging(places: Places) -> ClientApp:
    """West's job hangs, every time."""
    return odd_at(places, "west", lambda state: time.sleep(600))


def stillborn(places: Places) -> ClientApp:
    """No worker ever gets as far as an app."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the traceback of this one is on purpose
    raise RuntimeError("on purpose")


def slow(places: Places) -> ClientApp:
    """Every job takes a while."""
    return answering(lambda message: (time.sleep(0.6), RecordDict())[1])


def echoing(places: Places) -> ClientApp:
    """Every site sends back a copy of what it was sent."""

    def echo(message: Message) -> RecordDict:
        parameters = message.content.array_records["parameters"]
        return RecordDict({"deltas": ArrayRecord({name: Array(array.numpy()) for name, array in parameters.items()})})

    return answering(echo)


def answering(answer: Callable[[Message], RecordDict]) -> ClientApp:
    """An app that needs no files."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(message), reply_to=message)

    return app
