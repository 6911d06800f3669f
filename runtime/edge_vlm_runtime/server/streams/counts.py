"""What `/metrics` tells about each camera of the server. Its label is bounded: cameras of the file,
and those that are gone are left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.server.metrics import LabelledFamily


class CameraCounts:
    """Counted from the events of all sessions that a camera has had. Lives on the event loop."""

    def __init__(self) -> None:
        self._frames: dict[str, Counter[str]] = defaultdict(Counter)
        self._alerts: dict[str, Counter[str]] = defaultdict(Counter)
        self._answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._cells: dict[str, Counter[str]] = defaultdict(Counter)
        self._lost: Counter[str] = Counter()

    def event(self, camera: str, event: protocol.ServerEvent) -> None:
        """One of its session's events."""
        if isinstance(event, protocol.FrameAccepted):
            self._frames[camera]["accepted"] += 1
            self._cells[camera]["seen"] += event.cells_seen
            self._cells[camera]["kept"] += event.cells_kept
        elif isinstance(event, protocol.FrameDropped):
            self._frames[camera][event.reason] += 1
        elif isinstance(event, AlertTriggered):
            self._alerts[camera]["triggered"] += 1
        elif isinstance(event, AlertCleared):
            self._alerts[camera]["cleared"] += 1
        elif isinstance(event, protocol.ResponseDone):
            self._answers[camera][event.status] += 1

    def lost_picture(self, camera: str) -> None:
        """A subscriber did not read it in time."""
        self._lost[camera] += 1

    def forget(self, camera: str) -> None:
        """It is not in the file any more."""
        for counts in (self._frames, self._alerts, self._answers, self._cells):
            counts.pop(camera, None)
        self._lost.pop(camera, None)

    def families(self) -> Iterator[LabelledFamily]:
        """The counters."""
        yield _family(
            "camera_frames_total",
            "Frames of a camera by outcome: accepted, or why they were dropped.",
            ("camera", "outcome"),
            self._frames,
        )
        yield _family(
            "camera_cells_total",
            "Cells of a camera's encoded frames, and of them those kept.",
            ("camera", "what"),
            self._cells,
        )
        yield _family(
            "camera_alerts_total",
            "Begins and ends of a camera's alerts.",
            ("camera", "change"),
            self._alerts,
        )
        yield _family(
            "camera_responses_total",
            "Answers about a camera, by how they ended.",
            ("camera", "status"),
            self._answers,
        )
        yield LabelledFamily(
            name="camera_pictures_lost_total",
            help="Pictures that a subscriber did not read in time.",
            labels=("camera",),
            samples={(camera,): count for camera, count in self._lost.items()},
        )


def _family(
    name: str, help: str, labels: tuple[str, ...], counts: dict[str, Counter[str]]
) -> LabelledFamily:
    samples: dict[tuple[str, ...], float] = {
        (camera, what): float(count)
        for camera, counted in counts.items()
        for what, count in counted.items()
    }
    return LabelledFamily(name=name, help=help, labels=labels, samples=samples)
