"""Receivers with a name: what their tables may say, what the recipes of the documentation send."""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.alert_sinks import dispatcher
from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.mqtt import MqttSink
from edge_vlm_runtime.alert_sinks.signature import Signer
from edge_vlm_runtime.alert_sinks.tables import SinkTable, read_sinks
from edge_vlm_runtime.alert_sinks.template import BodyTemplate
from edge_vlm_runtime.alert_sinks.webhook import WebhookSink
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.alerts import AlertRoutes, alert_outputs
from edge_vlm_runtime.cli.common.config import read_toml
from tests.runtime.alerts.receivers import cleared, triggered
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.live import TIMEOUT_S

PAGE = Path(__file__).parents[3] / "docs" / "webhooks.md"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjUPD8I"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, all the time that a busy machine may need."""
    monkeypatch.setattr(dispatcher, "GRACE_S", TIMEOUT_S)


class Service:
    """A web server; `check` says what the real one would answer."""

    def __init__(self, check: Callable[[str, dict[str, str], bytes], int]) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = check(self.path, headers, body)
                if status < 300:
                    outer.requests.append((self.path, headers, body))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, _, body in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Service]]:
    services: list[Service] = []

    def start(check: Any) -> Service:
        services.append(Service(check))
        return services[-1]

    yield start
    for service in services:
        service.close()


def recipe(title: str) -> str:
    """The table below a heading of the page."""
    below = PAGE.read_text().split(f"## {title}")[1].split("\n## ")[0]
    (table,) = re.findall(r"```toml\n(.*?)```", below, re.DOTALL)
    return str(table)


def sinks_of(folder: Path, text: str, environment: dict[str, str] | None = None) -> list[SinkTable]:
    file = folder / "edge-vlm.toml"
    file.write_text(text)
    return read_sinks(read_toml(file)["sink"], file, environment or {})


def deliver(tables: list[SinkTable]) -> AlertDispatcher:
    """A begin with a picture and an end to each, of a session with an awkward name."""
    sinks = [table.open(EvidenceSize.FULL) for table in tables]
    wants = {
        sink.key: lambda event, table=table: event.__struct_config__.tag in table.events
        for sink, table in zip(sinks, tables, strict=True)
    }
    quick: Any = {"first_back_off_s": 0.02, "attempt_timeout_s": TIMEOUT_S}
    with AlertDispatcher(sinks, wants=wants, **quick) as outputs:
        for event in (triggered(1, jpeg(1)), cleared(1)):
            outputs.put('the "door"', event)
    return outputs


# ---- the recipes -----------------------------------------------------------------------------


def ntfy(path: str, headers: dict[str, str], body: bytes) -> int:
    """Publishing as JSON: to the root, topic and message; priority 1 to 5, tags a list."""
    fields = json.loads(body)
    if headers.get("authorization") != "Bearer tk_secret":
        return 401
    known = {"topic", "title", "message", "priority", "tags", "click", "attach", "filename"}
    ok = path == "/" and fields.keys() <= known and fields["topic"] and fields["message"]
    ok = ok and re.fullmatch(r"[-_A-Za-z0-9]{1,64}", fields["topic"])
    ok = ok and 1 <= fields["priority"] <= 5 and isinstance(fields["tags"], list)
    return 200 if ok else 400


def test_ntfy(tmp_path: Path, serve: Callable[[Any], Service]) -> None:
    service = serve(ntfy)
    (tmp_path / "ntfy-token.txt").write_text("Bearer tk_secret\n")
    table = recipe("ntfy").replace("https://ntfy.sh", service.url)
    outputs = deliver(sinks_of(tmp_path, table))
    assert (outputs.delivered, outputs.lost) == (1, 0)  # begins alone
    (body,) = service.bodies
    assert body["title"] == 'the "door": is there a red ball ?'
    assert body["message"] == "is there a red ball ? 90 % sure"


def slack(path: str, headers: dict[str, str], body: bytes) -> int:
    """An incoming webhook: JSON with a text; a block's text has a type and 3,000 characters."""
    if path != "/services/T0/B0/secret":
        return 404
    fields = json.loads(body)
    texts = [block["text"] for block in fields["blocks"] if block["type"] == "section"]
    ok = headers["content-type"] == "application/json" and isinstance(fields["text"], str)
    ok = ok and all(t["type"] in ("plain_text", "mrkdwn") and len(t["text"]) > 0 for t in texts)
    return 200 if ok and fields.keys() <= {"text", "blocks"} else 400


def test_slack(tmp_path: Path, serve: Callable[[Any], Service]) -> None:
    service = serve(slack)
    variables = {"SLACK_WEBHOOK": f"{service.url}/services/T0/B0/secret"}
    outputs = deliver(sinks_of(tmp_path, recipe("Slack"), variables))
    assert (outputs.delivered, outputs.lost) == (2, 0)
    assert [body["text"] for body in service.bodies] == [
        'the "door": is there a red ball ? begins',
        'the "door": is there a red ball ? ends',
    ]


def telegram(path: str, headers: dict[str, str], body: bytes) -> int:
    """sendMessage: a chat and a text of 1 to 4,096 characters."""
    if path != "/bot123:secret/sendMessage":
        return 404
    fields = json.loads(body)
    ok = fields.keys() == {"chat_id", "text"} and isinstance(fields["chat_id"], int)
    return 200 if ok and 1 <= len(fields["text"]) <= 4096 else 400


def test_telegram(tmp_path: Path, serve: Callable[[Any], Service]) -> None:
    service = serve(telegram)
    (tmp_path / "telegram-url.txt").write_text(f"{service.url}/bot123:secret/sendMessage\n")
    outputs = deliver(sinks_of(tmp_path, recipe("Telegram")))
    assert (outputs.delivered, outputs.lost) == (2, 0)
    assert re.fullmatch(r'the "door": .* begins at 20\d\d-.*', service.bodies[0]["text"])


def test_a_signature_is_what_the_standards_library_checks(
    tmp_path: Path, serve: Callable[[Any], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own receiver, with the standard's own library."""
    (tmp_path / "webhook-key.txt").write_text(f"{SECRET}\n")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program: dict[str, Any] = {}
    exec(code, program)

    def check(path: str, headers: dict[str, str], body: bytes) -> int:
        program["take"](body, headers)
        return 204

    service = serve(check)
    table = recipe("Your own program, signed").replace("https://recorder.example.org", service.url)
    outputs = deliver(sinks_of(tmp_path, table))
    assert (outputs.delivered, outputs.lost) == (2, 0)
    begin, end = service.bodies
    assert begin["evidence"]["jpeg"]
    assert end["type"] == "alert.cleared"
    _, headers, body = service.requests[0]
    assert headers["idempotency-key"] == begin["id"]
    for changed, wrong in ((headers, body + b" "), (headers | {"webhook-id": "x"}, body)):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(wrong, changed)


# ---- what is wrong is said -------------------------------------------------------------------

HOOK = '[[sink]]\nname = "a"\nurl = "https://host/secret-path"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[sink]\nname = "a"', "write [[sink]]"),
        ('[[sink]]\nurl = "https://host/"', "[[sink]] number 1): such as name"),
        (HOOK + HOOK, "two sinks are called 'a'"),
        (HOOK + 'tempalte = "x"', "did you mean template?"),
        (HOOK.replace("https", "ftp"), "url is no address"),
        (HOOK + "headers = { A = 1 }", "headers.A must be a text or say where"),
        (HOOK + 'headers = { A = { env = "NOT_SET" } }', "the variable NOT_SET is not set"),
        (
            HOOK + 'headers = { A = { file = "nowhere.txt" } }',
            "nowhere.txt cannot be read: No such",
        ),
        (HOOK + 'headers = { A = "secret\\r\\nX: y" }', "header A is not one line of ASCII"),
        (HOOK + 'headers = { Webhook-Id = "x" }', "is ours to set"),
        (HOOK + 'headers = { A = "x", a = "y" }', "the header a stands there twice"),
        (HOOK + 'headers = { "a b" = "x" }', "not a header's name"),
        (HOOK + 'secret_env = "K"\nsecret_file = "f"', "exclude each other"),
        (HOOK + 'secret_env = "SECRET_PLAIN"', "does not begin with whsec_"),
        (HOOK + 'secret_env = "SECRET_SHORT"', "it has 4 bytes, not 24 to 64"),
        (HOOK + 'evidence = "huge"', "one of none, small, full"),
        (HOOK + 'events = ["alert.trigered"]', "events cannot be"),
        (HOOK + 'template = \'{"a": "${camra}"}\'', "did you mean camera?"),
        (HOOK + "template = '{\"a\": ${camera}}'", "a text stands between quotes"),
        (HOOK + 'template = \'{"a": "5 $ each"}\'', "write $$"),
        (
            HOOK + 'headers = { content-type = "image/png" }\ntemplate = "x"',
            "no template can be filled in for the content type 'image/png'",
        ),
        (
            HOOK + 'evidence = "none"\ntemplate = \'{"a": "${picture}"}\'',
            "wants ${picture}, and no pictures",
        ),
        (HOOK.replace("https://host", "mqtt://host:99999"), "mqtt://HOST:1883/TOPIC"),
        (HOOK.replace("https", "mqtt") + 'template = "x"', "template is for webhooks"),
        (HOOK.replace("https://host/secret-path", "mqtt://host"), "not an MQTT topic"),
        (HOOK.replace("https://host/secret-path", "mqtt://host/secret-path/#"), "[[sink]] 'a'"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, text: str, said: str) -> None:
    variables = {"K": SECRET, "SECRET_PLAIN": "hunter2", "SECRET_SHORT": "whsec_aHVudA=="}
    with pytest.raises(ConfigError) as raised:
        for table in sinks_of(tmp_path, text, variables):
            table.open(EvidenceSize.FULL)
    message = str(raised.value)
    assert said in message
    assert "secret" not in message.replace("secret_", "").replace("a secret to sign", "")
    assert "hunter2" not in message


def test_a_named_receiver_shows_nothing_of_its_address_but_the_host() -> None:
    sink = WebhookSink("https://user:pass@hooks.example.org/token", name="slack")
    assert sink.name == "sink slack (hooks.example.org)"
    assert sink.key == "sink slack"
    assert MqttSink("mqtt://u:p@broker/a/b", name="log").name == "sink log (broker)"
    table = SinkTable(name="a", url="https://host/token", secret=SECRET)
    assert "token" not in repr(table)
    assert SECRET not in repr(table)


# ---- templates -------------------------------------------------------------------------------

EVENT = {
    "id": "s/1/1/alert.triggered",
    "type": "alert.triggered",
    "session_id": "s",
    "camera": 'back\\slash "quote"\n',
    "question": "5 > 3 & x=y?",
    "probability": 0.98765,
    "lasted_s": 1.25,
    "time_s": 1234567.125,
    "evidence": {"jpeg": "aGk="},
}


@pytest.mark.parametrize(
    ("text", "kind", "filled"),
    [
        ('{"c": "${camera}"}', "application/json", {"c": EVENT["camera"]}),
        ('{"p": ${probability}}', "application/json; charset=utf-8", {"p": 0.988}),
        ('{"age": "$age_s", "p": "$picture"}', "application/json", {"age": "", "p": "aGk="}),
        ("$time_s", "text/plain", "1234567.125"),
        ("$$${lasted_s} $alert_name", "text/plain", "$1.25 5 > 3 & x=y?"),
        ("q=${question}", "application/x-www-form-urlencoded", "q=5+%3E+3+%26+x%3Dy%3F"),
    ],
)
def test_fields_are_escaped_for_what_is_sent(text: str, kind: str, filled: object) -> None:
    body = BodyTemplate(text, kind).fill(EVENT).decode()
    assert (json.loads(body) if "json" in kind else body) == filled


def test_a_signature_of_the_standards_own_example() -> None:
    headers = Signer("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# ---- which alert goes where ------------------------------------------------------------------

TABLES = """
[[camera]]
name = "door"
source = "webcam"

[[alert]]
name = "everywhere"
camera = "door"
question = "is there a dog ?"

[[alert]]
name = "cat"
camera = "door"
question = "is there a cat ?"
sinks = ["phone", "OWN"]

[[sink]]
name = "phone"
url = "PHONE"
events = ["alert.triggered"]

[[sink]]
name = "log"
url = "LOG"
"""


def of_camera(alert: str) -> list[Any]:
    events: list[Any] = [triggered(1), cleared(1)]
    for event in events:
        event.camera, event.alert_name = "door", alert
    return events


def test_each_alert_of_a_camera_goes_where_its_table_says(
    tmp_path: Path, serve: Callable[[Any], Service], caplog: pytest.LogCaptureFixture
) -> None:
    places = {name: serve(lambda *request: 204) for name in ("PHONE", "LOG", "OWN", "HOOK")}
    text = TABLES
    for name, service in places.items():
        text = text.replace(name, f"{service.url}/{name.lower()}")
    file = tmp_path / "edge-vlm.toml"
    file.write_text(text)
    plan = read_plan(read_toml(file), file)
    args = argparse.Namespace(
        config=file,
        has_tables=True,
        webhook=[f"{places['HOOK'].url}/hook"],
        mqtt=[],
        evidence="none",
        alert_queue=None,
    )
    routes = AlertRoutes(plan)
    with alert_outputs(args, routes) as outputs:
        assert outputs is not None
        outputs.put("viewer", triggered(1))
        for event in (*of_camera("everywhere"), *of_camera("cat")):
            outputs.put("door's", event)
        outputs.put("door's", of_camera("made by a viewer")[0])
    got = {
        name: [body.get("alert_name", "a viewer's") for body in service.bodies]
        for name, service in places.items()
    }
    others = ["a viewer's", "everywhere", "everywhere", "made by a viewer"]
    assert got == {
        "PHONE": ["a viewer's", "everywhere", "cat", "made by a viewer"],  # begins alone
        "OWN": ["cat", "cat"],
        "LOG": others,
        "HOOK": others,
    }
    assert caplog.text == ""
    file.write_text(text.replace('"phone", ', '"http://user:secret@127.0.0.1:9/new", "phone", '))
    routes.planned(read_plan(read_toml(file), file))
    assert "127.0.0.1:9: receivers are opened at the start: restart to send" in caplog.text
    assert "secret" not in caplog.text
