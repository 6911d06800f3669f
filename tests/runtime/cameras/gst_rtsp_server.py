"""A real RTSP server: GStreamer's own, in a process of its own, with a user and a password.

Run by the system's Python, which has GStreamer's bindings (Debian: python3-gi and
gir1.2-gst-rtsp-server-1.0, with gstreamer1.0-plugins-good and, for H.264, -ugly); so this file
imports nothing of ours:

    python3 tests/runtime/cameras/gst_rtsp_server.py PORT USER PASSWORD

serves a moving ball at rtsp://127.0.0.1:PORT/live until it is killed. Port 0 takes a free one; the
first line printed names it.
"""

from __future__ import annotations

import sys

SOURCE = (
    "videotestsrc is-live=true pattern=ball ! video/x-raw,width=160,height=120,framerate=25/1 ! "
)
H264 = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph264pay name=pay0 pt=96"
JPEG = "jpegenc ! rtpjpegpay name=pay0 pt=26"


def main(port: str, user: str, password: str) -> None:
    import gi  # type: ignore[import-not-found]

    for name in ("Gst", "GstRtsp", "GstRtspServer"):
        gi.require_version(name, "1.0")
    from gi.repository import (  # type: ignore[import-not-found]
        GLib,
        Gst,
        GstRtsp,
        GstRtspServer,
    )

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    coder = H264 if Gst.ElementFactory.find("x264enc") else JPEG
    factory.set_launch(f"( {SOURCE}{coder} )")
    factory.set_shared(True)
    token = GstRtspServer.RTSPToken()
    token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "viewer")
    auth = GstRtspServer.RTSPAuth()
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.BASIC)
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    factory.add_role_from_structure(
        Gst.Structure.new_from_string(
            "viewer, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"
        )
    )
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        raise SystemExit(f"cannot listen on port {port}")
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(*sys.argv[1:])
