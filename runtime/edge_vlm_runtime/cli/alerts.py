"""Alerts on the command line: the options of `watch` and `serve`, and what they set up."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import ConfigError

if TYPE_CHECKING:
    from edge_vlm_runtime import protocol
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher, Sink
    from edge_vlm_runtime.client.client import Client, OnEvent
    from edge_vlm_runtime.protocol import alerts as alert_messages

log = logging.getLogger(__name__)

RULE_OPTIONS = {
    "--alert-on": ("on_threshold", "P", 'probability of "yes" at which an alert begins (0.7)'),
    "--alert-off": ("off_threshold", "P", "below which it ends (0.4)"),
    "--alert-hold": ("hold_s", "SECONDS", "how long it must last before the alert begins (0)"),
    "--alert-clear-hold": ("clear_hold_s", "SECONDS", "and be over before the alert ends (0)"),
    "--alert-cooldown": ("cooldown_s", "SECONDS", "no new begin so long after an end (0)"),
    "--alert-interval": ("interval_s", "SECONDS", "least time between two checks (0: each frame)"),
}


def add_alert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a command that watches."""
    group = parser.add_argument_group("alerts")
    group.add_argument(
        "--alert",
        action="append",
        default=[],
        metavar="TEXT",
        dest="alerts",
        help='a yes/no question to watch for, such as "Is there a cat now?"; may be repeated',
    )
    for option, (field, metavar, text) in RULE_OPTIONS.items():
        group.add_argument(option, type=float, metavar=metavar, dest=field, help=text)
    group.add_argument(
        "--evidence", type=Path, metavar="FOLDER", help="save the picture of each begin there"
    )
    add_output_arguments(group)


def add_output_arguments(parser: Any) -> None:
    """Where alerts go; for a parser or a group of one."""
    parser.add_argument(
        "--webhook",
        action="append",
        default=[],
        metavar="URL",
        dest="webhooks",
        help="post alerts there as JSON; may be repeated",
    )
    parser.add_argument(
        "--mqtt",
        action="append",
        default=[],
        metavar="URL",
        dest="brokers",
        help="publish alerts there, mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC; may be repeated",
    )
    parser.add_argument(
        "--alert-queue",
        type=Path,
        metavar="FILE",
        help="keep alerts that wait for a receiver in this file, for the next start too",
    )


@contextmanager
def alert_outputs(args: argparse.Namespace) -> Iterator[AlertDispatcher | None]:
    """The receivers that were named, running; None without any.

    At the end what is under way has a few seconds. Raises ConfigError, MissingExtraError, and
    DeliveryError if a receiver did not take everything.
    """
    if not args.webhooks and not args.brokers:
        yield None
        return
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
    from edge_vlm_runtime.alert_sinks.queue import DeliveryQueue

    sinks: list[Sink] = []
    if args.webhooks:
        from edge_vlm_runtime.alert_sinks.webhook import WebhookSink

        sinks += [WebhookSink(url) for url in dict.fromkeys(args.webhooks)]
    if args.brokers:
        from edge_vlm_runtime.alert_sinks.mqtt import MqttSink

        sinks += [MqttSink(url) for url in dict.fromkeys(args.brokers)]
    with AlertDispatcher(sinks, DeliveryQueue(args.alert_queue)) as outputs:
        yield outputs
    outputs.raise_undelivered()


async def create_alerts(args: argparse.Namespace, client: Client) -> None:
    """Watches for every `--alert`. Raises as `Client.create_alert`."""
    fields = [field for field, _, _ in RULE_OPTIONS.values()]
    rule = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    for question in args.alerts:
        await client.create_alert(question, **rule)


def alert_handlers(
    args: argparse.Namespace, session_id: str, outputs: AlertDispatcher | None
) -> list[OnEvent]:
    """What else is to be done with a client's events. Raises ConfigError for a bad folder."""
    from edge_vlm_runtime.protocol import alerts as alert_messages

    handlers: list[OnEvent] = []
    if outputs is not None:
        handlers.append(lambda event: outputs.put(session_id, event))
    if args.evidence is not None:
        folder: Path = args.evidence
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot save pictures: {error.strerror}", where=folder) from error

        def save(event: protocol.ServerEvent) -> None:
            if isinstance(event, alert_messages.AlertTriggered) and event.evidence is not None:
                name = f"{session_id}-{event.alert_id}-{event.episode}.jpg"
                try:
                    (folder / name).write_bytes(event.evidence.jpeg)
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
