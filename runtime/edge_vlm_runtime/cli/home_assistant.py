"""The options of `serve` about Home Assistant, and what they set up."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from edge_vlm.options import About
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.cli.shared import print_notes
from edge_vlm_runtime.client.address import DEFAULT_PORT

if TYPE_CHECKING:
    from edge_vlm_runtime import protocol
    from edge_vlm_runtime.cameras.config import CameraPlan
    from edge_vlm_runtime.home_assistant.bridge import HomeAssistant
    from edge_vlm_runtime.server.app import Server


@dataclass(frozen=True, kw_only=True)
class HomeOptions:
    """How the cameras of the server get into Home Assistant."""

    home_assistant: Annotated[str | None, About(metavar="URL", is_secret=True)] = None
    """Its MQTT broker, mqtt://[USER:PASSWORD@]HOST[:PORT][/TOPIC]: cameras become devices there,
    alerts sensors."""
    discovery_prefix: Annotated[str, About(metavar="TOPIC")] = "homeassistant"
    """Home Assistant's topic for discovery."""
    node: Annotated[str | None, About(metavar="NAME", shows_default=False)] = None
    """This server's name on that broker (default: the machine's, and the port if not 8765)."""


@contextmanager
def home_assistant(
    args: argparse.Namespace, server: Server, *, has_cameras: bool
) -> Iterator[None]:
    """Tells it of the server's cameras, if it was named. Raises ConfigError, MissingExtraError."""
    if args.home_assistant is None:
        yield
        return
    from edge_vlm_runtime.home_assistant.bridge import HomeAssistant

    with HomeAssistant(
        args.home_assistant,
        args.node or default_node(server.port),
        server.ask_stream,
        prefix=args.discovery_prefix,
        model=server.bundle_name,
        evidence=EvidenceSize(args.evidence),
    ) as bridge:
        server.observe_streams(_Observer(bridge))
        if not has_cameras:
            print_notes(["Home Assistant is told of cameras alone, and there is no [[camera]] yet"])
        yield


def default_node(port: int) -> str:
    """The machine's name, and the port where another server may have the usual one."""
    from edge_vlm_runtime.home_assistant.entities import safe_name

    name = socket.gethostname().partition(".")[0]
    return safe_name(name if port == DEFAULT_PORT else f"{name}-{port}")


class _Observer:
    """Of the server's cameras, for Home Assistant."""

    def __init__(self, bridge: HomeAssistant) -> None:
        self._bridge = bridge

    def planned(self, plan: CameraPlan) -> None:
        from edge_vlm_runtime.home_assistant.states import WatchedAlert

        self._bridge.declare(
            {
                camera.name: [
                    WatchedAlert(alert.name, alert.rule.question)
                    for alert in plan.alerts_of(camera.name)
                ]
                for camera in plan.cameras
            }
        )

    def began(self, camera: str) -> None:
        self._bridge.begin(camera)

    def noted(self, camera: str, *, is_live: bool) -> None:
        self._bridge.note(camera, is_live=is_live)

    def said(self, camera: str, event: protocol.ServerEvent) -> None:
        self._bridge.put(camera, event)
