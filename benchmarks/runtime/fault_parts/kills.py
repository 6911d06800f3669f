"""kill -9 of the server, its viewer, a webhook receiver and an MQTT broker, at random moments."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import progress
from benchmarks.runtime.fault_parts.accounts import (
    Account,
    bugs_in,
    differing,
    out_of_order,
    viewers_trouble,
)
from benchmarks.runtime.fault_parts.mqtt_tap import MqttTap
from benchmarks.runtime.fault_parts.processes import (
    MOSQUITTO,
    Broker,
    Receiver,
    ServerVictim,
    Victim,
    Viewer,
    kept_in,
    wait_until,
)

MOST_BYTES = 6_000
"""Of the viewer's journal between two kills: some five alerts."""
IN_START = 0.1
"""Share of kills that do not wait for anything, so that some hit a program that is starting."""
SETTLE_S = 90.0
"""For what still waits at the end: the longest pause of the server's is 30 s."""


def kill_at_random(folder: Path, kills: int, seed: int, most_s: float) -> dict[str, Any]:
    """So many kills, or as many as there is time for. Returns the counts; `folder` holds pictures
    for the viewer in `pictures`."""
    chance = random.Random(seed)
    queue = folder / "queue.sqlite"
    receiver = Receiver(folder)
    options: dict[str, Any] = {"webhook": [receiver.url], "alert_queue": str(queue)}
    victims: dict[str, Victim] = {"receiver": receiver}
    tap: MqttTap | None = None
    if MOSQUITTO is not None:
        broker = victims["broker"] = Broker(folder)
        assert isinstance(broker, Broker)
        tap = MqttTap(broker.port)
        options["mqtt"] = [f"mqtt://127.0.0.1:{tap.port}/alerts"]
    server = victims["server"] = ServerVictim(folder, options)
    assert isinstance(server, ServerVictim)
    viewer = victims["viewer"] = Viewer(folder, server)
    assert isinstance(viewer, Viewer)
    killed: Counter[str] = Counter()
    server_kills: dict[int, float] = {}
    kept: dict[str, set[str]] = {"webhook": set(), "mqtt": set()}
    begin_s = time.monotonic()
    try:
        for victim in victims.values():
            victim.start()
        for number in range(kills):
            if time.monotonic() > begin_s + most_s:
                break
            if chance.random() >= IN_START:
                server.wait_ready()
                wanted = viewer.size + chance.randrange(MOST_BYTES)
                wait_until(lambda: viewer.size > wanted, "the viewer goes on")  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.05))
            name = chance.choice(sorted(victims))
            if name == "server":
                server_kills[server.starts] = time.time()
            victims[name].kill()
            killed[name] += 1
            if name == "server":
                for receiver_name, events in kept_in(queue, folder / "copy").items():
                    kept[receiver_name].update(events)
            time.sleep(chance.uniform(0.0, 0.2))
            victims[name].start()
            if (number + 1) % 50 == 0:
                progress(f"{number + 1} of {kills} kills: {dict(killed)}")
        server.wait_ready()
        wait_until(lambda: viewer.size > 0, "the viewer has begun")
        viewer.kill()
        told = viewer.told()
        arrived: dict[str, Callable[[], Counter[str]]] = {
            "webhook": lambda: Counter(line["id"] for line in receiver.lines())
        }
        if tap is not None:
            acknowledged = tap.acknowledged
            arrived["mqtt"] = lambda: Counter(acknowledged)

        def accounts() -> dict[str, Account]:
            return {
                name: Account(
                    told=told, kept=kept[name], arrived=count(), server_kills=server_kills
                )
                for name, count in arrived.items()
            }

        until_s = time.monotonic() + SETTLE_S
        while time.monotonic() < until_s:
            found = accounts().values()
            if not any(each.kept_and_lost or each.lost_without_excuse for each in found):
                break
            time.sleep(0.5)
        status = server.end()
        left = kept_in(queue, folder / "copy")
    finally:
        for victim in victims.values():
            if victim.is_running:
                victim.kill()
        if tap is not None:
            tap.close()
    final = accounts()
    lines = viewer.lines()
    result: dict[str, Any] = {
        "kills": killed.total(),
        "kills_asked_for": kills,
        "killed": dict(killed),
        "seconds": round(time.monotonic() - begin_s),
        "seed": seed,
        "receivers": {name: account.report() for name, account in final.items()},
        "webhook_same_key_other_body": differing(receiver.lines()),
        "webhook_out_of_order": out_of_order([line["id"] for line in receiver.lines()]),
        "viewer": {
            "sessions": sum("token" in line for line in lines),
            "events": sum("event" in line for line in lines),
            "ended_by": dict(Counter(line["over"] for line in lines if "over" in line)),
            "trouble": viewers_trouble(lines),
        },
        "left_in_the_queue": {name: len(events) for name, events in left.items()},
        "bugs_in_logs": bugs_in(server.log_text()) + bugs_in(viewer.log_text()),
    }
    if tap is None:
        result["left_out"] = {"broker": "mosquitto is not installed"}
    result["goals"] = {
        "nothing_kept_is_lost": not any(each.kept_and_lost for each in final.values()),
        "nothing_told_is_lost": not any(each.lost_without_excuse for each in final.values()),
        "twice_means_the_same": not result["webhook_same_key_other_body"],
        "begins_before_ends": not result["webhook_out_of_order"],
        "viewers_events_whole": not result["viewer"]["trouble"],
        "queue_is_empty": not left,
        "clean_end": status == 0,
        "no_tracebacks": not result["bugs_in_logs"],
    }
    return result
