"""A SuperNode that was killed is back at once: its next life signs off for the last one, which can no longer do so itself.

Flower 1.41.0 holds a node to be online for a minute after its last sign of life and meanwhile lets nobody in with its key,
itself included. Signing off also tells the coordinator that what the last life was answering is lost (server/replies.py).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest, DeactivateNodeResponse
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedmix.disk import write_whole


class PresentClient(FleetHttpClient):
    """Flower's client of a SuperNode that writes down as whom it is online, for as long as it is."""

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802 (the name is Flower's)
        """Go online, after the last life of this agent has been taken offline."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            last = int(_note().read_text())
            # The coordinator refuses where it has noticed by itself, or where this site has been registered anew.
            with contextlib.suppress(httpx.HTTPStatusError):
                self.DeactivateNode(DeactivateNodeRequest(node_id=last))
        response = super().ActivateNode(request)
        write_whole(_note(), str(response.node_id))
        return response

    def DeactivateNode(self, request: DeactivateNodeRequest) -> DeactivateNodeResponse:  # noqa: N802
        """Go offline."""
        response = super().DeactivateNode(request)
        _note().unlink(missing_ok=True)
        return response


def _note() -> Path:
    """In the home that one agent at a time holds."""
    return Path(os.environ["FLWR_HOME"], "online-as")
