"""What an agent can do with one live stream. Each call blocks; no MCP here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from edge_vlm.errors import NoFrameYet, SessionError, SessionGone
from edge_vlm_runtime.client.live_streams import LiveStreams, Snapshot

POLL_S = 30.0
"""One request waits so long for an event; then another one does."""
LONGEST_WAIT_S = 600.0


@dataclass(kw_only=True)
class Event:
    """An alert began or ended."""

    condition: str
    what: str
    """began or ended."""
    ago_s: float
    probability: float


@dataclass(kw_only=True)
class Happened:
    """What a stream has shown for some time."""

    account: str
    """In the model's words."""
    events: list[Event] = field(default_factory=list)
    """Begins and ends of the conditions that are watched for."""
    note: str = ""
    """What is missing, if something is."""


@dataclass(kw_only=True)
class Watched:
    """A condition, and where it stands."""

    condition: str
    holds: bool
    """It is so now."""
    probability: float | None
    times_begun: int
    """Since it is watched for."""
    began_while_waiting: bool
    note: str = ""


class StreamTools:
    """The tools, for the stream of that name or the only one there is."""

    def __init__(self, streams: LiveStreams, session_id: str | None = None) -> None:
        self._streams = streams
        self._session_id = session_id

    def _session(self) -> str:
        """Raises SessionGone, NoFrameYet."""
        sessions = self._streams.sessions()
        start = f"start one: edge-vlm watch {self._streams.url} --source webcam"
        if self._session_id is not None:
            for each in sessions:
                if self._session_id in (each["id"], each.get("stream")):
                    return str(each["id"])
            raise SessionGone(
                f"there is no stream {self._session_id!r} (any more)",
                remedy=f"{_listed(sessions)}; {start}",
            )
        shown = [each for each in sessions if each["newest_frame"] is not None]
        if len(shown) == 1:
            return str(shown[0]["id"])
        if shown:
            raise SessionGone(
                f"there are {len(shown)} streams, and which one is meant is not said",
                remedy=f"start edge-vlm mcp with --session ID or NAME: {_listed(shown)}",
            )
        if sessions:
            raise NoFrameYet("there is a session that has shown no picture yet", remedy="ask again")
        raise SessionGone("no camera is connected to this server", remedy=start)

    def what_do_you_see(self, question: str, detail: str = "video") -> str:
        return self._streams.ask(self._session(), question, detail)

    def snapshot(self) -> Snapshot:
        return self._streams.snapshot(self._session())

    def what_happened(self, since_s: float) -> Happened:
        session_id = self._session()
        told = self._streams.events(session_id)
        events = [_event(each) for each in told["events"] if each["ago_s"] <= since_s]
        notes = []
        if len(events) == len(told["events"]) and events and told["events"][0]["number"] > 1:
            notes.append("Older events are not kept any more.")
        account = ""
        try:
            account = self._streams.ask(
                session_id, f"What happened in the last {since_s:g} seconds?"
            )
        except SessionError as error:  # the events are known all the same
            notes.append(f"The model gave no account: {error}")
        return Happened(account=account, events=events, note=" ".join(notes))

    def watch_for(self, condition: str, wait_s: float = 0.0) -> Watched:
        """Watches from now on, once for each condition; waits until it begins, if asked to."""
        session_id = self._session()
        newest = int(self._streams.events(session_id)["newest_event"])
        watched = [
            each
            for each in self._streams.alerts(session_id)
            if each["rule"]["question"] == condition
        ]
        status = watched[0] if watched else self._streams.create_alert(session_id, condition)
        alert_id = status["alert_id"]
        began = False
        deadline = time.monotonic() + min(wait_s, LONGEST_WAIT_S)
        while not began and status["state"] != "active":
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            told = self._streams.events(session_id, newest, min(left_s, POLL_S))
            newest = told["newest_event"]
            began = any(
                each["alert_id"] == alert_id and each["type"] == "alert.triggered"
                for each in told["events"]
            )
            if told["has_ended"]:
                raise SessionGone("the stream has ended", remedy="start it again")
        status = next(
            (each for each in self._streams.alerts(session_id) if each["alert_id"] == alert_id),
            status,
        )
        return Watched(
            condition=condition,
            holds=status["state"] == "active",
            probability=status["probability"],
            times_begun=status["episodes"],
            began_while_waiting=began,
            note=_mass_note(status),
        )


def _event(fields: dict[str, Any]) -> Event:
    return Event(
        condition=fields["question"],
        what="began" if fields["type"] == "alert.triggered" else "ended",
        ago_s=round(fields["ago_s"], 1),
        probability=round(fields["probability"], 3),
    )


def _mass_note(status: dict[str, Any]) -> str:
    mass = status["answer_mass"]
    if mass is None or mass >= 0.5:
        return ""
    return (
        f"The model would hardly answer this by yes or no ({mass:.0%}), so the probability says "
        "little: ask a yes/no question, such as 'Is there a cat now?'."
    )


def _listed(sessions: list[dict[str, Any]]) -> str:
    names = ", ".join(str(each.get("stream", each["id"])) for each in sessions)
    return f"there are {names}" if names else "there is none"
