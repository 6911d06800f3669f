"""Options of commands about how a server may be reached and what it keeps. Light to import."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_vlm_runtime.client.connection import Access
    from edge_vlm_runtime.protocol.settings import ServerLimits
    from edge_vlm_runtime.server.tls import Tls

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LIMITS = {
    "max_sessions": ("max_sessions", 1),
    "resume_grace": ("resume_grace_s", 1),
    "session_memory": ("max_session_bytes", 1 << 20),
    "max_answer_slowdown": ("max_answer_slowdown", 1),
}
"""Option, field of ServerLimits, and the option's unit in the field's."""


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access and operation")
    group.add_argument(
        "--tls",
        action="store_true",
        help="serve https and wss with a certificate made on the first start (browsers give the "
        "camera only to https pages and to localhost)",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="a certificate of your own")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    _add_key_argument(group)
    group.add_argument(
        "--resume-grace",
        type=_seconds,
        metavar="SECONDS",
        help="how long a session is kept when its connection breaks (30); 0: not at all",
    )
    group.add_argument(
        "--session-memory",
        type=_positive_int,
        metavar="MIB",
        help="what one session may remember: keys, values and features (4096)",
    )
    group.add_argument(
        "--max-answer-slowdown",
        type=_seconds,
        metavar="SHARE",
        help="time that video may take while answers are decoded, as a share of theirs (0.15)",
    )
    add_record_argument(group, "FOLDER", "write a recording of each session into this folder")


def add_record_argument(parser: Any, metavar: str, help: str) -> None:
    parser.add_argument("--record", type=Path, metavar=metavar, help=f"{help}; see `replay`")


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that may connect to a server elsewhere."""
    group = parser.add_argument_group("access to a server")
    _add_key_argument(group)
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="certificate to trust for wss://"
    )


def _add_key_argument(parser: Any) -> None:
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the API key (default: the variable EDGE_VLM_API_KEY, or none)",
    )


def server_limits(args: argparse.Namespace) -> ServerLimits:
    """What `serve` was told, and the default where it was not."""
    from edge_vlm_runtime.protocol.settings import ServerLimits

    given = {
        field: getattr(args, key) * unit
        for key, (field, unit) in LIMITS.items()
        if getattr(args, key) is not None
    }
    return ServerLimits(**given)


def default_limits() -> dict[str, Any]:
    """What the options of LIMITS are where they are not given."""
    from edge_vlm_runtime.protocol.settings import ServerLimits

    defaults = ServerLimits()
    # Whole units stay whole numbers: the memory is counted in them.
    return {
        key: getattr(defaults, field) if unit == 1 else getattr(defaults, field) // unit
        for key, (field, unit) in LIMITS.items()
    }


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `Server.open`. Raises ConfigError."""
    from edge_vlm_runtime.server.auth import read_api_key

    key = read_api_key(args.api_key_file)
    if key is None and args.host not in LOOPBACK:
        print(
            f"edge-vlm: anybody who reaches {args.host} may watch and ask; an API key "
            "(--api-key-file) keeps others out",
            file=sys.stderr,
        )
    return {"record_to": args.record, "api_key": key, "tls": _tls(args)}


def _tls(args: argparse.Namespace) -> Tls | None:
    from edge_vlm.errors import ConfigError
    from edge_vlm_runtime.server.tls import Tls, default_folder, own_names, self_signed

    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if args.tls_cert is not None:
        return Tls(args.tls_cert, args.tls_key).check()
    if not args.tls:
        return None
    made = self_signed(default_folder(), own_names(args.host))
    print(f"certificate: {made.certificate}  (for clients: --tls-ca)", flush=True)
    return made


def access_of(args: argparse.Namespace) -> Access:
    """How to reach the server that was named. Raises ConfigError."""
    from edge_vlm_runtime.client.connection import Access
    from edge_vlm_runtime.server.auth import read_api_key

    return Access(api_key=read_api_key(args.api_key_file), ca_file=args.tls_ca)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value
