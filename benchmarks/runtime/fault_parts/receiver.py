"""A webhook receiver that may be killed at any moment: `python receiver.py PORT FILE SEED`.

What it takes is written, a line each, before it answers; then it sometimes dawdles, so that some
are killed between the two. Standard library alone, to start quickly.
"""

import hashlib
import json
import os
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

port, path, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance = random.Random(seed)
taken = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        line = {
            "at": time.time(),
            "said_at": body["at"],
            "id": body["id"],
            "key": self.headers["Idempotency-Key"],
            "digest": hashlib.sha256(data).hexdigest(),
        }
        os.write(taken, (json.dumps(line) + "\n").encode())
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.0, 0.03))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


class Server(HTTPServer):
    allow_reuse_address = True

    def handle_error(self, *args: object) -> None:
        """Whoever sent it was killed before the answer."""


Server(("127.0.0.1", port), Handler).serve_forever()
