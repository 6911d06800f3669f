"""Options of commands about a bundle, a server, how it may be reached and what it keeps.

Each is declared once, as a field. Light to import.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from edge_vlm.console.options import About
from edge_vlm.console.paths import recording_file, recording_folder
from edge_vlm.console.usage import MOST_THREADS
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.arguments import (
    Groups,
    add_options,
    build,
    flat,
    given,
    options_of,
)
from edge_vlm_runtime.client.address import DEFAULT_PORT
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.names import Backend

if TYPE_CHECKING:
    from edge_vlm_runtime.client.connection import Access
    from edge_vlm_runtime.openai.media import MediaRules
    from edge_vlm_runtime.protocol.settings import ServerLimits
    from edge_vlm_runtime.protocol.typed import Settings
    from edge_vlm_runtime.server.access.tls import Tls

URL_VARIABLE = "EDGE_VLM_URL"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NOT_FOR_SERVERS = ("delivery", "raw_frames", "subtitles")
"""Settings that a client chooses by what it sends."""
CLIENT_SETTINGS = (
    *("keep_ratio", "vision_tokens_per_s", "change_threshold", "attention", "policy", "fps_cap"),
    *("max_answer_tokens", "instructions", "temperature", "top_p", "seed", "reuse"),
)
DIALOGUE_SETTINGS = ("history_turns",)
"""For clients that ask more than once."""


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """What is opened, and what runs it."""

    bundle: Annotated[Path, About(metavar="FOLDER", shows_default=False)] = DEMO_BUNDLE
    """Exported model (default: the small demo model, which knows only its rendered world)."""
    threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """Threads of the engines."""
    backend: Backend = Backend.ORT
    """ONNX Runtime on the CPU (ort) or on a GPU (cuda), engines of `build` (trt), OpenVINO on the
    CPU, or the faster of ONNX Runtime and OpenVINO for each graph (auto)."""
    engines: Annotated[Path | None, About(metavar="FOLDER")] = None
    """Engines for --backend trt (default: BUNDLE/engines)."""
    calibration: Path | None = None
    """Settings that `edge-vlm calibrate` chose for this model on your own footage: sessions begin
    with them unless told otherwise."""

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, who may come, and what it writes."""

    host: Annotated[str, About(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on."""
    port: int = DEFAULT_PORT
    """0 takes a free one."""
    allowed_host: Annotated[list[str], About(metavar="NAME")] = field(default_factory=list)
    """A name that the server answers to, besides addresses, localhost and this machine's own name;
    may be repeated."""
    allow_origin: Annotated[list[str], About(metavar="ORIGIN")] = field(default_factory=list)
    """A page that may connect besides the server's own, for a proxy that changes Host: its origin,
    such as https://camera.example.org; may be repeated."""
    trusted_proxy: Annotated[list[str], About(metavar="ADDRESS")] = field(default_factory=list)
    """A proxy, or a network of them such as 172.18.0.0/16, that is believed whose requests it
    passes on (X-Forwarded-For, Forwarded); may be repeated."""
    tls: bool = False
    """Serve https and wss with a certificate made on the first start (browsers give the camera only
    to https pages and to localhost)."""
    tls_cert: Path | None = None
    """A certificate of your own."""
    tls_key: Path | None = None
    """Its private key."""
    api_key_file: Path | None = None
    """File with the API key (default: the variable EDGE_VLM_API_KEY, or none)."""
    allow_file: Annotated[list[str], About(metavar="FOLDER")] = field(default_factory=list)
    """HTTP requests may name files in this folder and below as file:///...; may be repeated."""
    allow_fetch: bool = False
    """HTTP requests may name http(s) addresses of the public internet, which are fetched."""
    record: Annotated[Path | None, About(metavar="FOLDER", check=recording_folder)] = None
    """Write a recording of each session into this folder; see `replay`."""
    record_max_bytes: Annotated[int, About(option="record_limit", metavar="MIB", unit=1 << 20)] = (
        4 << 30
    )
    """A recording ends at this size."""
    record_total_bytes: Annotated[
        int, About(option="record_total", metavar="MIB", unit=1 << 20)
    ] = 32 << 30
    """All recordings of a folder together; the oldest are deleted for new ones. 0: no bound."""

    def __post_init__(self) -> None:
        if not self.host:  # would listen on every address
            raise ValueError("host must be an address")
        if self.record_max_bytes < 1:
            raise ValueError(f"record_max_bytes must be at least 1, got {self.record_max_bytes}")
        if self.record_total_bytes < 0:
            raise ValueError(
                f"record_total_bytes must be at least 0, got {self.record_total_bytes}"
            )


@dataclass(frozen=True, kw_only=True)
class HomeOptions:
    """How the cameras of the server get into Home Assistant."""

    home_assistant: Annotated[str | None, About(metavar="URL", is_secret=True)] = None
    """Its MQTT broker, mqtt://[USER:PASSWORD@]HOST[:PORT][/TOPIC]: cameras become devices there,
    alerts sensors."""
    discovery_prefix: Annotated[str, About(metavar="TOPIC")] = "homeassistant"
    """Home Assistant's topic for discovery."""
    node: Annotated[str | None, About(metavar="NAME", shows_default=False)] = None
    """This server's name on that broker (default: the machine's, and the port if not 8765)."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How pictures are read."""

    hwaccel: Annotated[
        str,
        About(
            "What decodes: a device if there is one (auto), the CPU (none), or a device by name, "
            "such as cuda or vaapi",
            metavar="auto|none|NAME",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """For commands that may connect to a server elsewhere."""

    url: Annotated[str | None, About(metavar="ADDRESS")] = None
    """A running server: HOST:PORT, http(s)://... or ws(s)://... (default: the variable
    EDGE_VLM_URL)."""
    api_key_file: Path | None = None
    """File with the API key (default: the variable EDGE_VLM_API_KEY, or none)."""
    tls_ca: Path | None = None
    """Certificate to trust for wss://."""


def bundle_options() -> Groups:
    return {"": options_of(BundleOptions)}


OWN_LIMITS = ("kv_capacity_tokens", "max_session_bytes")
"""Limits of a server that a command starts for itself."""


def own_server_options() -> Groups:
    """What `watch` and `ask` open, and how much it may remember. Raises MissingExtraError."""
    from edge_vlm_runtime.protocol.settings import ServerLimits

    title = "limits of a server of its own"
    return {**bundle_options(), title: options_of(ServerLimits, only=OWN_LIMITS)}


def own_limits(args: argparse.Namespace) -> ServerLimits:
    """Of a command that has `own_server_options`, else the usual ones. Raises ConfigError."""
    from edge_vlm_runtime.protocol.settings import ServerLimits

    options = options_of(ServerLimits, only=OWN_LIMITS)
    if not all(hasattr(args, option.key) for option in options):
        return ServerLimits()
    try:
        return ServerLimits(**given(options, args))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def serve_options() -> Groups:
    """All of `serve`, as `--help` shows them. Raises MissingExtraError."""
    from edge_vlm_runtime.cli.common.alerts import OutputOptions
    from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings

    settings = options_of(SessionSettings, unset=True)
    return {
        **bundle_options(),
        "access and operation": options_of(ServeOptions),
        "alerts": options_of(OutputOptions),
        "Home Assistant": options_of(HomeOptions),
        "cameras of its own (tables [[camera]] of the file)": options_of(SourceOptions),
        "limits": options_of(ServerLimits),
        "settings of new sessions (default: what the bundle was made for)": [
            option for option in settings if option.field not in NOT_FOR_SERVERS
        ],
    }


def client_settings() -> Groups:
    """What `watch` may say about its session; `ask`, which asks once, all but DIALOGUE_SETTINGS.
    Raises MissingExtraError."""
    from edge_vlm_runtime.protocol.settings import SessionSettings

    title = "settings of the session (default: the server's)"
    fields = (*CLIENT_SETTINGS, *DIALOGUE_SETTINGS)
    return {title: options_of(SessionSettings, only=fields, unset=True)}


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that no variable and no file tells anything."""
    add_options(parser, bundle_options(), is_checked=True)


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, {"": options_of(BundleOptions, only=("backend", "engines"))})


def add_settings_arguments(parser: argparse.ArgumentParser, *, asks_once: bool = False) -> None:
    left_out = DIALOGUE_SETTINGS if asks_once else ()
    add_options(
        parser,
        {
            title: [option for option in options if option.field not in left_out]
            for title, options in client_settings().items()
        },
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Fields of SessionSettings that the command line sets."""
    options = (option for option in flat(client_settings()) if hasattr(args, option.key))
    return cast("Settings", given(options, args))


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, {"access to a server": options_of(AccessOptions)})


def add_url_argument(parser: argparse.ArgumentParser) -> None:
    """Of a command that knows no other access."""
    add_options(parser, {"": options_of(AccessOptions, only=("url",))})


def add_stream_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Of a command that may look at what the server's own cameras see."""
    parser.add_argument("--stream", metavar="NAME", help=help)


def refuse_settings(args: argparse.Namespace, what: str) -> None:
    """Raises ConfigError for a setting of the session that only its owner may choose."""
    given = [
        option.key
        for option in flat(client_settings())
        if getattr(args, option.key, None) is not None
    ]
    if given:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise ConfigError(
            f"{what} has the settings of its owner: {flags}", remedy="set them in the server's file"
        )


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, {"": options_of(SourceOptions)})


def add_record_argument(parser: Any, metavar: str, help: str) -> None:
    parser.add_argument(
        "--record", type=recording_file, metavar=metavar, help=f"{help}; see `replay`"
    )


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `Server.open`. Raises ConfigError."""
    from edge_vlm_runtime.protocol.settings import ServerLimits
    from edge_vlm_runtime.server.access.auth import read_api_key

    key = read_api_key(args.api_key_file)
    if key is None and args.host not in LOOPBACK:
        print(
            f"edge-vlm: anybody who reaches {args.host} may watch and ask; an API key "
            "(--api-key-file) keeps others out",
            file=sys.stderr,
        )
    *_, settings = serve_options().values()
    served = build(ServeOptions, args)
    return {
        "host": args.host,
        "port": args.port,
        "hosts": args.allowed_host,
        "origins": args.allow_origin,
        "proxies": args.trusted_proxy,
        "media": _media(args),
        "limits": build(ServerLimits, args),
        "settings": given(settings, args),
        "record_to": args.record,
        "record_max_bytes": served.record_max_bytes,
        "record_total_bytes": served.record_total_bytes,
        "api_key": key,
        "tls": _tls(args),
    }


def _media(args: argparse.Namespace) -> MediaRules:
    from edge_vlm.errors import ConfigError
    from edge_vlm_runtime.openai.media import MediaRules

    folders = [Path(folder) for folder in args.allow_file]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("not a folder", where=f"--allow-file {folder}")
    return MediaRules(folders=tuple(folders), may_fetch=args.allow_fetch)


def _tls(args: argparse.Namespace) -> Tls | None:
    from edge_vlm_runtime.server.access.tls import Tls, default_folder, own_names, self_signed

    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if args.tls_cert is not None:
        return Tls(args.tls_cert, args.tls_key).check()
    if not args.tls:
        return None
    names = {*own_names(args.host), *args.allowed_host} - {"*"}
    made = self_signed(default_folder(), sorted(names))
    print(f"certificate: {made.certificate}  (for clients: --tls-ca)", flush=True)
    return made


def address_of(args: argparse.Namespace) -> str | None:
    """The server that was named, by an argument or the variable, of which is told. Raises
    ConfigError when there are two."""
    positional: str | None = getattr(args, "server", None)
    if positional is not None and args.url is not None:
        raise ConfigError("the server is named twice", where=f"{positional} and --url {args.url}")
    named: str | None = positional or args.url
    if named is None and (named := os.environ.get(URL_VARIABLE) or None) is not None:
        print(f"the server of {URL_VARIABLE}: {named}", file=sys.stderr)
    return named


def access_of(args: argparse.Namespace) -> Access:
    """How to reach the server that was named. Raises ConfigError."""
    from edge_vlm_runtime.client.connection import Access
    from edge_vlm_runtime.server.access.auth import read_api_key

    return Access(api_key=read_api_key(args.api_key_file), ca_file=args.tls_ca)
