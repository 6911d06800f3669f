"""Who is at the door: addresses, guesses at the key, places, and what is written of strangers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import ConfigError, HostNotAllowed, TooManyRequests, Unauthorized
from edge_vlm_runtime.server.access import doors, keys, repeated_lines
from edge_vlm_runtime.server.access.addresses import TrustedProxies, is_loopback, neighbourhood
from edge_vlm_runtime.server.access.doors import Doors, Stage, Visitor
from edge_vlm_runtime.server.access.keys import KeyCheck
from edge_vlm_runtime.server.access.origins import Origins, require_readable
from edge_vlm_runtime.server.access.repeated_lines import RepeatedLines
from tests.runtime.server.live import run

KEY = "correct horse battery staple"
PROXIES = TrustedProxies(["127.0.0.1", "10.0.0.0/8", "fd00::/8"])


def headers(**values: str) -> list[tuple[bytes, bytes]]:
    return [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in values.items()]


@pytest.mark.parametrize(
    ("peer", "told", "client"),
    [
        ("203.0.113.5", {"x_forwarded_for": "198.51.100.7"}, "203.0.113.5"),  # no proxy
        ("::1", {"x_forwarded_for": "198.51.100.7"}, "::1"),
        ("127.0.0.1", {}, "127.0.0.1"),
        ("127.0.0.1", {"x_forwarded_for": "198.51.100.7"}, "198.51.100.7"),
        ("::ffff:127.0.0.1", {"x_forwarded_for": "198.51.100.7"}, "198.51.100.7"),
        ("10.1.2.3", {"x_forwarded_for": "1.1.1.1, 198.51.100.7, 10.9.9.9"}, "198.51.100.7"),
        ("10.1.2.3", {"x_forwarded_for": "10.1.1.1, 10.2.2.2"}, "10.1.1.1"),
        ("127.0.0.1", {"x_forwarded_for": "198.51.100.7:4711"}, "198.51.100.7"),
        ("127.0.0.1", {"x_forwarded_for": "[2001:db8::7]:80"}, "2001:db8::7"),
        ("127.0.0.1", {"x_forwarded_for": "2001:db8::7"}, "2001:db8::7"),
        ("127.0.0.1", {"x_forwarded_for": "8.8.8.8, unknown"}, "127.0.0.1"),
        ("127.0.0.1", {"x_forwarded_for": "8.8.8.8, junk, 10.0.0.9"}, "10.0.0.9"),
        ("127.0.0.1", {"x_forwarded_for": ""}, "127.0.0.1"),
        ("127.0.0.1", {"x_forwarded_for": "1.1.1.1," * 1000}, "127.0.0.1"),
        ("127.0.0.1", {"forwarded": "for=1.1.1.1, For=198.51.100.7;proto=https"}, "198.51.100.7"),
        ("127.0.0.1", {"forwarded": 'for="[2001:db8::7]:80";by=x'}, "2001:db8::7"),
        ("127.0.0.1", {"forwarded": 'for="a, for=1.1.1.1, for=198.51.100.7'}, "127.0.0.1"),
        ("127.0.0.1", {"forwarded": "for=1.1.1.1, proto=https"}, "127.0.0.1"),
        ("127.0.0.1", {"forwarded": "for=_hidden"}, "127.0.0.1"),
        # One of them is the client's own word: a proxy sets one and passes the other on.
        ("127.0.0.1", {"forwarded": "for=1.1.1.1", "x_forwarded_for": "8.8.8.8"}, "127.0.0.1"),
        ("127.0.0.1", {"forwarded": "for=8.8.8.8", "x_forwarded_for": "8.8.8.8"}, "8.8.8.8"),
    ],
)
def test_whose_request_it_is(peer: str, told: dict[str, str], client: str) -> None:
    assert PROXIES.client_of(peer, headers(**told)) == client


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_what_a_client_says_of_itself_changes_nothing_behind_a_proxy(a: bytes, b: bytes) -> None:
    """The proxy appends the truth; or one cannot tell, and it is the proxy's own."""
    before = a.replace(b"\n", b""), b.replace(b"\n", b"")
    listed = [(b"x-forwarded-for", before[0] + b", 198.51.100.7")]
    assert PROXIES.client_of("127.0.0.1", listed) == "198.51.100.7"
    both = [*listed, (b"forwarded", before[1])]
    assert PROXIES.client_of("127.0.0.1", both) in ("198.51.100.7", "127.0.0.1")


@pytest.mark.parametrize("text", ["", "proxy", "10.0.0.1/8", "10.0.0.0/33", "*"])
def test_what_is_no_proxy(text: str) -> None:
    with pytest.raises(ConfigError, match="trusted proxies"):
        TrustedProxies([text])


def test_parties() -> None:
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:2") == "2001:db8::/64"
    assert neighbourhood("2001:db8:0:1::1") != neighbourhood("2001:db8::1")
    assert neighbourhood("::ffff:198.51.100.7") == "198.51.100.7"
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("", "localhost", "10.0.0.1", "::2")))


# ---- keys ------------------------------------------------------------------------------------


def scope(host: str, key: str | None) -> dict[str, Any]:
    given = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return {"path": "/metrics", "headers": given, "client": (host, 1)}


class Guesser:
    """Tries keys; waiting passes at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []
        self.attempts: list[str] = []
        self.check = KeyCheck(KEY, clock_s=lambda: self.now_s, on_attempt=self.attempts.append)
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds

    def wait_s(self, host: str, key: str) -> float:
        """How long until the key has been looked at."""
        before = self.now_s
        if key == KEY:
            run(self.check.require(scope(host, key)))
        else:
            with pytest.raises(Unauthorized):
                run(self.check.require(scope(host, key)))
        return self.now_s - before


def test_guesses_of_an_address_are_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    guesser = Guesser(monkeypatch)
    waits = [guesser.wait_s("198.51.100.7", f"guess {n}") for n in range(20)]
    assert waits[: keys.FREE] == [0.0] * keys.FREE
    assert waits[keys.FREE :] == pytest.approx([keys.PAUSE_S] * (20 - keys.FREE))
    assert guesser.attempts == ["wrong"] * 20
    assert guesser.wait_s("198.51.100.8", KEY) == 0.0  # who has the key does not notice
    assert guesser.wait_s("198.51.100.7", KEY) <= keys.PAUSE_S
    guesser.now_s += keys.FREE * keys.PAUSE_S
    assert guesser.wait_s("198.51.100.7", KEY) == 0.0
    assert guesser.wait_s("198.51.100.7", KEY) == 0.0  # a right one costs nothing


def test_many_addresses_are_slowed_down_together(monkeypatch: pytest.MonkeyPatch) -> None:
    guesser = Guesser(monkeypatch)
    for host in range(200):
        assert guesser.wait_s(f"198.51.100.{host}", "guess") == 0.0  # each has one, at once
    again = [guesser.wait_s(f"198.51.100.{host}", "guess") for host in range(200)]
    assert sum(again) >= 200 * keys.PAUSE_IN_ALL_S
    assert keys.PAUSE_S < max(again) <= keys.LONGEST_S
    assert guesser.wait_s("203.0.113.1", KEY) == 0.0
    assert guesser.wait_s("127.0.0.1", "typing error") == 0.0
    assert guesser.wait_s("127.0.0.1", KEY) == 0.0


def test_only_so_many_addresses_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_ADDRESSES", 10)
    guesser = Guesser(monkeypatch)
    waits = [guesser.wait_s(f"198.51.{n // 200}.{n % 200}", "guess") for n in range(60)]
    assert len(guesser.check._paces) <= 11
    assert max(waits) > 0.0
    guesser.now_s += 1000.0  # all have been quiet
    assert guesser.wait_s("203.0.113.1", "guess") == 0.0


def test_attempts_at_the_same_time_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PAUSE_S", 0.02)
    outcomes: list[str] = []

    async def attempts() -> list[BaseException | None]:
        check = KeyCheck(KEY, clock_s=lambda: 0.0, on_attempt=outcomes.append)
        for _ in range(keys.FREE):
            with pytest.raises(Unauthorized):
                await check.require(scope("198.51.100.7", "guess"))
        tries = (check.require(scope("198.51.100.7", "guess")) for _ in range(10))
        return await asyncio.gather(*tries, return_exceptions=True)

    found = run(attempts())
    refused = [error for error in found if isinstance(error, TooManyRequests)]
    assert len(refused) == 10 - keys.MAX_WAITING
    assert refused[0].retry_after_s >= 1
    assert outcomes.count("refused") == len(refused)
    assert outcomes.count("wrong") == keys.FREE + keys.MAX_WAITING


def test_no_key_is_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    guesser = Guesser(monkeypatch)
    for _ in range(100):
        with pytest.raises(Unauthorized, match="wants an API key"):
            run(guesser.check.require(scope("198.51.100.7", None)))
    assert not guesser.attempts
    assert guesser.wait_s("198.51.100.7", "guess") == 0.0


# ---- places ----------------------------------------------------------------------------------


class House:
    def __init__(self, places: int, per_party: int, proxies: TrustedProxies | None = None) -> None:
        self.refused: list[str] = []
        self.cut: list[Visitor] = []
        self.doors = Doors(places, per_party, proxies or TrustedProxies(), self.refused.append)

    def come(self, host: str, stage: Stage = Stage.NEW) -> Visitor | None:
        visitor = self.doors.let_in(host)
        if visitor is not None:
            visitor.stage = stage
            visitor.cut = lambda: self.cut.append(visitor)
        return visitor


def test_who_asks_for_nothing_gives_way() -> None:
    house = House(places=8, per_party=100)
    stages = [Stage.SERVED, Stage.STRANGER, Stage.BETWEEN, Stage.NEW, Stage.NEW, Stage.BETWEEN]
    come = [house.come(f"198.51.100.{n}", stage) for n, stage in enumerate(stages)]
    for n in range(20):
        assert house.come(f"203.0.113.{n}", Stage.SERVED) is not None or n >= 5
    assert house.cut == [come[3], come[4], come[2], come[5], come[1]]
    assert set(house.refused) == {"full"}
    assert house.come("203.0.113.200") is None
    assert house.doors.num_visitors == 6
    assert house.come("127.0.0.1", Stage.SERVED) is not None  # their own places
    assert house.come("::1", Stage.SERVED) is not None
    assert house.come("127.0.0.1") is None
    house.doors.leave(come[0])  # type: ignore[arg-type]
    house.doors.leave(come[0])  # type: ignore[arg-type]
    assert house.doors.num_visitors == 7


def test_an_address_has_so_many_places() -> None:
    house = House(places=100, per_party=3)
    first = house.come("198.51.100.7")
    for _ in range(3):
        assert house.come("198.51.100.7", Stage.SERVED) is not None
    assert house.cut == [first]
    assert house.come("198.51.100.7") is None
    assert house.come("198.51.100.8") is not None
    assert all(house.come("127.0.0.1", Stage.SERVED) for _ in range(10))
    assert house.refused == ["address", "address"]


def test_the_clients_of_a_proxy_have_places_each() -> None:
    house = House(places=100, per_party=2, proxies=TrustedProxies(["127.0.0.1"]))
    behind = [house.come("127.0.0.1", Stage.SERVED) for _ in range(6)]
    assert all(behind)
    told = [house.doors.know(v, "198.51.100.7") for v in behind if v is not None]
    assert told == [True, True, False, False, False, False]
    assert behind[0] is not None
    assert behind[2] is not None
    assert house.doors.know(behind[0], "198.51.100.8")  # another one's request
    assert house.doors.know(behind[2], "198.51.100.7")


class Sock:
    size = 0

    def get_write_buffer_size(self) -> int:
        return self.size


def test_who_takes_nothing_is_cut() -> None:
    house = House(places=10, per_party=10)
    carriers = Sock(), Sock(), Sock()
    visitors = [house.come("198.51.100.7", Stage.SERVED) for _ in carriers]
    for visitor, carrier in zip(visitors, carriers, strict=True):
        assert visitor is not None
        visitor.carrier = carrier
    slow, stuck, _ = visitors
    carriers[1].size = 1000
    for second in range(int(doors.STALL_S) + 3):
        carriers[0].size = 5000 - second  # takes a byte a second
        house.doors.sweep(float(second))
    assert house.cut == [stuck]
    for second in range(100, 200):
        assert slow is not None
        slow.is_taken = second % 20 == 0  # was empty enough meanwhile, and full again
        carriers[0].size = 70_000
        house.doors.sweep(float(second))
    assert house.cut == [stuck]


def test_places_follow_the_limit_of_open_files() -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (doors._num_open() + 50, limits[1]))
        assert 20 <= doors.room_for_connections(512, 10) <= 40
        assert doors.room_for_connections(512, 1000) == 1
        assert doors.room_for_connections(5, 10) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- origins ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["http://[", "http://[::1", "http://]", "http://a:99999999", "http://a:b", "//[x]"]
)
def test_an_origin_that_cannot_be_read(origin: str) -> None:
    assert not Origins().allows(origin, "127.0.0.1")
    with pytest.raises(HostNotAllowed, match="cannot be read"):
        require_readable({"headers": [(b"origin", origin.encode())]})
    require_readable({"headers": [(b"origin", b"null")]})
    require_readable({"headers": [(b"origin", b"http://camera:80")]})


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_origin_breaks_the_check(origin: str, host: str) -> None:
    assert Origins().allows(origin, host) in (True, False)


# ---- the log ---------------------------------------------------------------------------------


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_strangers_cannot_fill_the_log() -> None:
    lines = Lines()
    timers: list[Callable[[], None]] = []
    lines.addFilter(RepeatedLines(lines, lambda seconds, call: timers.append(call)))

    def write(name: str, text: str, *values: object) -> None:
        lines.handle(logging.LogRecord(name, logging.WARNING, "", 0, text, values, None))

    for n in range(1000):
        write("uvicorn.error", "Invalid HTTP request received.\n")
        write("edge_vlm_runtime.server.access.keys", "a wrong API key came from %s", n)
        write("edge_vlm_runtime.cameras.camera", "camera %s is lost", n)
    assert len([text for text in lines.texts if "Invalid" in text]) == repeated_lines.BURST
    assert len([text for text in lines.texts if "wrong" in text]) == repeated_lines.BURST
    assert len([text for text in lines.texts if "lost" in text]) == 1000
    assert len(timers) == 2
    for call in timers:
        call()
    assert lines.texts[-2:] == [
        "995 more like this in 60 s: Invalid HTTP request received.",
        "995 more like this in 60 s: a wrong API key came from %s",
    ]
    write("uvicorn.error", "Invalid HTTP request received.\n")
    timers.pop()()
    assert lines.texts[-1] == "Invalid HTTP request received.\n"  # nothing to sum up
    for n in range(2000):
        write("uvicorn.error", f"a line with {n} in it")
    assert len(lines.texts) < 2000 + repeated_lines.MAX_KINDS
    assert len(lines.texts) < 1300 + repeated_lines.MAX_KINDS
