"""A robot's own loop: the model in the same process, no server, no threads, no asyncio.

    python in_process.py VIDEO [BUNDLE]

Needs edge-vlm[ort]. A robot takes its pictures from its camera's driver instead.
"""

import sys

from edge_vlm.pixels.video import read_video
from edge_vlm_runtime import LoadedBundle
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.protocol import FrameDropped, ServerEvent
from edge_vlm_runtime.protocol.alerts import AlertTriggered


def heed(event: ServerEvent) -> None:
    if isinstance(event, AlertTriggered):
        print(f"{event.time_s:.1f} s: {event.question} yes ({event.probability:.0%})")


def main(path: str, bundle: str) -> None:
    with (
        LoadedBundle.open(bundle) as engines,
        engines.session({"keep_ratio": 0.5}, on_event=heed) as session,
    ):
        session.create_alert("Is there a mushroom now?")
        for time_s, rgb in read_video(path, 2.0):
            outcome = session.send_frame(rgb, round(time_s * 1e6))
            if isinstance(outcome, FrameDropped):
                print(f"{time_s:.1f} s: dropped ({outcome.reason})")
        print(session.ask("What is there now?").shown_text)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(DEMO_BUNDLE))
