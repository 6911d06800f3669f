"""The MCP server of `edge-vlm mcp`: an agent's eyes on a running stream. mcp is imported only here.

It holds nothing itself: the stream's memory is in the server that the camera is connected to.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import edge_vlm
from edge_vlm.errors import (
    EdgeVlmError,
    HostNotAllowed,
    MissingExtraError,
    TooManyRequests,
    Unauthorized,
)
from edge_vlm_runtime.mcp.tools import LONGEST_WAIT_S, Happened, StreamTools, Watched
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.access.hosts import allowed_hosts, require_host
from edge_vlm_runtime.server.access.keys import KeyCheck
from edge_vlm_runtime.server.asgi_server import AsgiServer, listen

try:
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.server.mcpserver.utilities.types import Image
    from mcp.server.transport_security import TransportSecuritySettings
    from mcp.types import ToolAnnotations
    from pydantic import Field
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "mcp", "mcp") from error

PATH = "/mcp"
INSTRUCTIONS = (
    "The eyes of a live camera. A small vision-language model follows its video and remembers it, "
    "so questions may be about now or about before. Ask short, plain questions."
)
Result = TypeVar("Result")
IsLeft = Callable[[], bool]
THREAD = "edge-vlm-mcp-call"
MAX_CALLS = 64
"""At once; most of them wait for something to begin."""

Question = Annotated[str, Field(description="A short question about what the camera sees.")]
Detail = Annotated[
    Literal["video", "snapshot", "both"],
    Field(
        description="video: all that was seen so far; snapshot: the newest picture alone in full "
        "detail, to read a label (not every model can); both."
    ),
]
Since = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="How many seconds back to look from now.")
]
Condition = Annotated[
    str, Field(description='A question that yes or no answers, such as "Is there a cat now?".')
]
Wait = Annotated[
    float,
    Field(
        ge=0,
        le=LONGEST_WAIT_S,
        description="Wait so many seconds for it to begin; 0: come back at once.",
    ),
]


def make_server(tools: StreamTools) -> MCPServer[Any]:
    """With the four tools; what goes wrong with the stream is their error, in words."""
    server: MCPServer[Any] = MCPServer(
        "edge-vlm",
        title="edge-vlm camera",
        instructions=INSTRUCTIONS,
        version=edge_vlm.__version__,
        log_level="WARNING",
    )
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=True)

    @server.tool(annotations=reads)
    async def what_do_you_see(question: Question, detail: Detail = "video") -> str:
        """Asks the model about what the camera sees now or has seen so far."""
        return await _done(lambda is_left: tools.what_do_you_see(question, detail))

    @server.tool(annotations=reads)
    async def what_happened(since: Since = 60.0) -> Happened:
        """Tells what the camera has seen in the last seconds: the model's own account, and when
        conditions of watch_for began and ended."""
        return await _done(lambda is_left: tools.what_happened(since))

    @server.tool(annotations=ToolAnnotations(read_only_hint=False, idempotent_hint=True))
    async def watch_for(condition: Condition, wait_s: Wait = 0.0) -> Watched:
        """Watches for a condition from now on, for as long as the camera runs. Tells whether it
        holds, or waits for it to begin; what_happened tells later when it began and ended."""
        return await _done(lambda is_left: tools.watch_for(condition, wait_s, is_left))

    @server.tool(annotations=reads)
    async def snapshot() -> Image:
        """The newest picture of the camera."""
        return Image(data=(await _done(lambda is_left: tools.snapshot())).jpeg, format="jpeg")

    return server


async def _done(work: Callable[[IsLeft], Result]) -> Result:
    """What `work` returns, on a thread of its own: one that waits keeps no other one waiting, and
    nobody waits for it at the end. It gets a function that says whether its caller has left."""
    if sum(thread.name == THREAD for thread in threading.enumerate()) >= MAX_CALLS:
        raise ToolError(f"{MAX_CALLS} calls are under way already: try again in a moment")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def finish(tell: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            tell(outcome)

    def run() -> None:
        tell: Callable[[Any], None] = done.set_result
        outcome: Any
        try:
            outcome = work(done.cancelled)
        except Exception as error:  # noqa: BLE001 - handed over
            tell, outcome = done.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            loop.call_soon_threadsafe(finish, tell, outcome)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    try:
        return await done
    except EdgeVlmError as error:
        raise ToolError(f"{error.code}: {error}") from error


async def serve_stdio(tools: StreamTools) -> None:
    """Until standard input ends."""
    await make_server(tools).run_stdio_async()


async def serve_http(
    tools: StreamTools,
    *,
    host: str,
    port: int,
    api_key: str | None,
    names: list[str],
    on_start: Callable[[str], None],
) -> None:
    """Streamable HTTP until SIGTERM or Ctrl-C. `on_start` gets the address when it answers;
    `names`: see `allowed_hosts`; with `api_key` a client must have it. Raises ConfigError."""
    server = make_server(tools)
    checked = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # done by _Guard
    application = server.streamable_http_app(streamable_http_path=PATH, transport_security=checked)
    guard = _Guard(application, allowed_hosts(host, names), api_key)
    socket = listen(host, port)
    authority = f"[{host}]" if ":" in host else host
    address = f"http://{authority}:{socket.getsockname()[1]}{PATH}"
    carrier = AsgiServer(
        guard,
        ServerLimits(),
        None,
        on_start=lambda: on_start(address),
        on_signal=lambda: setattr(carrier, "should_exit", True),
    )
    with socket:
        async with server.session_manager.run():
            await carrier.serve(sockets=[socket])


class _Guard:
    """ASGI middleware, as of the server: its own names only, no pages from elsewhere, the key."""

    def __init__(self, app: Any, hosts: frozenset[str], key: str | None) -> None:
        self._app = app
        self._hosts = hosts
        self._keys = KeyCheck(key)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal: EdgeVlmError
        try:
            require_host(self._hosts, scope)
            if any(name.lower() == b"origin" for name, _ in scope["headers"]):
                raise HostNotAllowed("a page may not use this server")
            await self._keys.require(scope, everywhere=True)
        except HostNotAllowed as error:
            status, refusal = 403, error
        except Unauthorized as error:
            status, refusal = 401, error
        except TooManyRequests as error:
            status, refusal = 429, error
        else:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": str(refusal).encode()})
