"""Tells Home Assistant of the server's cameras, and lets it ask them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.cameras.config import CameraPlan
from edge_vlm_runtime.client.address import DEFAULT_PORT
from edge_vlm_runtime.home_assistant.bridge import HomeAssistant
from edge_vlm_runtime.home_assistant.entities import safe_name
from edge_vlm_runtime.home_assistant.states import WatchedAlert
from edge_vlm_runtime.server.app import Server


@contextmanager
def told_to_home_assistant(
    server: Server, url: str, *, node: str | None, discovery_prefix: str, evidence: EvidenceSize
) -> Iterator[None]:
    """Use it around `serve`. `node`: see `HomeAssistant`, by default `default_node`. Raises
    ConfigError."""
    with HomeAssistant(
        url,
        node or default_node(server.port),
        server.ask_stream,
        prefix=discovery_prefix,
        model=server.bundle_name,
        evidence=evidence,
    ) as bridge:
        server.observe_streams(_Observer(bridge))
        yield


def default_node(port: int) -> str:
    """The machine's name, and the port where another server may have the usual one."""
    name = socket.gethostname().partition(".")[0]
    return safe_name(name if port == DEFAULT_PORT else f"{name}-{port}")


class _Observer:
    """Of the server's cameras, for Home Assistant."""

    def __init__(self, bridge: HomeAssistant) -> None:
        self._bridge = bridge

    def planned(self, plan: CameraPlan) -> None:
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
