"""Checks a session's alerts on its memory and reports what began and ended.

A check is one prefill of the question after the remembered video and a look at the logits: nothing
is decoded and nothing stays in the cache. Alerts that are due are measured together, as many as
fit into a short run of the language graph, alerts with the same question once.

No I/O, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import EdgeVlmError, QuestionTooLong, TooManyQuestions
from edge_vlm.hysteresis import Change
from edge_vlm.pixels.frames import shrink_jpeg
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits, ServerLimits
from edge_vlm_runtime.session.alert_rules import Alert, AlertFrame, AlertRegistry, YesNo
from edge_vlm_runtime.session.budget import question_capacity

if TYPE_CHECKING:
    from edge_vlm.text.prompt import PromptFormat
    from edge_vlm_runtime.inference.language import LanguageModel
    from edge_vlm_runtime.protocol.alerts import AlertRule
    from edge_vlm_runtime.session.context import StreamContext
    from edge_vlm_runtime.session.outbox import Outbox

STEP_TOKENS = 256
"""Of the questions of one step, unless a single one is longer: nobody else's answer begins before
it ends."""
MAX_WAITING_LISTS = 8
"""`alert.list` messages that may wait for checks."""

AlertMessage = messages.AlertCreate | messages.AlertList | messages.AlertDelete


def require_watchable(
    rules: Sequence[AlertRule], prompt: PromptFormat, model: ModelLimits, limits: ServerLimits
) -> None:
    """That a new session would watch for all of them.

    Raises QuestionTooLong, TooManyAlerts, AlertsUnsupported.
    """
    if rules:
        YesNo(prompt.tokenizer)
    registry = AlertRegistry(limits.max_alerts)
    for rule in rules:
        _require_short(rule, prompt, _question_capacity(model, limits))
        registry.create(rule)


def _question_capacity(model: ModelLimits, limits: ServerLimits) -> int:
    """In tokens: a question goes through the graph whole."""
    return min(question_capacity(model, limits), model.max_prefill_tokens)


def _require_short(rule: AlertRule, prompt: PromptFormat, max_tokens: int) -> None:
    if prompt.tokenizer.has_more(rule.question, max_tokens):
        raise QuestionTooLong(
            f"the question is far too long: {len(rule.question)} characters",
            remedy=f"{max_tokens} tokens are allowed",
        )
    length = len(prompt.question_ids(rule.question))
    if length > max_tokens:
        raise QuestionTooLong(
            f"the question has {length} tokens", remedy=f"{max_tokens} are allowed"
        )


class AlertMonitor:
    """The alerts of one session. Owned by the engine thread."""

    def __init__(
        self,
        *,
        language: LanguageModel,
        prompt: PromptFormat,
        context: StreamContext,
        model: ModelLimits,
        limits: ServerLimits,
        outbox: Outbox,
    ) -> None:
        self._language = language
        self._prompt = prompt
        self._context = context
        self._limits = limits
        self._max_question_tokens = _question_capacity(model, limits)
        self._max_tokens_per_step = min(STEP_TOKENS, model.max_prefill_tokens)
        self._outbox = outbox
        self._registry = AlertRegistry(limits.max_alerts)
        self._yes_no: YesNo | None = None
        self._waiting_lists: list[str | None] = []
        self._newest_seen: AlertFrame | None = None

    # ---- what the viewer asks for ------------------------------------------------------------

    def take(self, message: AlertMessage) -> None:
        """Does what a message asks for.

        Raises ConfigError, QuestionTooLong, TooManyAlerts, AlertsUnsupported for a rule that cannot
        be watched, UnknownAlert, TooManyQuestions for too many lists at once.
        """
        if isinstance(message, messages.AlertCreate):
            self._create(message)
        elif isinstance(message, messages.AlertDelete):
            alert = self._registry.delete(message.alert_id)
            self._end(alert, "deleted")
            deleted = messages.AlertDeleted(alert_id=alert.alert_id, event_id=message.event_id)
            self._outbox.add(deleted)
        else:
            self._list(message)

    def _create(self, message: messages.AlertCreate) -> None:
        rule = message.rule()
        if self._yes_no is None:
            self._yes_no = YesNo(self._prompt.tokenizer)
        _require_short(rule, self._prompt, self._max_question_tokens)
        alert = self._registry.create(rule, message.name)
        self._outbox.add(messages.AlertCreated(alert=_status(alert), event_id=message.event_id))

    def _list(self, message: messages.AlertList) -> None:
        if len(self._waiting_lists) >= MAX_WAITING_LISTS:
            raise TooManyQuestions(
                f"{MAX_WAITING_LISTS} lists are waiting already", remedy="wait for them"
            )
        self._waiting_lists.append(message.event_id)
        self._answer_lists()

    def _answer_lists(self) -> None:
        if self._newest_seen is not self._registry.newest or self._registry.due():
            return
        waiting, self._waiting_lists = self._waiting_lists, []
        for event_id in waiting:
            alerts = [_status(alert) for alert in self._registry.alerts]
            self._outbox.add(messages.AlertListed(alerts=alerts, event_id=event_id))

    # ---- what the session sees ---------------------------------------------------------------

    @property
    def is_watching(self) -> bool:
        """There are alerts, each to be checked on every frame that it wants."""
        return bool(self._registry.alerts)

    def on_frame(self, frame: AlertFrame) -> None:
        """A frame was encoded; it is checked once it joins the memory."""
        self._newest_seen = frame

    def caught_up(self) -> None:
        """What was encoded has joined the memory, or was lost with an error."""
        newest, seen = self._context.newest, self._newest_seen
        if newest is not None and seen is not None and newest.seq == seen.seq:
            self._registry.on_frame(seen)
        self._newest_seen = self._registry.newest
        self._answer_lists()

    def on_duplicate(self, capture_us: int) -> None:
        """A frame of this time looked like the one before it and was not encoded."""
        if self._newest_seen is self._registry.newest:
            for alert, change in self._registry.on_duplicate(capture_us):
                self._report(alert, change)

    def close(self) -> None:
        """The session ends, and with it every alert."""
        for alert in self._registry.alerts:
            self._end(alert, "session_closed")

    # ---- checking ----------------------------------------------------------------------------

    def step(self) -> bool:
        """Checks alerts that are due on the newest frame, as many as fit into one run of the
        language graph; False when there are none.

        What the engines raise becomes an `error` event, once until a check succeeds again.
        """
        due = self._registry.due()
        if not due:
            return False
        if self._context.newest is None:  # what was to be checked has been lost, with an error
            for alert in due:
                self._registry.failed(alert)
            self._answer_lists()
            return True
        branches = self._branches(due)
        due = [alert for alert in due if alert.rule.question in branches]
        try:
            readings = self._measure(branches)
        except EdgeVlmError as error:
            news = [self._registry.failed(alert) for alert in due]
            if any(news):
                self._outbox.add_error(error)
        else:
            for alert in due:
                self._note(alert, *readings[alert.rule.question])
        self._answer_lists()
        return True

    def _branches(self, due: Sequence[Alert]) -> dict[str, np.ndarray]:
        """Embeddings of the questions to check now, by question.

        Where the whole video is prefilled for a check they are all checked together.
        """
        room = self._max_tokens_per_step
        branches: dict[str, np.ndarray] = {}
        for text in dict.fromkeys(alert.rule.question for alert in due):
            branch = self._language.embed(self._prompt.question_ids(text))
            room -= len(branch)
            if branches and room < 0 and self._context.attention is Attention.FRAME:
                break
            branches[text] = branch
        return branches

    def _measure(self, branches: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        """Probability and answer mass by question."""
        assert self._yes_no is not None  # made with the first alert
        with self._context.branch() as arena:
            logits = self._language.measure(arena, list(branches.values()))
        return {text: self._yes_no.read(row) for text, row in zip(branches, logits, strict=True)}

    def _note(self, alert: Alert, probability: float, answer_mass: float) -> None:
        change = self._registry.measured(alert, probability, answer_mass)
        if alert.rule.report_checks:
            assert alert.frame is not None  # has just been checked
            self._outbox.add(
                messages.AlertChecked(
                    alert_id=alert.alert_id,
                    probability=probability,
                    answer_mass=answer_mass,
                    frame_sequence=alert.frame.seq,
                    time_s=alert.frame.time_s,
                )
            )
        if change is not None:
            self._report(alert, change)

    # ---- reporting ---------------------------------------------------------------------------

    def _report(self, alert: Alert, change: Change) -> None:
        if change is Change.ENDED:
            self._outbox.add(self._cleared(alert, "probability"))
            return
        frame = alert.frame
        assert frame is not None  # it was checked
        assert alert.probability is not None
        evidence = None
        if alert.rule.evidence:
            jpeg = frame.evidence or shrink_jpeg(frame.data, self._limits.max_evidence_bytes)
            evidence = messages.Evidence(
                frame_sequence=frame.seq,
                time_s=frame.time_s,
                jpeg=jpeg,
                exact=jpeg == frame.data,
            )
        triggered = messages.AlertTriggered(
            alert_id=alert.alert_id,
            episode=alert.episode,
            question=alert.rule.question,
            probability=alert.probability,
            frame_sequence=frame.seq,
            time_s=self._registry.now_s,
            age_s=0.0,
            evidence=evidence,
            alert_name=alert.name,
        )
        self._outbox.add_aged(triggered, frame.received_ns)

    def _end(self, alert: Alert, reason: str) -> None:
        if alert.hysteresis.active:
            alert.hysteresis.active = False
            self._outbox.add(self._cleared(alert, reason))

    def _cleared(self, alert: Alert, reason: str) -> messages.AlertCleared:
        assert alert.frame is not None  # it was checked
        assert alert.probability is not None
        return messages.AlertCleared(
            alert_id=alert.alert_id,
            episode=alert.episode,
            question=alert.rule.question,
            reason=reason,
            probability=alert.probability,
            frame_sequence=alert.frame.seq,
            time_s=self._registry.now_s,
            lasted_s=self._registry.now_s - alert.hysteresis.began_s,
            alert_name=alert.name,
        )


def _status(alert: Alert) -> messages.AlertStatus:
    frame = alert.frame
    return messages.AlertStatus(
        alert_id=alert.alert_id,
        rule=alert.rule,
        state=alert.hysteresis.state.value,
        episodes=alert.episode,
        probability=alert.probability,
        answer_mass=alert.answer_mass,
        frame_sequence=None if frame is None else frame.seq,
        time_s=None if frame is None else frame.time_s,
        name=alert.name,
    )
