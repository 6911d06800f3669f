"""Does anything grow in a server that is used for hours? With the demo bundle, in one process.

    python -m benchmarks.runtime.soak                                   # two hours
    python -m benchmarks.runtime.soak --seconds 60 --cameras 2 --viewers 3 --out small.json

Eight streams at 4 frames a second: cameras of the server's own, each with an alert, a steady viewer
that asks all the time, and restless ones: they ask, cancel, set and remove alerts, change settings
(wrongly, too), are cut off and come back, go without a word, hand their session over to another
client. Besides there are subscribers (one never reads), HTTP requests on connections of their own,
and a configuration that is read anew. Alerts go to a webhook receiver.

Goals: nothing grows. For each figure the slope an hour, behind a warm-up of a fifth of the time,
has a 95 % interval; it grows if that is above zero and the slope above what is stated as noise
(`tolerance`). And: every frame has one outcome, every begin and end of an alert that a viewer was
told of reaches the receiver, no error but those provoked, and the server ends cleanly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.harness import (
    RESULTS,
    ROOT,
    commit,
    progress,
    result_head,
    script_parser,
    write_result,
)
from benchmarks.runtime.loads.soak_load import Load, Receiver
from benchmarks.runtime.slopes import GROWS, Series, judged, slope_of
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER

WARM_UP = 0.2
"""Share of the time."""
FILM_MARGIN_S = 120.0
"""Of film behind the end of what is measured."""
ARRIVAL_S = 30.0
"""For alerts that are still on their way at the end."""
TOLERANCES: dict[str, tuple[float, float]] = {
    "rss_mb": (0.0, 0.005),
    "anonymous_mb": (0.0, 0.005),
    "descriptors": (0.5, 0.0),
    "threads": (0.5, 0.0),
    "python_objects": (0.0, 0.005),
    "kv_tokens": (0.0, 0.02),
    "frames_waiting": (0.2, 0.0),
    "questions_waiting": (0.2, 0.0),
    "ttft_p50_ms": (0.0, 0.03),
    "ttft_p95_ms": (0.0, 0.05),
    "server_cores": (0.0, 0.03),
}
"""Slopes an hour that are called noise: in the figure's unit, or as a share of its level."""


def write_film(path: Path, seconds: float, fps: float) -> None:
    """The demo clip, over and over: encoded once, its packets written again with later times."""
    frames = [rgb for _, rgb in read_video(DEMO_FOLDER / "clip.mp4", fps)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=round(fps))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = len(frames)
        packets = []
        for rgb in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            packets += [(p.is_keyframe, bytes(p)) for p in stream.encode(picture)]
        packets += [(p.is_keyframe, bytes(p)) for p in stream.encode()]
        base = stream.codec_context.time_base
        for turn in range(int(seconds * fps / len(frames)) + 1):
            for number, (is_key, data) in enumerate(packets):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, base
                packet.pts = packet.dts = turn * len(packets) + number
                packet.is_keyframe = is_key
                container.mux(packet)


def write_config(
    path: Path, cameras: Sequence[str], fps: float, webhook: str, keep_ratio: float
) -> None:
    tables = [f'port = 0\nmax_sessions = 16\nwebhook = ["{webhook}"]\n']
    tables += [
        f'[[camera]]\nname = "{name}"\nsource = "film.mp4"\nfps = {fps}\n'
        f"keep_ratio = {keep_ratio}\n"
        f'[[alert]]\nname = "dog"\ncamera = "{name}"\nquestion = "Is there a dog now?"\n'
        for name in cameras
    ]
    written = path.with_suffix(".new")
    written.write_text("".join(tables))
    written.replace(path)


class Sampler:
    """Figures of the server's process and its metrics page."""

    def __init__(self, pid: int, address: str, objects: Path, load: Load, begin_s: float) -> None:
        self._pid, self._address, self._objects, self.load = pid, address, objects, load
        self._begin_s = begin_s
        self._before = (begin_s, self._cpu_s(), _busy_s(), time.process_time())
        self.rows: list[dict[str, float]] = []

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sample(self) -> None:
        """Waits for the server: not for the event loop."""
        page = _get(self._address, "/metrics").decode()
        now_s = time.monotonic()
        status = Path(f"/proc/{self._pid}/status").read_text()
        rollup = Path(f"/proc/{self._pid}/smaps_rollup").read_text()
        after = (now_s, self._cpu_s(), _busy_s(), time.process_time())
        took_s, server_s, busy_s, own_s = (b - a for a, b in zip(self._before, after, strict=True))
        self._before = after
        seen = self.load.seen
        waiting, seen.waiting = list(seen.waiting.values()), {}
        self.rows.append(
            {
                "at_s": round(now_s - self._begin_s, 2),
                "rss_mb": _figure(r"^VmRSS:\s+(\d+)", status) / 1024,
                "anonymous_mb": _figure(r"^Anonymous:\s+(\d+)", rollup) / 1024,
                "descriptors": len(os.listdir(f"/proc/{self._pid}/fd")),
                "threads": _figure(r"^Threads:\s+(\d+)", status),
                "kv_tokens": _figure(r"^edge_vlm_kv_tokens (\S+)", page),
                "sessions": _figure(r"^edge_vlm_sessions_active (\S+)", page),
                "frames_waiting": sum(frames for frames, _ in waiting),
                "questions_waiting": sum(questions for _, questions in waiting),
                "server_cores": server_s / took_s,
                "others_cores": max(0.0, busy_s - server_s - own_s) / took_s,
                "load_average": os.getloadavg()[0],
            }
        )

    def series(self, name: str) -> Series:
        return [(row["at_s"], row[name]) for row in self.rows]

    def objects(self, begun: float) -> list[tuple[float, dict[str, Any]]]:
        """What `counted_server` wrote; `begun`: the time of day at the begin."""
        if not self._objects.exists():
            return []
        lines = [json.loads(line) for line in self._objects.read_text().splitlines()]
        return [(line["at"] - begun, line) for line in lines if line["at"] >= begun]


def _get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=600) as reply:
        data: bytes = reply.read()
    return data


def _figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:500]}")
    return float(found[1])


def _busy_s() -> float:
    """Processor time of the whole machine that was not idle."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def judge(sampler: Sampler, seconds: float, begun: float) -> dict[str, Any]:
    """Of each figure: its slope behind the warm-up, and whether it grows."""
    begin_s = WARM_UP * seconds
    slopes = {
        name: slope_of(sampler.series(name), begin_s, seconds)
        for name in TOLERANCES
        if sampler.rows and name in sampler.rows[0]
    }
    ttft_ms = [(at, 1e3 * value) for at, value in sampler.load.seen.ttft_s]
    for share in (50, 95):
        of_block = partial(_percentile, share)
        slopes[f"ttft_p{share}_ms"] = slope_of(ttft_ms, begin_s, seconds, of_block)
    objects = [(at, float(line["objects"])) for at, line in sampler.objects(begun)]
    slopes["python_objects"] = slope_of(objects, begin_s, seconds)
    judgements = {}
    for name, (absolute, relative) in TOLERANCES.items():
        slope = slopes[name]
        level = 0.0 if slope is None else abs(slope.level)
        judgements[name] = judged(slope, absolute + relative * level)
    return judgements


def _percentile(share: int, values: Sequence[float]) -> float:
    return float(np.percentile(values, share))


def grown_types(objects: Sequence[tuple[float, dict[str, Any]]], begin_s: float) -> dict[str, int]:
    """By type, how many more Python objects there are in the last fifth than behind the warm-up."""
    settled = [line["types"] for at, line in objects if at >= begin_s]
    if len(settled) < 10:
        return {}
    fifth = len(settled) // 5
    names = set(settled[0]) & set(settled[-1])
    before, after = (
        {name: np.mean([each.get(name, 0) for each in part]) for name in names}
        for part in (settled[:fifth], settled[-fifth:])
    )
    more = {name: round(float(after[name] - before[name])) for name in names}
    return dict(sorted(((n, m) for n, m in more.items() if m), key=lambda item: -item[1])[:10])


async def measure(
    server: subprocess.Popen[str],
    address: str,
    args: argparse.Namespace,
    folder: Path,
    hook: Receiver,
) -> dict[str, Any]:
    cameras = [f"camera{number}" for number in range(args.cameras)]
    jpegs = [encode_jpeg(rgb) for _, rgb in read_video(DEMO_FOLDER / "clip.mp4", 2.0)]
    port = int(address.rpartition(":")[2])
    begin_s, begun = time.monotonic(), time.time()
    load = Load(port, jpegs, fps=args.fps, action_s=args.action_seconds, seconds=args.seconds)
    sampler = Sampler(server.pid, address, folder / "objects.jsonl", load, begin_s)
    running = asyncio.create_task(load.run(args.viewers - 1, cameras))
    reloads = 0
    told_s = begin_s
    while not running.done() and time.monotonic() < begin_s + args.seconds:
        await asyncio.wait([running], timeout=args.sample_seconds)
        await asyncio.to_thread(sampler.sample)
        if reloads < (time.monotonic() - begin_s) // max(args.seconds / 60, 10.0):
            reloads += 1
            write_config(folder / "soak.toml", cameras, args.fps, hook.url, (0.5, 0.3)[reloads % 2])
            server.send_signal(signal.SIGHUP)
        if time.monotonic() - told_s >= 60:
            told_s = time.monotonic()
            _tell(sampler, load)
            interim = {"slopes": judge(sampler, told_s - begin_s, begun), "samples": sampler.rows}
            write_result(args.out.with_suffix(".interim.json"), interim)
    await running
    wanted = load.seen.alert_ids
    until_s = time.monotonic() + ARRIVAL_S
    while wanted - set(hook.ids) and time.monotonic() < until_s:  # noqa: ASYNC110
        await asyncio.sleep(0.1)  # a thread fills it
    slopes = judge(sampler, args.seconds, begun)
    half = {
        name: judged(slope_of(sampler.series(name), args.seconds / 2, args.seconds), 0.0)
        for name in ("rss_mb", "anonymous_mb")
    }
    seen = load.seen
    every = max(1, len(sampler.rows) // 120)
    result: dict[str, Any] = {
        "streams": args.cameras + args.viewers,
        "fps_each": args.fps,
        "seconds": args.seconds,
        "warm_up_s": WARM_UP * args.seconds,
        "commit": commit(),
        "load_average": _mean(sampler, "load_average"),
        "cores": {
            "there_are": os.cpu_count(),
            "server": _mean(sampler, "server_cores"),
            "others_on_the_machine": _mean(sampler, "others_cores"),
        },
        "slopes": slopes,
        "second_half": half,
        "whole_collections": max(
            (line["whole_collections"] for _, line in sampler.objects(begun)), default=0
        ),
        "types_that_grew": grown_types(sampler.objects(begun), WARM_UP * args.seconds),
        "done": dict(seen.done.most_common()) | {"configurations": reloads},
        "errors": dict(seen.errors),
        "frames": dict(seen.frames),
        "alerts": {
            "told": len(wanted),
            "missing": len(wanted - set(hook.ids)),
            "arrived": len(hook.ids),
            "twice": sum(count > 1 for count in hook.ids.values()),
        },
        "samples": [{k: round(v, 3) for k, v in row.items()} for row in sampler.rows[::every]],
    }
    result["goals"] = {
        "nothing_grows": all(each["verdict"] != GROWS for each in slopes.values()),
        "each_frame_one_outcome": seen.frames["wrong"] == 0 < seen.frames["sent"],
        "alerts_arrived": result["alerts"]["missing"] == 0 < len(wanted),
        "no_errors": not seen.errors,
    }
    return result


def _tell(sampler: Sampler, load: Load) -> None:
    row = sampler.rows[-1]
    ttft = [value for at, value in load.seen.ttft_s if at > row["at_s"] - 60] or [0.0]
    progress(
        f"{row['at_s']:.0f} s: {row['rss_mb']:.1f} MB, {row['anonymous_mb']:.1f} anonymous, "
        f"{row['descriptors']:.0f} descriptors, {row['threads']:.0f} threads, "
        f"{row['kv_tokens']:.0f} tokens, TTFT {1e3 * float(np.median(ttft)):.0f} ms, "
        f"{row['server_cores']:.2f} cores, others {row['others_cores']:.2f}; "
        f"errors {dict(load.seen.errors)}"
    )


def _mean(sampler: Sampler, name: str) -> float:
    return round(float(np.mean([row[name] for row in sampler.rows])), 3)


def serve_and_measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """On a server in a process of its own."""
    hook = Receiver()
    write_film(folder / "film.mp4", args.seconds + FILM_MARGIN_S, args.fps)
    cameras = [f"camera{number}" for number in range(args.cameras)]
    write_config(folder / "soak.toml", cameras, args.fps, hook.url, 0.5)
    period_s = max(0.5, args.seconds / 200)
    counted = [
        "benchmarks.runtime.loads.counted_server",
        str(folder / "objects.jsonl"),
        str(period_s),
    ]
    command = ["serve", "--bundle", str(DEMO_BUNDLE), "--config", str(folder / "soak.toml")]
    log = args.out.with_suffix(".server.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", *counted, *command, "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        ) as server,
    ):
        try:
            assert server.stdout is not None
            found = re.search(r"//([\d.]+:\d+)/", server.stdout.readline())
            if found is None:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            result = asyncio.run(measure(server, found[1], args, folder, hook))
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(600)
            hook.close()
    result["goals"]["clean_end"] = status == 0
    result["log_lines"] = len(log.read_text().splitlines())
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':18} {'level':>10} {'an hour':>10}   {'95 % interval':24} verdict"]
    for name, found in result["slopes"].items():
        if "level" in found:
            low, high = found["interval"]
            span = f"{low:+.4g} .. {high:+.4g}"
            figures = f"{found['level']:10.4g} {found['per_hour']:+10.4g}   {span:24}"
        else:
            figures = f"{'-':>10} {'-':>10}   {found['why']:24}"
        lines.append(f"{name:18} {figures} {found['verdict']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "soak.json")
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--cameras", type=int, default=3, help="of the server's own")
    parser.add_argument("--viewers", type=int, default=5, help="who bring pictures; one is steady")
    parser.add_argument("--fps", type=float, default=4.0, help="of each stream")
    parser.add_argument("--action-seconds", type=float, default=1.5, help="between two actions")
    parser.add_argument("--sample-seconds", type=float, default=5.0, help="between two samples")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = serve_and_measure(args, Path(folder))
    write_result(args.out, {**result_head(__file__, argv, torch.device("cpu")), **result})
    print(table(result))
    print(json.dumps({key: result[key] for key in ("done", "errors", "frames", "alerts", "goals")}))
    return 0 if all(result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
