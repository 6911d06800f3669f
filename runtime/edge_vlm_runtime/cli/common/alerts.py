"""Alerts on the command line: the options of `watch` and `serve`, and what they set up."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from edge_vlm import private_files
from edge_vlm.console.options import About
from edge_vlm.console.usage import is_like_a_number
from edge_vlm.errors import ConfigError, EdgeVlmError
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.cli.common.arguments import Option, given, options_of
from edge_vlm_runtime.sources.masking import mask_credentials

if TYPE_CHECKING:
    from edge_vlm_runtime import protocol
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher, AlertEvent, Sink
    from edge_vlm_runtime.alert_sinks.tables import SinkTable
    from edge_vlm_runtime.cameras.config import CameraPlan
    from edge_vlm_runtime.client.client import Client, OnEvent
    from edge_vlm_runtime.protocol import alerts as alert_messages
    from edge_vlm_runtime.protocol.typed import RuleFields

log = logging.getLogger(__name__)

RULE_FIELDS = (
    *("on_threshold", "off_threshold", "hold_s"),
    *("clear_hold_s", "cooldown_s", "interval_s"),
)
"""What the command line says about all its alerts."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where alerts go."""

    webhook: Annotated[list[str], About(metavar="URL", is_secret=True)] = field(
        default_factory=list
    )
    """Post alerts there as JSON; may be repeated."""
    mqtt: Annotated[list[str], About(metavar="URL", is_secret=True)] = field(default_factory=list)
    """Publish alerts there, mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC; may be repeated."""
    alert_queue: Path | None = None
    """Keep alerts that wait for a receiver in this file, for the next start too."""
    evidence: EvidenceSize = EvidenceSize.FULL
    """How much of an alert's picture goes to webhooks and brokers."""


def add_alert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a command that watches. Raises MissingExtraError."""
    group = parser.add_argument_group("alerts")
    group.add_argument(
        "--alert",
        action="append",
        default=[],
        metavar="[ON[/OFF]@]TEXT",
        dest="alerts",
        help='a yes/no question to watch for, such as "Is there a cat now?", and at which '
        "probabilities this alert begins and ends (default: as --alert-on and --alert-off say); "
        "may be repeated",
    )
    for option in [*rule_options(), *options_of(OutputOptions)]:
        if option.key != "evidence":
            option.add_to(group, default=option.default, is_checked=False)
    group.add_argument(
        "--evidence",
        action=_Evidence,
        default=EvidenceSize.FULL.value,
        metavar="{none,small,full}|FOLDER",
        help="how much of an alert's picture goes to webhooks and brokers (default: full), or "
        "a folder to save the picture of each begin in; may be repeated",
    )
    parser.set_defaults(evidence_folder=None)


class _Evidence(argparse.Action):
    """A folder, unless it is the word for a size; `./none` is a folder."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option: object = None
    ) -> None:
        text = str(values)
        if text in {size.value for size in EvidenceSize}:
            namespace.evidence = text
        else:
            namespace.evidence_folder = Path(text)


def rule_options() -> list[Option]:
    from edge_vlm_runtime.protocol.alerts import AlertRule

    return options_of(AlertRule, only=RULE_FIELDS)


@contextlib.contextmanager
def alert_outputs(
    args: argparse.Namespace, routes: AlertRoutes | None = None
) -> Iterator[AlertDispatcher | None]:
    """The receivers that were named, running; None without any. `routes`: which alerts of cameras
    go where.

    At the end what is under way has a few seconds. Raises ConfigError, MissingExtraError, and
    DeliveryError if a receiver did not take everything.
    """
    tables = sinks_of_file(args)
    own = [] if routes is None else routes.addresses(known=[*args.webhook, *args.mqtt])
    if not args.webhook and not args.mqtt and not tables and not own:
        yield None
        return
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
    from edge_vlm_runtime.alert_sinks.queue import DeliveryQueue

    evidence = EvidenceSize(args.evidence)
    sinks: list[Sink] = []
    labels: dict[str, str] = {}
    events: dict[str, frozenset[str]] = {}
    for table in tables:
        sinks.append(table.open(evidence))
        labels[table.name] = sinks[-1].key
        events[sinks[-1].key] = table.events
    for url in dict.fromkeys([*args.webhook, *args.mqtt, *own]):
        sinks.append(sink_at(url, evidence, is_mqtt=url in args.mqtt))
        labels[url] = sinks[-1].key
    if routes is not None:
        routes.know(labels, own)
    wants = {sink.key: functools.partial(_wants, sink.key, events, routes) for sink in sinks}
    sizes = {evidence, *(table.evidence for table in tables)} - {None}
    with_pictures = sizes != {EvidenceSize.NONE}
    queue = DeliveryQueue(args.alert_queue)
    with AlertDispatcher(sinks, queue, wants=wants, with_pictures=with_pictures) as outputs:
        yield outputs
    outputs.raise_undelivered()


def sinks_of_file(args: argparse.Namespace) -> list[SinkTable]:
    """`[[sink]]` of the configuration file, for `serve`; other commands leave them alone. Raises
    ConfigError."""
    if not getattr(args, "has_tables", False):
        return []
    from edge_vlm_runtime.alert_sinks.tables import read_sinks
    from edge_vlm_runtime.cli.common.config import read_tables

    file, tables = read_tables(args, os.environ)
    return read_sinks(tables["sink"], file) if file is not None and "sink" in tables else []


def sink_at(url: str, evidence: EvidenceSize, *, is_mqtt: bool) -> Sink:
    """A receiver without a name. Raises ConfigError, MissingExtraError."""
    if is_mqtt or url.startswith(("mqtt://", "mqtts://")):
        from edge_vlm_runtime.alert_sinks.mqtt import MqttSink

        return MqttSink(url, evidence)
    from edge_vlm_runtime.alert_sinks.webhook import WebhookSink

    return WebhookSink(url, evidence)


class AlertRoutes:
    """Which alerts of the server's cameras go to which receivers, as its file says."""

    def __init__(self, plan: CameraPlan) -> None:
        self._plan = plan
        self._keys: dict[str, str] | None = None
        """Of receivers, by what an alert calls them."""
        self._own: frozenset[str] = frozenset()
        """Receivers that are for the alerts alone that name them."""

    def addresses(self, known: Collection[str]) -> list[str]:
        """Receivers that alerts name by address and nobody else does."""
        named = (sink for alert in self._plan.alerts for sink in alert.sinks or ())
        return [sink for sink in dict.fromkeys(named) if "://" in sink and sink not in known]

    def know(self, keys: Mapping[str, str], own: Collection[str]) -> None:
        """`keys` of the receivers there are, by what an alert calls them."""
        self._keys = dict(keys)
        self._own = frozenset(keys[label] for label in own)

    def planned(self, plan: CameraPlan) -> None:
        """Another plan is in force. Receivers are those of the start."""
        self._plan = plan
        new = {sink for alert in plan.alerts for sink in alert.sinks or ()} - {*(self._keys or ())}
        for sink in sorted(new):
            # The rest of an address may be what lets one post there.
            shown = mask_credentials(sink).split("/")[2] if "://" in sink else sink
            log.error("%s: receivers are opened at the start: restart to send alerts there", shown)

    def takes(self, key: str, event: AlertEvent) -> bool:
        """Whether the receiver of this key gets an event."""
        sinks = None
        if event.camera and event.alert_name:
            sinks = self._plan.sinks_of(event.camera, event.alert_name)
        if sinks is None:
            return key not in self._own
        return any((self._keys or {}).get(sink) == key for sink in sinks)


def _wants(
    key: str,
    events: Mapping[str, frozenset[str]],
    routes: AlertRoutes | None,
    event: AlertEvent,
) -> bool:
    from edge_vlm_runtime import protocol

    if key in events and protocol.tag_of(type(event)) not in events[key]:
        return False
    return routes is None or routes.takes(key, event)


async def create_alerts(
    args: argparse.Namespace, client: Client
) -> list[alert_messages.AlertStatus]:
    """Watches for every `--alert`, or for none. Raises as `Client.create_alert`."""
    made = []
    rule = given(rule_options(), args)
    wanted = [parse_alert(text) for text in args.alerts]
    try:
        for question, own in wanted:
            made.append(await client.create_alert(question, **cast("RuleFields", {**rule, **own})))
    except EdgeVlmError:
        for status in made:  # a camera of the server's would keep them
            with contextlib.suppress(EdgeVlmError):
                await client.delete_alert(status.alert_id)
        raise
    return made


def parse_alert(text: str) -> tuple[str, dict[str, float]]:
    """`TEXT`, `ON@TEXT` or `ON/OFF@TEXT`: the question, and the thresholds of this alert alone.

    Raises ConfigError.
    """
    before, at, question = text.partition("@")
    on, slash, off = before.partition("/")
    try:
        thresholds = {"on_threshold": float(on)} if at else {}
        if slash and at:
            thresholds["off_threshold"] = float(off)
    except ValueError as error:
        if not is_like_a_number(before):  # the question has an @ in it
            return text, {}
        raise ConfigError(
            f"{before!r} is no threshold",
            where=text,
            remedy="write ON@TEXT or ON/OFF@TEXT, such as 0.8/0.5@TEXT, or TEXT alone",
        ) from error
    return (question.strip(), thresholds) if at else (text, {})


def alert_handlers(
    args: argparse.Namespace, session_id: str, outputs: AlertDispatcher | None
) -> list[OnEvent]:
    """What else is to be done with a client's events. Raises ConfigError for a bad folder."""
    from edge_vlm_runtime.protocol import alerts as alert_messages

    handlers: list[OnEvent] = []
    if outputs is not None:
        handlers.append(lambda event: outputs.put(session_id, event))
    if args.evidence_folder is not None:
        folder: Path = args.evidence_folder
        try:
            exposed = private_files.make_folder(folder)
        except OSError as error:
            raise ConfigError(f"cannot save pictures: {error.strerror}", where=folder) from error
        if exposed is not None:
            log.warning("pictures of alerts: %s", exposed)

        def save(event: protocol.ServerEvent) -> None:
            if isinstance(event, alert_messages.AlertTriggered) and event.evidence is not None:
                name = f"{session_id}-{event.alert_id}-{event.episode}.jpg"
                try:
                    private_files.replace(folder / name, event.evidence.jpeg)
                except OSError as error:
                    log.warning("the picture %s was not saved: %s", name, error.strerror)

        handlers.append(save)
    return handlers


def tell_all(*handlers: OnEvent) -> OnEvent:
    """All of them get every event."""

    def tell(event: protocol.ServerEvent) -> None:
        for handler in handlers:
            handler(event)

    return tell


def alert_summary(status: alert_messages.AlertStatus) -> str:
    """One line about an alert when all is seen."""
    times = "once" if status.episodes == 1 else f"{status.episodes} times"
    last = "" if status.probability is None else f", {status.probability:.2f} at the end"
    return f"alert {status.rule.question!r}: began {times}{last}"
