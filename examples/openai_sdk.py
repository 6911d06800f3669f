"""Asks about a video through OpenAI's own SDK, unchanged.

    edge-vlm serve
    python openai_sdk.py VIDEO "What is there now?"

Needs openai and edge-vlm[client], which here only reads the file.
"""

import base64
import os
import sys

import openai
from openai.types.chat import ChatCompletionContentPartParam

from edge_vlm.errors import EdgeVlmError
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.client.address import http_url


def main(path: str, question: str) -> None:
    server = os.environ.get("EDGE_VLM_URL", "localhost:8765")
    key = os.environ.get("EDGE_VLM_API_KEY", "none")
    with openai.OpenAI(base_url=http_url(server, "/v1"), api_key=key) as client:
        model = client.models.list().data[0].id
        parts: list[ChatCompletionContentPartParam] = []
        for time_s, rgb in read_video(path, 2.0):
            uri = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(rgb)).decode()}"
            parts.append({"type": "text", "text": f"<{time_s:.1f} seconds>"})
            parts.append({"type": "image_url", "image_url": {"url": uri}})
        parts.append({"type": "text", "text": question})
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": parts}], stream=True
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2])
    except EdgeVlmError as error:  # of the video
        sys.exit(str(error))
    except openai.APIConnectionError as error:
        sys.exit(f"no server answers at {error.request.url}: start one with `edge-vlm serve`")
