"""A viewer that may be killed at any moment: a process of its own, light to start.

python -m benchmarks.runtime.fault_parts.client ADDRESS JOURNAL SEED GENERATION

It shows pictures, sets alerts that begin at once, removes them and asks. Each event goes into the
journal, a line each, in a single write, so that a killed one has either the whole line or nothing.
Who begins with a journal goes on with its last session. The file GENERATION holds the number of the
server's start, written before it starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from edge_vlm.errors import EdgeVlmError, ServerBusy, ServerUnreachable
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import ResumePoint
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered

TURNS = 40
"""Of one session; then another begins."""
QUESTION = "Is there a dog now?"


def alert_key(session_id: str, event: AlertTriggered | AlertCleared) -> str:
    """The `id` under which receivers get it."""
    kind = protocol.tag_of(type(event))
    return f"{session_id}/{event.alert_id}/{event.episode}/{kind}"


class Journal:
    """Lines of JSON, each written at once."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"at": time.time(), **fields}) + "\n").encode())

    def event(self, session_id: str, event: protocol.ServerEvent) -> None:
        line: dict[str, Any] = {"session": session_id, "event": event.sequence}
        if isinstance(event, (AlertTriggered, AlertCleared)):
            line["told"] = alert_key(session_id, event)
        elif isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            line["frame"] = event.frame_sequence
        elif isinstance(event, protocol.ResponseDone):
            line["answer"] = event.status
        if event.sequence:  # 0: about the connection
            self.write(**line)


def last_point(path: Path) -> ResumePoint | None:
    """Where the session that the journal ends with can be gone on with."""
    point: ResumePoint | None = None
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "token" in line:
            point = ResumePoint(
                session_id=line["session"], resume_token=line["token"], last_sequence=line["event"]
            )
        elif "event" in line and point is not None:
            point = ResumePoint(
                session_id=point.session_id,
                resume_token=point.resume_token,
                last_sequence=line["event"],
            )
        elif "over" in line:
            point = None
    return point


async def open_session(
    address: str, journal: Journal, point: ResumePoint | None, generation: Path
) -> Client:
    """Raises what the server says."""
    if point is not None:
        session_id = point.session_id
        return await Client.resume(
            address, point, on_event=lambda event: journal.event(session_id, event)
        )
    before = generation.read_text()  # noqa: ASYNC240 (a few bytes, and nobody else waits)
    client = await Client.connect(address)  # what comes before `on_event` is set is created alone
    created = client.created
    assert isinstance(created, protocol.SessionCreated)
    # Whose session it is cannot be told, if there is another server by now.
    if generation.read_text() != before:  # noqa: ASYNC240
        await client.close()
        raise ServerUnreachable("it was killed meanwhile")
    journal.write(
        session=created.session_id,
        token=created.resume_token,
        event=created.sequence,
        generation=int(before),
    )
    client.on_event = lambda event: journal.event(created.session_id, event)
    await client.update({"delivery": "wait", "drop_duplicates": False, "max_answer_tokens": 8})
    return client


async def work(client: Client, journal: Journal, jpegs: list[bytes], chance: random.Random) -> None:
    """One session, until its end."""
    for alert in await client.list_alerts():  # of a client that was killed
        await client.delete_alert(alert.alert_id)
    watched: list[str] = []
    for turn in range(TURNS):
        await client.send_frame(jpegs[turn % len(jpegs)])
        if chance.random() < 0.2:
            await client.ask(QUESTION)
        if len(watched) < 3:
            status = await client.create_alert(QUESTION, on_threshold=1e-6, off_threshold=1e-7)
            watched.append(status.alert_id)
        else:
            await client.delete_alert(watched.pop(0))
        await client.wait_processed()
    for alert_id in watched:
        await client.delete_alert(alert_id)
    newest = client.resume_point.last_sequence
    await client.close()
    journal.write(over="closed", newest=newest)


async def main(address: str, path: Path, seed: int, generation: Path) -> None:
    chance = random.Random(seed)
    jpegs = [file.read_bytes() for file in sorted((path.parent / "pictures").iterdir())]
    point = last_point(path)
    journal = Journal(path)
    while True:
        try:
            client = await open_session(address, journal, point, generation)
        except (ServerUnreachable, ServerBusy):  # it was killed, and starts again
            await asyncio.sleep(0.05)
            continue
        except EdgeVlmError as error:
            journal.write(over=error.code)
            point = None
            continue
        point = None
        try:
            await work(client, journal, jpegs, chance)
        except EdgeVlmError as error:
            await client.close()
            journal.write(over=error.code)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
