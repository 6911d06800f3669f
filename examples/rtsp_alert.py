"""Watches a camera for something and prints when it begins and ends.

    edge-vlm serve
    python rtsp_alert.py rtsp://USER:PASSWORD@CAMERA/stream "Is there a person at the door now?"

Needs edge-vlm[client]. The server is at EDGE_VLM_URL, or localhost:8765.
"""

import os
import sys
import threading

from edge_vlm_runtime import SyncClient
from edge_vlm_runtime.protocol.alerts import AlertTriggered
from edge_vlm_runtime.sources.open import open_source


def main(source: str, question: str) -> None:
    camera = open_source(source, 2.0)  # pictures a second
    server = os.environ.get("EDGE_VLM_URL", "localhost:8765")
    with SyncClient(server, {"delivery": "live" if camera.is_live else "wait"}) as client:
        alerts = client.alerts()

        def tell() -> None:
            for alert in alerts:  # waits for the next one; ends with the client
                if isinstance(alert, AlertTriggered):
                    print(f"begins at {alert.time_s:.1f} s ({alert.probability:.0%})", flush=True)
                else:
                    print(f"ends after {alert.lasted_s:.1f} s", flush=True)

        client.create_alert(question, on_threshold=0.7, off_threshold=0.4)
        teller = threading.Thread(target=tell)
        teller.start()
        for picture in camera.pictures():
            client.send_frame(picture.rgb, round(picture.time_s * 1e6))
        client.wait_processed()
    teller.join()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
