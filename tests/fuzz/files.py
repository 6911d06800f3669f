"""Formats that are read without torch, each with a file that is in order."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import shutil
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.errors.words import visible
from edge_vlm.evaluation.log import AnswerLog
from edge_vlm.evaluation.qa_jsonl import count_questions, read_question_file
from edge_vlm.evaluation.runs import ClipAnswers
from edge_vlm.formats.alert_set import INDEX as EVENTS
from edge_vlm.formats.alert_set import Footage, LabelledAlert, read_event_set, write_event_set
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm.formats.calibration import (
    Calibration,
    CalibrationTable,
    ModelIdentity,
    Provenance,
    Threshold,
)
from edge_vlm.formats.inspect_bundle import describe_bundle
from edge_vlm.formats.qa_set import INDEX as CLIPS
from edge_vlm.formats.qa_set import (
    AskedQuestion,
    ClipQuestions,
    read_question_set,
    write_question_set,
)
from edge_vlm.json_text import MALFORMED
from edge_vlm.text.subtitles import near_frames, read_subtitles, subtitle_text
from edge_vlm_runtime.alert_sinks.queue import DeliveryQueue
from edge_vlm_runtime.alert_sinks.signature import Signer
from edge_vlm_runtime.alert_sinks.tables import read_sinks
from edge_vlm_runtime.alert_sinks.template import JSON_TYPE, BodyTemplate
from edge_vlm_runtime.bench.compare import comparison, read_comparable
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.arguments import Option, flat
from edge_vlm_runtime.cli.common.config import read_toml, resolve
from edge_vlm_runtime.cli.common.options import serve_options
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.cuda import Gpu
from edge_vlm_runtime.engines.store import EngineStore, Fingerprint
from edge_vlm_runtime.inference.bundle_model import _prompt as prompt_of
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.recording.file import MAGIC, RECORD, Recording
from edge_vlm_runtime.recording.replay import beginning_of, what_came
from edge_vlm_runtime.session.budget import cache_capacity, default_settings
from edge_vlm_training.data.records import read_records
from tests.fuzz.harness import Format
from tests.runtime.cameras.pictures import jpeg

GPU = Gpu(name="Orin", capability="sm_87")
ROOT = Path(__file__).parents[2]

# ---- bundles -------------------------------------------------------------------------------------


@functools.cache
def demo() -> EngineBundle:
    return EngineBundle.open(DEMO_BUNDLE)


def bundle_at(folder: Path) -> EngineBundle:
    """The demo bundle with the files that lie there: whoever made those has made the hashes too."""
    bundle = EngineBundle(**{name: getattr(demo(), name) for name in vars(demo())})
    object.__setattr__(bundle, "path", folder)
    return bundle


def copy_of(file: str) -> Any:
    def make(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(DEMO_BUNDLE / file, folder / file)

    return make


def read_table(folder: Path) -> None:
    table = bundle_at(folder).embed_table
    table[:2].copy()


def make_array(folder: Path) -> None:
    np.save(folder / "embed_table.npy", np.ones((6, 4), np.float32))


def read_reference(folder: Path) -> None:
    bundle_at(folder).reference("llm")


def make_reference(folder: Path) -> None:
    (folder / "reference").mkdir()
    np.savez_compressed(folder / "reference" / "llm.npz", a=np.ones((2, 3)), b=np.arange(5))


def use_tokenizer(folder: Path) -> None:
    form = prompt_of(bundle_at(folder))
    ids = form.question_ids("is there a red ball ? <|im_end|> \U0001f4a5").tolist()
    form.tokenizer.decode(ids)
    with contextlib.suppress(*MALFORMED):  # as answers of a given form do
        form.tokenizer.token_bytes()
    form.frame_ids(1.5, 4, True)


def linked_bundle(folder: Path) -> Path:
    """The demo bundle; its files but the manifest are shared, and large ones are not vouched for:
    their digests take long."""
    for path in DEMO_BUNDLE.rglob("*"):
        target = folder / path.relative_to(DEMO_BUNDLE)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.name != MANIFEST:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    data = json.loads((DEMO_BUNDLE / MANIFEST).read_text())
    named = [name for name in data["files"] if not name.endswith((".weights", ".npz"))]
    data["files"] = {name: sha256_of_file(folder / name) for name in named}
    (folder / MANIFEST).write_text(json.dumps(data))


def open_bundle(folder: Path) -> None:
    """What a server does before it loads graphs, and what `inspect` says."""
    bundle = EngineBundle.open(folder)
    model, limits = ModelLimits.from_bundle(bundle), ServerLimits()
    chosen = default_settings(bundle, limits)
    assert 1 <= cache_capacity(model, limits) <= model.max_positions
    assert chosen.max_answer_tokens <= model.max_positions
    assert bundle.name.isprintable()
    describe(folder)


def describe(folder: Path) -> None:
    report = describe_bundle(folder)
    assert all(line.isprintable() for line in report.text().splitlines())
    report.json()


def plan_of_bundle(folder: Path) -> None:
    """The hashes are those of the files that lie there."""
    write_manifest(folder)
    describe(folder)


def make_plan(folder: Path) -> None:
    linked_bundle(folder)
    (folder / "precision_plan.json").unlink()
    shutil.copy(DEMO_BUNDLE / "precision_plan.json", folder)


# ---- recordings ----------------------------------------------------------------------------------


def make_recording(folder: Path) -> None:
    from tests.runtime.session.test_recording import recorded_session

    recorded_session(folder / "session.evlm", 3)


def unpack_recording(data: bytes) -> list[list[Any]]:
    """Records as their fields and their picture."""
    found, at = [], len(MAGIC)
    while at < len(data):
        length, _ = RECORD.unpack_from(data, at)
        payload = data[at + RECORD.size : at + RECORD.size + length]
        line, _, picture = payload.partition(b"\n")
        found.append([json.loads(line), picture])
        at += RECORD.size + length
    return found


def pack_recording(records: list[list[Any]]) -> bytes:
    out = [MAGIC]
    for fields, picture in records:
        if not isinstance(picture, bytes):
            raise TypeError("a record ends with bytes")
        payload = json.dumps(fields).encode() + b"\n" + picture
        out.append(RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
    return b"".join(out)


def read_recording(folder: Path) -> None:
    from tests.runtime.session.test_recording import replayed

    file = folder / "session.evlm"
    with Recording.open(file) as recording:
        beginning_of(recording)
        for _ in what_came(recording):
            pass
    replayed(file)


# ---- evaluation ----------------------------------------------------------------------------------


def unpack_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def pack_lines(value: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in value)


def make_questions(folder: Path) -> None:
    (folder / "a.mp4").touch()
    lines: list[dict[str, Any]] = [
        {"video": "a.mp4", "question": "How many?", "answer": "2", "kind": "count", "at_s": 1.5},
        {"video": "a.mp4", "question": "Where?", "answer": ["x", "y"], "boxes": [[0.5] * 4]},
    ]
    (folder / "qa.jsonl").write_bytes(pack_lines(lines))


def make_question_set(folder: Path) -> None:
    asked = AskedQuestion(
        kind="where", text="Where is it?", answer="left", frame=1, boxes=((0.5, 0.5, 0.1, 0.1),)
    )
    clip = ClipQuestions(
        name="0001", jpegs=[jpeg(1), jpeg(2)], times_s=[0.0, 0.5], questions=[asked]
    )
    write_question_set(folder, [clip])


def read_both_ways(folder: Path) -> None:
    count_questions(folder)
    list(read_question_set(folder))


def make_event_set(folder: Path) -> None:
    watch = LabelledAlert(question="Is it there?", events=[(0.0, 0.5)])
    part = Footage(name="0001", jpegs=[jpeg(1), jpeg(2)], times_s=[0.0, 0.5], watches=[watch])
    write_event_set(folder, [part])


MEASURED = {"questions": "abc", "model": "demo"}


def make_answers(folder: Path) -> None:
    log = AnswerLog(folder / "answers.jsonl", MEASURED)
    log.add(("torch", "keep_all", "0001"), ClipAnswers(["yes", "no"], 18, 9))
    log.close()


def read_answers(folder: Path) -> None:
    log = AnswerLog(folder / "answers.jsonl", MEASURED)
    log.close()


def make_subtitles(folder: Path) -> None:
    lines = ["1", "00:00:01,000 --> 00:00:02,540", "<i>Hello</i>", "there, {\\an8}you", ""]
    (folder / "a.srt").write_text("\n".join([*lines, *lines, ""]))


def use_subtitles(folder: Path) -> None:
    [file] = folder.iterdir()
    subtitle_text(near_frames(read_subtitles(file), [0.0, 2.0]))


def make_webvtt(folder: Path) -> None:
    text = "WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.540 align:start\nHello <c.loud>you</c>\n"
    (folder / "a.vtt").write_text(text)


def make_calibration(folder: Path) -> None:
    table = CalibrationTable(
        checkpoint_sha256="0" * 64,
        footage=("a.mp4",),
        num_frames=12,
        image_size=126,
        num_scores=99,
        score_mean=0.5,
        score_std=0.1,
        score_quantiles={50: 0.5},
        thresholds=(Threshold(keep_ratio=0.5, score=0.4, kept_share=0.51),),
        input_ranges={"vit.blocks.0": 1.5},
        output_ranges={"vit.blocks.0": 2.5},
    )
    model = ModelIdentity(name="tiny", weights={"model.safetensors": "0" * 64})
    made = Calibration(model=model).with_section(table, Provenance())
    made.write(folder / "calibration.json")


def pack_calibration(data: Any) -> bytes:
    """With the hash of what it now holds."""
    if isinstance(data, dict):
        rest = {key: value for key, value in data.items() if key != "content_sha256"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        data = {**rest, "content_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(data).encode()


# ---- a server's files ----------------------------------------------------------------------------

CONFIG = """
port = 8123
threads = 2
max_sessions = 3
host = "127.0.0.1"

[[camera]]
name = "door"
source = "rtsp://u:p@cam/1"
fps = 2
record = true
settings = {policy = "stream"}

[[alert]]
name = "visitor"
camera = "door"
question = "Is somebody there?"
hold_s = 2.0
on_threshold = 0.8
evidence = true
sinks = ["phone"]

[[sink]]
name = "phone"
url = "http://127.0.0.1/x"
headers = {X = "1"}
events = ["alert.triggered"]
template = '{"a": "${camera}"}'
evidence = "full"
"""


def unpack_toml(data: bytes) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return read_toml(Path(file.name))


def pack_toml(value: Any) -> bytes:
    return "".join(f"{key} = {_toml(each)}\n" for key, each in value.items()).encode()


def _toml(value: Any) -> str:
    """Raises TypeError for what TOML has no words for."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None:
        raise TypeError("TOML has no null")
    return json.dumps(value, ensure_ascii=False)


@functools.cache
def options_of_serve() -> list[Option]:
    return flat(serve_options())


def use_config(folder: Path) -> None:
    file = folder / "edge-vlm.toml"
    resolve(options_of_serve(), argparse.Namespace(config=file), {})
    table = read_toml(file)
    read_plan(table, file)
    for sink in read_sinks(table.get("sink", []), file, {}):
        if sink.template is not None:
            BodyTemplate(sink.template, JSON_TYPE, sink.where)
        if sink.secret is not None:
            Signer(sink.secret, sink.where)


def make_queue(folder: Path) -> None:
    queue = DeliveryQueue(folder / "alerts.db")
    body = {"id": "1", "type": "alert.triggered", "evidence": {"time_s": 1.0}}
    queue.put("http://a/", json.dumps(body), jpeg(1))
    queue.put("http://a/", json.dumps({"id": "2", "type": "alert.cleared"}), None)
    queue.close()


ROWS = "SELECT receiver, number, body, jpeg FROM deliveries"


def unpack_queue(data: bytes) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        database = sqlite3.connect(file.name)
        rows = [list(row) for row in database.execute(ROWS)]
        database.close()
    return rows


def pack_queue(rows: Any) -> bytes:
    """A table of the same columns that hold whatever they are given."""
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(Path(folder) / "q.db")
        database.execute("CREATE TABLE deliveries (number INTEGER, receiver, body, jpeg BLOB)")
        try:
            for row in rows:
                database.execute(
                    "INSERT INTO deliveries (receiver, number, body, jpeg) VALUES (?, ?, ?, ?)", row
                )
            database.commit()
        except sqlite3.Error as error:
            raise ValueError("no row") from error
        finally:
            database.close()
        return (Path(folder) / "q.db").read_bytes()


def use_queue(folder: Path) -> None:
    for left_over in folder.glob("alerts.db-*"):
        left_over.unlink()
    queue = DeliveryQueue(folder / "alerts.db")
    try:
        queue.load({"http://a/": "http://a/"})
        while (alert := queue.oldest("http://a/")) is not None:
            body, picture = json.loads(alert.body), alert.jpeg  # as senders do
            assert isinstance(body["id"], str)
            assert picture is None or (isinstance(picture, bytes) and body["evidence"] is not None)
            queue.remove("http://a/", alert.number)
    finally:
        queue.close()


# ---- measurements, engines, training -------------------------------------------------------------


def make_result(folder: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "results" / "bench" / "demo_cpu.json", folder / "r.json")


def compare_results(folder: Path) -> None:
    now = read_comparable(ROOT / "benchmarks" / "results" / "bench" / "demo_cpu.json")
    lines = comparison(read_comparable(folder / "r.json"), now)
    assert all(visible(line).isprintable() for line in lines)


def make_entry(folder: Path) -> None:
    store = EngineStore(folder, "trt")
    store.folder.mkdir()
    (store.folder / "made").write_bytes(b"engine")
    fingerprint = Fingerprint.of(
        demo(),
        "llm",
        library="tensorrt",
        library_version="10",
        gpu=GPU.name,
        capabilities=(GPU.capability,),
        options={"fp16": True},
    )
    store.write("llm", store.folder / "made", fingerprint, {"seconds": 1.0})


def use_entry(folder: Path) -> None:
    EngineStore(folder, "trt").checked(demo(), "llm", "10", GPU)


def make_records(folder: Path) -> None:
    (folder / "a.mp4").touch()
    annotations = [
        {"type": "qa", "question": "What?", "answer": "That.", "at_s": 1.0},
        {
            "type": "count",
            "question": "?",
            "label": "x",
            "count": 1,
            "points": [{"time_s": 0.5, "x": 0.5, "y": 0.5, "id": 1}],
        },
    ]
    line = {"video": "a.mp4", "start_s": 0.0, "end_s": 2.0, "annotations": annotations}
    (folder / "records.jsonl").write_bytes(pack_lines([line, line]))


def jsonl(name: str, file: str, make: Any, read: Any, **more: Any) -> Format:
    return Format(name, file, make, read, unpack_lines, pack_lines, **more)


FORMATS = (
    Format("manifest", MANIFEST, linked_bundle, open_bundle, examples=25),
    Format("precision-plan", "precision_plan.json", make_plan, plan_of_bundle, examples=25),
    Format("embed-table", "embed_table.npy", make_array, read_table, None),
    Format("reference", "reference/llm.npz", make_reference, read_reference, None),
    Format("tokenizer", "tokenizer.json", copy_of("tokenizer.json"), use_tokenizer),
    Format(
        *("recording", "session.evlm", make_recording, read_recording),
        *(unpack_recording, pack_recording),
        examples=25,
    ),
    jsonl("questions", "qa.jsonl", make_questions, lambda f: read_question_file(f / "qa.jsonl")),
    jsonl("question-set", CLIPS, make_question_set, read_both_ways),
    jsonl("event-set", EVENTS, make_event_set, lambda f: list(read_event_set(f))),
    jsonl("answers", "answers.jsonl", make_answers, read_answers),
    Format("srt", "a.srt", make_subtitles, use_subtitles, None),
    Format("webvtt", "a.vtt", make_webvtt, use_subtitles, None),
    Format(
        *("calibration", "calibration.json", make_calibration),
        lambda f: CalibrationTable.read(f / "calibration.json"),
        pack=pack_calibration,
    ),
    Format(
        *("config", "edge-vlm.toml", lambda f: (f / "edge-vlm.toml").write_text(CONFIG)),
        *(use_config, unpack_toml, pack_toml),
    ),
    Format(
        "alert-queue", "alerts.db", make_queue, use_queue, unpack_queue, pack_queue, examples=25
    ),
    Format("bench-result", "r.json", make_result, compare_results),
    Format("engine-entry", "trt/llm.json", make_entry, use_entry),
    jsonl("records", "records.jsonl", make_records, lambda f: read_records(f / "records.jsonl")),
)
