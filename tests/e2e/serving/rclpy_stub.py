"""As much of rclpy, sensor_msgs and std_msgs as a node of ours touches. No ROS, but what ROS
refuses is refused: a message of another type, a topic without a subscriber, a parameter that is
declared twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass(kw_only=True)
class String:
    data: str = ""


@dataclass(kw_only=True)
class Bool:
    data: bool = False


@dataclass(kw_only=True)
class Image:
    header: Any = field(
        default_factory=lambda: SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))
    )
    height: int = 0
    width: int = 0
    encoding: str = ""
    step: int = 0
    data: bytes = b""


class Publisher:
    def __init__(self, kind: type) -> None:
        self._kind = kind
        self.sent: list[Any] = []

    def publish(self, message: Any) -> None:
        if not isinstance(message, self._kind):
            raise TypeError(f"expected {self._kind.__name__}, got {type(message).__name__}")
        self.sent.append(message)


class Node:
    parameters: dict[str, Any] = {}  # noqa: RUF012 - set on the command line in ROS
    """What the command line gives."""

    def __init__(self, node_name: str) -> None:
        self.name = node_name
        self._declared: set[str] = set()
        self.publishers: dict[str, Publisher] = {}
        self._subscribers: dict[str, tuple[type, Callable[[Any], None]]] = {}
        self.log: list[str] = []

    def declare_parameter(self, name: str, value: Any) -> Any:
        if name in self._declared:
            raise RuntimeError(f"parameter {name} is declared already")
        self._declared.add(name)
        return SimpleNamespace(value=self.parameters.get(name, value))

    def create_publisher(self, msg_type: type, topic: str, qos_profile: Any) -> Publisher:
        return self.publishers.setdefault(topic, Publisher(msg_type))

    def create_subscription(
        self, msg_type: type, topic: str, callback: Callable[[Any], None], qos_profile: Any
    ) -> None:
        self._subscribers[topic] = (msg_type, callback)

    def deliver(self, topic: str, message: Any) -> None:
        kind, callback = self._subscribers[topic]
        if not isinstance(message, kind):
            raise TypeError(f"{topic} is of {kind.__name__}")
        callback(message)

    def get_logger(self) -> Any:
        return SimpleNamespace(warning=self.log.append, error=self.log.append)

    def destroy_node(self) -> None:
        self._subscribers.clear()


def stub_modules() -> dict[str, ModuleType]:
    """For `sys.modules`."""
    contents: dict[str, dict[str, Any]] = {
        "rclpy": {},
        "rclpy.node": {"Node": Node},
        "rclpy.qos": {"qos_profile_sensor_data": object()},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": Image},
        "std_msgs": {},
        "std_msgs.msg": {"Bool": Bool, "String": String},
    }
    modules = {}
    for name, names in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(names)
    return modules
