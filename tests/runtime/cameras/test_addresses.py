"""What opens, what is refused and how, and what of it may be printed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import VideoError, VideoUnreadable
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.run import Outcome, stream
from edge_vlm_runtime.sources import addresses
from edge_vlm_runtime.sources.addresses import open_camera
from edge_vlm_runtime.sources.container import Picture
from edge_vlm_runtime.sources.live import LiveSource
from edge_vlm_runtime.sources.masking import HIDDEN, mask_credentials
from edge_vlm_runtime.sources.open import open_file, open_source
from edge_vlm_runtime.sources.video_file import FileSource
from tests.runtime.cameras.pictures import write_video
from tests.runtime.server.live import open_server, run

# ---- what may be printed ---------------------------------------------------------------------

PLAIN = st.text("abcdefXYZ0123456789", min_size=6, max_size=12).map(lambda text: f"Zq{text}")
SPECIAL = st.text("abXY12!$%^*()_+-=~|,.;:/#?@", min_size=6, max_size=12).map(lambda t: f"Zq{t}q")
NAMES = st.sampled_from(
    [
        *("password", "passwd", "pass", "pwd", "pw", "token", "access_token", "auth", "key"),
        *("apikey", "api_key", "secret", "Password", "PASSWORD", "user-pw", "user_pw"),
        *("proxy-pw", "Token", "sig", "jwt", "userPassword", "authToken"),
    ]
)
HOST = st.sampled_from(["cam.local", "10.0.0.7", "[fe80::1]", "front-door", "CAM"])
SCHEME = st.sampled_from(
    ["rtsp", "RTSP", "rtsps", "http", "HTTPS", "rtmp", "mqtt", "mqtts", "srt", "Rtsp"]
)


@given(SCHEME, PLAIN, SPECIAL, HOST, st.sampled_from(["://", ":/"]))
def test_no_user_and_no_password_of_an_address_survives(
    scheme: str, user: str, password: str, host: str, slashes: str
) -> None:
    address = f"{scheme}{slashes}{user}:{password}@{host}"
    for text in (
        f"{address}/live",
        f"{address}:554/live?x=1",
        f"cannot open {address}/live (refused)",
        f'gst:rtspsrc location="{address}/live" latency=0 ! decodebin',
        f"gst:rtspsrc location='{address}/live ! decodebin",
        f'gst:rtspsrc location="{address} ! decodebin',
    ):
        masked = mask_credentials(text)
        assert user not in masked
        assert password not in masked
        assert host in masked
        assert mask_credentials(masked) == masked


@given(SCHEME, st.sampled_from(["pass word", 'pa"ss w', "pa ss'w", "a!b c", "a < b"]), HOST)
def test_a_password_with_blanks_and_quotes_does_not_survive(
    scheme: str, password: str, host: str
) -> None:
    masked = mask_credentials(f"{scheme}://admin:{password}@{host}/live")
    assert masked == f"{scheme}://{HIDDEN}@{host}/live"


@given(SCHEME, NAMES, PLAIN, SPECIAL.filter(lambda text: "&" not in text), HOST)
def test_no_named_secret_survives(
    scheme: str, name: str, user: str, secret: str, host: str
) -> None:
    url = f"{scheme}://{host}"
    for text, readable in (
        (f"{url}/user={user}&{name}={secret}&channel=1&stream=0.sdp", "channel=1&stream=0.sdp"),
        (f"{url}/live?channel=2&user={user}&{name}={secret}", "channel=2"),
        (f"{url}/live?USER={user}&{name}={secret}&n=1", "n=1"),
        (f"gst:rtspsrc location={url}/1 user-id={user} {name}={secret} ! decodebin", "decodebin"),
        (f'rtspsrc user-id="{user}" {name}="{secret}" ! decodebin', "decodebin"),
        (f"rtspsrc user-id='{user}' {name}=(string)'{secret}' ! decodebin", "decodebin"),
        (f'rtspsrc user-id={user} {name}="{secret} ! decodebin', "rtspsrc"),
        (f"rtspsrc user-id={user} {name}='{secret} ! decodebin", "rtspsrc"),
    ):
        masked = mask_credentials(text)
        assert user not in masked
        assert secret not in masked
        assert readable in masked
        assert mask_credentials(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "clip.mp4",
        "12:30:00.mp4",
        "/data/cameras/front door/2024-05-01T12:30:00.mkv",
        "rtsp://cam.local:554/live/ch1?transport=tcp&channel=2",
        "rtsp://[fe80::1]:554/live",
        "http://cam.local/video.m3u8?start=10",
        "gst:videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240",
        "x264enc key-int-max=25 bypass=true tune=zerolatency ! rtph264pay pt=96",
        "the camera does not answer (Connection refused)",
        "no picture for 10 s",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert mask_credentials(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://127.0.0.1:9/user=admin&password=Zq3cret&channel=1&stream=0.sdp",
        "http://admin:Zq3cret@127.0.0.1:9/stream.mjpg",
        "http://admin:Zq3cret@127.0.0.1:9/film.mp4",
        "RTSP://admin:Zq3cret@127.0.0.1:9/live",
        "ftp://admin:Zq3cret@127.0.0.1:9/live",
        "rtsp://admin:Zq3cret#/?@127.0.0.1:9/live",
        "admin:Zq3cret@127.0.0.1/live",
        'gst:rtspsrc location="rtsp://admin:Zq3cret@127.0.0.1 ! decodebin',
        "gst:rtspsrc location=rtsp://127.0.0.1:9/ user-id=admin user-pw=Zq3cret ! decodebin",
    ],
)
@pytest.mark.parametrize("opens", [open_source, open_file])
def test_no_error_of_a_source_repeats_a_password(opens: object, text: str) -> None:
    with pytest.raises(VideoError) as caught:
        opens(text, 2.0)  # type: ignore[operator]
    assert "Zq3cret" not in str(caught.value)


# ---- what is refused, and how ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://cam/clip.mp4", r"ftp:// is not a file.*rtsp://.*gst:PIPELINE"),
        ("0", r"no such file \(0\): the camera of this number is webcam:0"),
        ("rtsp://no-such-host.invalid/live", "no computer of this name is known"),
        ("http://no-such-host.invalid/live", "no computer of this name is known"),
        ("/dev/v4l/by-id/usb-046d_C920-video-index0", "there is no camera /dev/v4l/by-id"),
        ("rtsp://a:p@ss#w/rd?1@127.0.0.1:9/live", "# as %23, / as %2F, . as %3F, @ as %40"),
        ("file:///no/such/clip.mp4", r"no such file \(/no/such/clip.mp4\)"),
    ],
)
def test_a_source_that_cannot_be_says_what_is_nearest(text: str, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        open_source(text, 2.0)


def test_ask_names_the_command_for_a_camera() -> None:
    with pytest.raises(VideoUnreadable, match=r"rtsp:// is not a file.*edge-vlm watch --source"):
        open_file("rtsp://cam/live", 2.0)


def test_a_film_by_its_file_address(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a b#1.mp4", num_frames=4)
    source = open_source(path.as_uri(), 2.0)
    assert len(list(source.pictures())) == 4


@pytest.mark.parametrize("name", ["12:30:00.mp4", "rtsp:clip.mp4"])
def test_a_film_with_a_colon_in_its_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / name, num_frames=4)
    monkeypatch.chdir(tmp_path)
    for opens in (open_source, open_file):
        assert len(list(opens(name, 2.0).pictures())) == 4


def test_a_film_from_standard_input(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", num_frames=4)
    script = (
        "from edge_vlm_runtime.sources.open import open_source;"
        "print(len(list(open_source('-', 2.0).pictures())))"
    )
    with path.open("rb") as film:
        done = subprocess.run(
            [sys.executable, "-c", script], stdin=film, capture_output=True, text=True
        )
    assert done.stdout.strip() == "4", done.stderr


def test_a_large_picture_does_not_end_a_run() -> None:
    """It is made as large as the model can use, and then as small as a message may be."""

    class Noise:
        name, is_live = "noise", False
        max_side: int | None = None
        counts: ClassVar[Counter[str]] = Counter()

        def pictures(self) -> Iterator[Picture]:
            assert self.max_side is not None
            side = min(4000, self.max_side)
            rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
            yield Picture(rgb=rgb, time_s=0.0)

        def close(self) -> None: ...

    async def session(url: str) -> Outcome:
        async with await Client.connect(url) as client:
            return await stream(Noise(), client, [], real_time=False)

    with open_server(max_message_bytes=1 << 16) as server:
        server.start()
        outcome = run(session(server.url))
    assert outcome.first_error is None
    assert outcome.frames_processed == 1


# ---- web cameras -----------------------------------------------------------------------------


class WebCamera(BaseHTTPRequestHandler):
    """`/mjpg`: pictures for ever, each brighter; `/film.mkv`; 401 and 404."""

    film = b""

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        if self.path.startswith("/film"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.film)))
            self.end_headers()
            self.wfile.write(self.film)
        elif self.path.startswith("/mjpg"):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=b")
            self.end_headers()
            try:
                for number in range(100_000):
                    jpeg = encode_jpeg(np.full((64, 64, 3), 20 + number % 200, np.uint8))
                    head = f"--b\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
                    time.sleep(0.01)
            except OSError:
                return
        else:
            self.send_error(401 if self.path.startswith("/closed") else 404)


@contextmanager
def web_camera() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebCamera)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_a_web_camera(scheme: str) -> None:
    with web_camera() as host:
        source = open_source(f"{scheme}://admin:secret@{host}/mjpg", 50.0)
        assert isinstance(source, LiveSource)
        assert "secret" not in source.name
        seen = [next(source.pictures()) for _ in range(4)]
        source.close()
    assert all(picture.rgb.shape == (64, 64, 3) for picture in seen)


def test_a_film_on_the_web(tmp_path: Path) -> None:
    WebCamera.film = write_video(tmp_path / "a.mkv", num_frames=4).read_bytes()
    with web_camera() as host:
        source = open_source(f"http://{host}/film.mkv?n=1", 2.0)
        assert isinstance(source, FileSource)
        assert [picture.time_s for picture in source.pictures()] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("path", "words"), [("closed", "another user or password.*401"), ("none", "path.*404")]
)
def test_a_web_camera_that_answers_no(path: str, words: str) -> None:
    with web_camera() as host, pytest.raises(VideoUnreadable, match=words):
        open_source(f"http://{host}/{path}", 2.0)


def test_a_protocol_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_is_unknown_host", lambda url: False)
    with pytest.raises(VideoUnreadable, match="does not speak this protocol"):
        open_camera("nosuch://127.0.0.1/live")


# ---- webcams ---------------------------------------------------------------------------------


def bad_first(path: Path) -> Path:
    """Motion JPEG whose first picture is zeros, as some webcams give it after each opening."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for level in range(20, 100, 10):
            rgb = np.full((64, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    begin = data.index(b"00dc", data.index(b"movi")) + 8
    size = int.from_bytes(data[begin - 4 : begin], "little")
    data[begin : begin + size] = bytes(size)
    path.write_bytes(data)
    return path


def test_a_webcam_whose_first_picture_is_bad_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = bad_first(tmp_path / "webcam.avi")
    source = LiveSource("webcam", 1000.0, lambda: open_camera(str(path)), first_back_off_s=0.01)
    for _ in source.pictures():
        if source.reconnects == 3:
            break
    source.close()
    assert "Invalid data" not in caplog.text
    assert source.counts["decode_error"] >= 3


# ---- hardware --------------------------------------------------------------------------------


def test_without_the_named_device_the_cpu_decodes_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=4)
    video = open_camera(str(path), is_live=False, hwaccel="nonsense")
    assert len(list(video.frames())) == 4
    assert "nonsense is not among" in caplog.text
    assert "the CPU decodes" in caplog.text


@pytest.mark.parametrize("hwaccel", ["auto", "none"])
def test_any_device_or_none_shows_the_same_pictures(tmp_path: Path, hwaccel: str) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=4)
    video = open_camera(str(path), is_live=False, hwaccel=hwaccel)
    seen = [round(float(frame.rgb().mean())) for frame in video.frames()]
    assert seen == pytest.approx([20, 30, 40, 50], abs=3)


# ---- GStreamer -------------------------------------------------------------------------------

BARS = np.array(
    [(191, 191, 191), (191, 191, 0), (0, 191, 191), (0, 191, 0), (191, 0, 191), (191, 0, 0)]
)


@pytest.fixture
def gstreamer() -> None:
    if shutil.which("gst-launch-1.0") is None:
        pytest.skip("GStreamer (gstreamer1.0-tools) is not installed")


@pytest.mark.parametrize("size", [(320, 240), (1280, 720), (321, 241), (322, 242)])
@pytest.mark.parametrize("form", ["I420", "NV12", "YUY2", "RGB", "Y444", "any"])
def test_colours_of_a_pipeline(gstreamer: None, size: tuple[int, int], form: str) -> None:
    width, height = size
    caps = f"video/x-raw,width={width},height={height}"
    caps += "" if form == "any" else f",format={form}"
    source = open_source(f"gst:videotestsrc is-live=true pattern=smpte75 ! {caps}", 5.0)
    rgb = next(source.pictures()).rgb
    source.close()
    assert rgb.shape == (height, width, 3)
    columns = [(2 * i + 1) * width // 14 for i in range(6)]
    assert np.abs(rgb[height // 3, columns].astype(int) - BARS).max() <= 3


def test_colours_of_a_jpeg_camera_through_a_pipeline(gstreamer: None, tmp_path: Path) -> None:
    colours = np.array([(64, 64, 64), (200, 40, 40), (255, 255, 255), (0, 0, 0), (40, 180, 40)])
    rgb = colours.astype(np.uint8).repeat(64, axis=0)[None].repeat(240, axis=0)
    path = tmp_path / "a.jpg"
    path.write_bytes(encode_jpeg(rgb))
    source = open_source(
        f"gst:multifilesrc location={path} loop=true caps=image/jpeg,framerate=10/1 ! jpegdec", 5.0
    )
    seen = next(source.pictures()).rgb
    source.close()
    assert np.abs(seen[120, 32::64].astype(int) - colours).max() <= 3


def test_a_pipeline_whose_pictures_lie_on_their_side(gstreamer: None) -> None:
    source = open_source(
        "gst:videotestsrc is-live=true pattern=smpte75 ! video/x-raw,width=320,height=240 "
        "! taginject tags=image-orientation=rotate-90",
        5.0,
    )
    rgb = next(source.pictures()).rgb
    source.close()
    assert rgb.shape == (320, 240, 3)
    rows = [(2 * i + 1) * 320 // 14 for i in range(6)]
    assert np.abs(rgb[rows, 160].astype(int) - BARS).max() <= 3
