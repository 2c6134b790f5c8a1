"""The same apps on Flower's own simulation engine, which needs Ray."""

from __future__ import annotations

import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from client.app import build_app
from client.place import Place
from fedmix.errors import RunError
from simulations.engine import Locate, as_node_config, place_of


def run_on_ray(
    app: ServerApp,
    places: Iterable[Place],
    *,
    num_workers: int,
    threads_per_site: int,
    build: Callable[[Locate], ClientApp] = build_app,
) -> None:
    """Run a ServerApp over Flower's own simulation engine, on the ClientApp that ``build`` makes."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise RunError("--engine ray needs Ray; install it with: pip install 'fedmix[simulation]'") from None
    from flwr.simulation import run_simulation

    # Flower reports a refusing site with a traceback, and announces itself; what matters comes back as a reply or is raised.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    ordered = [as_node_config(place) for place in places]
    is_over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="fedmix-ray-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # run_simulation is deprecated in favour of a CLI that leaves daemons behind
        try:
            run_simulation(
                server_app=_ending_with(is_over, app),
                client_app=build(lambda context: place_of(ordered[int(context.node_config["partition-id"])])),
                num_supernodes=len(ordered),
                backend_config={
                    "client_resources": {"num_cpus": threads_per_site, "num_gpus": 0.0},
                    "init_args": {
                        "num_cpus": num_workers * threads_per_site,
                        "include_dashboard": False,
                        "log_to_driver": False,
                        "logging_level": "critical",
                        "_temp_dir": folder,
                    },
                },
            )
        finally:
            is_over.set()


def _ending_with(is_over: threading.Event, app: ServerApp) -> ServerApp:
    """The same app, which stops asking for replies once the engine has stopped: Flower runs it in a thread of its own,
    which would keep the process alive after Ctrl-C until the round's deadline.
    """
    ending = ServerApp()

    @ending.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def pull_or_stop(message_ids: Iterable[str]) -> Iterable[Message]:
            if is_over.is_set():
                raise RunError("the engine has stopped")
            return pull(message_ids)

        grid.pull_messages = pull_or_stop  # type: ignore[method-assign]
        app(grid, context)

    return ending
