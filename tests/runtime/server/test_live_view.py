"""What a session keeps for those who look at it from outside."""

from __future__ import annotations

from edge_vlm_runtime.protocol.alerts import AlertTriggered, Evidence
from edge_vlm_runtime.server.live_view import MAX_HAPPENED, LiveView


def test_what_happened_is_kept_without_its_pictures() -> None:
    view = LiveView()
    picture = Evidence(frame_sequence=3, time_s=1.0, jpeg=bytes(100_000), exact=True)
    for episode in range(1, MAX_HAPPENED + 11):
        event = AlertTriggered(
            alert_id="a",
            episode=episode,
            question="Is there a cat now?",
            probability=0.9,
            frame_sequence=3,
            time_s=1.0,
            age_s=0.1,
            evidence=picture,
        )
        view.said(event, now_ns=episode)
    kept = view.happened(after=0)
    assert [each.number for each in kept] == list(range(11, MAX_HAPPENED + 11))
    assert all(each.event.episode == each.number for each in kept)
    assert not any(getattr(each.event, "evidence", None) for each in kept)
    assert event.evidence is picture  # whoever else was told still has it
