"""Shows a webcam to a running server and asks about it every few seconds.

    edge-vlm serve
    python webcam.py [SOURCE] [ADDRESS]

SOURCE is what `edge-vlm watch --source` takes: webcam, a file, rtsp://... Needs edge-vlm[client].
"""

import asyncio
import os
import sys

from edge_vlm_runtime import connect
from edge_vlm_runtime.sources.open import open_source

ASK_EVERY_S = 3.0


async def main(source: str, address: str) -> None:
    camera = open_source(source, 2.0)  # pictures a second
    async with connect(address, {"delivery": "live" if camera.is_live else "wait"}) as client:
        ask_at_s = ASK_EVERY_S
        pictures = camera.pictures()
        while picture := await asyncio.to_thread(next, pictures, None):
            await client.send_frame(picture.rgb, round(picture.time_s * 1e6))
            if picture.time_s >= ask_at_s:
                ask_at_s += ASK_EVERY_S
                await client.wait_processed()
                answer = await client.ask("What is there now?")
                print(f"{picture.time_s:.1f} s: {answer.shown_text}")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    here = os.environ.get("EDGE_VLM_URL", "localhost:8765")
    asyncio.run(main(given.get(1, "webcam"), given.get(2, here)))
