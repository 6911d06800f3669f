"""Full and frozen disks, a clock that is set, SIGTERM in the middle of answers."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.runtime.fault_parts.client import QUESTION, alert_key
from benchmarks.runtime.fault_parts.processes import (
    PARTS,
    Receiver,
    ServerVictim,
    kept_in,
    wait_until,
)
from benchmarks.runtime.fault_parts.viewer import SETTINGS, SteadyViewer
from benchmarks.runtime.loads.soak_load import Relay
from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered

DISK_BYTES = 1 << 20
TURNS = 4
"""Answers of the viewer, at least, in each state of the disk or clock."""
SHIFTS_S = (3 * 3600, -5 * 3600, 40 * 24 * 3600, 0)
ARRIVAL_S = 60.0


class NotHere(Exception):
    """This machine cannot show the fault."""


def jpegs_of(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "pictures").iterdir())]


def _arrived(receiver: Receiver, viewer: SteadyViewer) -> Callable[[], bool]:
    return lambda: not set(viewer.told) - {line["id"] for line in receiver.lines()}


async def _until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what, ARRIVAL_S)


def _ended(server: ServerVictim, receiver: Receiver, viewer: SteadyViewer) -> dict[str, Any]:
    """Both are ended in order; what every case states."""
    status = server.end()
    receiver.kill()
    ids = {line["id"] for line in receiver.lines()}
    log = server.log_text()
    return {
        "viewer": viewer.report(),
        "alerts_missing": sorted(set(viewer.told) - ids),
        "log": [
            (line.partition(" WARNING ")[2] or line).replace(str(receiver.path.parent), "FOLDER")
            for line in log.splitlines()
        ][:20],
        "goals": {
            "alerts_arrived": not set(viewer.told) - ids and bool(viewer.told),
            "each_frame_one_outcome": viewer.report()["frames_without_one_outcome"] == 0,
            "all_answered": viewer.asked == len(viewer.answers) > 0,
            "clean_end": status == 0,
            "no_tracebacks": "Traceback" not in log,
        },
    }


def _run(
    server: ServerVictim,
    receiver: Receiver,
    work: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
) -> dict[str, Any]:
    receiver.start()
    server.start()
    try:
        server.wait_ready()
        return asyncio.run(work())
    finally:
        for victim in (server, receiver):
            if victim.is_running:
                victim.kill()


# ---- disks -----------------------------------------------------------------------------------


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    """Raises NotHere."""
    folder.mkdir()
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHere(f"mount {' '.join(options)}: needs root: {error}") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


class _SmallDisk:
    """A tmpfs; where none may be mounted, a limit on the size of the server's files."""

    def __init__(self, folder: Path, is_mounted: bool) -> None:
        self._folder, self._is_mounted = folder, is_mounted
        self.kind = f"tmpfs of {DISK_BYTES} bytes" if is_mounted else "RLIMIT_FSIZE"

    def fill(self, server: ServerVictim) -> None:
        if not self._is_mounted:
            sizes = [file.stat().st_size for file in self._folder.glob("queue.sqlite*")]
            limits = (max(sizes), resource.RLIM_INFINITY)  # the log, a file too, is shorter
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)
            return
        with open(self._folder / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def free(self, server: ServerVictim) -> None:
        if self._is_mounted:
            (self._folder / "filler").unlink()
        else:
            limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def _small_disk(folder: Path) -> Iterator[_SmallDisk]:
    try:
        with _mounted(folder, "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"):
            yield _SmallDisk(folder, is_mounted=True)
    except NotHere:
        yield _SmallDisk(folder, is_mounted=False)


def full_disk(folder: Path) -> dict[str, Any]:
    """The disk of the alert queue and the recordings is full while the receiver is away; then there
    is room again, the server is killed and goes on with what its queue held."""
    receiver = Receiver(folder)
    with _small_disk(folder / "disk") as disk:
        queue = folder / "disk" / "queue.sqlite"
        recordings = folder / "disk" / "recordings"
        options = {
            "webhook": [receiver.url],
            "alert_queue": str(queue),
            "record": str(recordings),
            "evidence": "none",
        }
        server = ServerVictim(folder, options)

        async def work() -> dict[str, Any]:
            async with SteadyViewer(server.address, jpegs_of(folder)) as viewer:
                begin_s = time.monotonic()
                await viewer.goes_on(TURNS)
                receiver.kill()
                full_s = time.monotonic()
                disk.fill(server)
                await _until(
                    lambda: "wait in memory alone" in server.log_text(), "a full disk is said"
                )
                await viewer.goes_on(TURNS)
                disk.free(server)
                room_s = time.monotonic()
                await _until(
                    lambda: "takes alert events again" in server.log_text(), "room is noticed"
                )
            # all is told, nobody took it: the file alone carries it over the kill
            told = set(viewer.told) - {line["id"] for line in receiver.lines()}

            def is_kept() -> bool:
                kept = kept_in(queue, folder / "copy").get("webhook", [])
                return not told - set(kept)

            await _until(is_kept, "the file holds what waits")
            server.kill()
            log = server.log_text()
            replayed = [_replayed(file) for file in sorted(recordings.glob("*.evlm"))]
            receiver.start()
            server.start()
            server.wait_ready()
            await _until(_arrived(receiver, viewer), "what was kept arrives")
            result = _ended(server, receiver, viewer)
            result["disk"] = disk.kind
            result["carried_over_the_kill"] = len(told)
            result["answer_ms"] = {
                "before": viewer.answer_ms(begin_s, full_s),
                "full": viewer.answer_ms(full_s, room_s),
            }
            result["goals"]["said_once"] = log.count("wait in memory alone") == 1
            result["goals"]["recording_ends_with_a_word"] = "recording" in log
            result["goals"]["recordings_can_be_read"] = bool(replayed) and all(
                status == 0 for status, _ in replayed
            )
            if not result["goals"]["recordings_can_be_read"]:
                result["replayed"] = replayed
            return result

        return _run(server, receiver, work)


def _replayed(file: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "edge_vlm", "replay", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return done.returncode, (done.stdout + done.stderr)[-500:]


def _freeze(how: str, disk: Path) -> None:
    subprocess.run(["fsfreeze", how, str(disk)], check=True)


def frozen_disk(folder: Path, seconds: float = 5.0) -> dict[str, Any]:
    """The disk of the alert queue and the recordings stands still (fsfreeze). Raises NotHere."""
    if shutil.which("fsfreeze") is None or os.geteuid() != 0:
        raise NotHere("fsfreeze: needs root")
    receiver = Receiver(folder)
    image, disk = folder / "image", folder / "disk"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHere(f"mkfs.ext4: {error}") from error
    with _mounted(disk, "-o", "loop", str(image)):
        options = {
            "webhook": [receiver.url],
            "alert_queue": str(disk / "queue.sqlite"),
            "record": str(disk / "recordings"),
            "evidence": "none",
        }
        server = ServerVictim(folder, options)

        async def work() -> dict[str, Any]:
            async with SteadyViewer(server.address, jpegs_of(folder)) as viewer:
                begin_s = time.monotonic()
                await viewer.goes_on(TURNS)
                frozen_s = time.monotonic()
                _freeze("-f", disk)
                try:
                    while time.monotonic() < frozen_s + seconds:
                        await viewer.goes_on(1)
                    known = set(viewer.told)
                    await _until(
                        lambda: not known - {line["id"] for line in receiver.lines()},
                        "alerts arrive though the disk stands still",
                    )
                finally:
                    _freeze("-u", disk)
                thawed_s = time.monotonic()
                await viewer.goes_on(TURNS)
            await _until(_arrived(receiver, viewer), "all alerts arrive")
            result = _ended(server, receiver, viewer)
            result["frozen_s"] = round(thawed_s - frozen_s, 1)
            result["answer_ms"] = {
                "before": viewer.answer_ms(begin_s, frozen_s),
                "frozen": viewer.answer_ms(frozen_s, thawed_s),
            }
            left = kept_in(disk / "queue.sqlite", folder / "copy")
            result["goals"]["queue_is_empty"] = not left
            return result

        return _run(server, receiver, work)


# ---- the clock -------------------------------------------------------------------------------


def _write_over(path: Path, data: bytes) -> None:
    """In place: the file is mapped."""
    with open(path, "r+b", buffering=0) as file:
        file.write(data)


def clock_jumps(folder: Path) -> dict[str, Any]:
    """The time of day jumps by hours and days, forth and back. Raises NotHere."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise NotHere("no C compiler, or no Linux")
    library, shift = folder / "clock_shift.so", folder / "shift"
    source = str(PARTS / "clock_shift.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    shift.write_bytes(struct.pack("=q", 0))
    environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(shift)}
    receiver = Receiver(folder)
    options = {
        "webhook": [receiver.url],
        "alert_queue": str(folder / "queue.sqlite"),
        "record": str(folder / "recordings"),
    }
    server = ServerVictim(folder, options, environment)

    async def work() -> dict[str, Any]:
        async with (
            Relay(server.port) as relay,
            SteadyViewer(relay.address, jpegs_of(folder)) as viewer,
        ):
            await viewer.goes_on(TURNS)
            for seconds in SHIFTS_S:
                _write_over(shift, struct.pack("=q", seconds))
                await viewer.goes_on(TURNS)
                relay.cut()  # who is away meanwhile is waited for all the same
                await viewer.goes_on(TURNS)
            reconnects = viewer.client.reconnects
        await _until(_arrived(receiver, viewer), "all alerts arrive")
        result = _ended(server, receiver, viewer)
        days = {line["said_at"][:10] for line in receiver.lines()}
        result["shifts_s"] = SHIFTS_S
        result["reconnects"] = reconnects
        result["days_in_alerts"] = sorted(days)
        result["goals"]["came_back_each_time"] = reconnects == len(SHIFTS_S)
        result["goals"]["clock_was_set"] = len(days) > 1
        return result

    return _run(server, receiver, work)


# ---- SIGTERM ---------------------------------------------------------------------------------


def sigterm_in_answers(folder: Path, times: int) -> dict[str, Any]:
    """SIGTERM behind the first piece of an answer, with an alert that is active."""
    receiver = Receiver(folder)
    server = ServerVictim(folder, {"webhook": [receiver.url]})
    seen: dict[str, Any] = {
        "times": times,
        "answers": {},
        "told": 0,
        "went_away": 0,
        "statuses": [],
    }
    without: list[int] = []
    told: set[str] = set()
    receiver.start()
    try:
        for number in range(times):
            server.start()
            server.wait_ready()
            status, missing = asyncio.run(_stopped(server, jpegs_of(folder), number, seen, told))
            seen["statuses"].append(status)
            without += missing
    finally:
        for victim in (server, receiver):
            if victim.is_running:
                victim.kill()
    ids = {line["id"] for line in receiver.lines()}
    log = server.log_text()
    seen["told"] = len(told)
    seen["goals"] = {
        "alerts_arrived": bool(told) and not told - ids,
        "ends_of_alerts_told": sum(each.endswith("/alert.cleared") for each in ids) == times,
        "each_frame_one_outcome": not without,
        "each_answer_ended": sum(seen["answers"].values()) == times,
        "said_goodbye": seen["went_away"] == times,
        "clean_end": not any(seen["statuses"]),
        "no_tracebacks": "Traceback" not in log,
    }
    return seen


async def _stopped(
    server: ServerVictim, jpegs: list[bytes], number: int, seen: dict[str, Any], told: set[str]
) -> tuple[int, list[int]]:
    """One server is stopped; returns its status, and frames without an outcome."""
    begun = asyncio.Event()
    outcomes: set[int] = set()
    client = await Client.connect(server.address, {**SETTINGS, "max_answer_tokens": 48})

    def take(event: protocol.ServerEvent) -> None:
        if isinstance(event, (AlertTriggered, AlertCleared)):
            told.add(alert_key(client.created.session_id, event))
        elif isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            outcomes.add(event.frame_sequence)
        elif isinstance(event, protocol.ResponseOutputTextDelta):
            begun.set()
        elif isinstance(event, protocol.ResponseDone):
            seen["answers"][event.status] = seen["answers"].get(event.status, 0) + 1
        elif isinstance(event, protocol.SessionGoAway):
            seen["went_away"] += 1

    client.on_event = take
    for jpeg in jpegs[: 3 + number % 3]:
        await client.send_frame(jpeg)
    await client.create_alert(QUESTION, on_threshold=1e-6, off_threshold=1e-7)
    await client.wait_processed()
    await client.start_answer(QUESTION)
    await begun.wait()
    sent = [await client.send_frame(jpeg) for jpeg in jpegs[6:9]]
    status = await asyncio.to_thread(server.end)
    with suppress(EdgeVlmError):  # it is gone: what it said before counts
        await client.wait_processed()
    await client.close()
    return status, sorted(set(range(1, sent[-1] + 1)) - outcomes)
