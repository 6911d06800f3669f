// Takes pictures of the source when they are due, and sends them.

import { $ } from "./dom.js";

const MAX_SIDE = 1280; // larger pictures are scaled down before they are sent
const MAX_BUFFERED_BYTES = 1 << 20;
const JPEG_QUALITY = 0.92;

const video = $("video");
const scratch = document.createElement("canvas");

export class Capture {
  #timer = null;
  #lastTick = -1; // the last due picture that was sent
  #encoding = false;

  // settings.fps_cap: pictures a second; sent(number, blob) is told each picture.
  constructor(session, source, settings, sent) {
    Object.assign(this, { session, source, settings, sent });
  }

  // For a session that has just begun.
  start() {
    this.#lastTick = -1;
    this.retime();
    if (this.source.kind === "picture") this.#send(this.source.bitmap, 0);
  }

  retime() {
    clearInterval(this.#timer);
    if (!["camera", "file"].includes(this.source.kind)) return;
    // Twice as often as pictures are due, so that a late tick costs half an interval at most.
    this.#timer = setInterval(() => this.#capture(), 500 / this.settings.fps_cap);
    this.#capture();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = null;
  }

  // Time of the film has gone back: that is another stream.
  get wentBack() {
    return this.source.kind === "file" && video.currentTime * this.settings.fps_cap < this.#lastTick;
  }

  #capture() {
    const { source, session } = this;
    if (this.#encoding || video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
    if (!session.isUp) { // a camera's pictures of that time are lost, a file waits
      if (source.kind === "file") video.pause();
      return;
    }
    source.lookForStall();
    if (source.trouble) return;
    if (!source.fresh.isFresh) return; // what is on screen was sent: a held or a frozen picture
    if (session.bufferedAmount > MAX_BUFFERED_BYTES) return; // the network is the bottleneck
    const fps = this.settings.fps_cap;
    let now_s = performance.now() / 1000;
    if (source.kind === "file") {
      if (session.unacknowledged >= session.created.limits.max_unacknowledged_frames) {
        video.pause(); // a file waits for the model instead of losing pictures
        return;
      }
      now_s = video.currentTime;
    }
    const tick = Math.floor(now_s * fps + 1e-3);
    if (tick <= this.#lastTick) return;
    this.#lastTick = tick;
    source.fresh.take();
    this.#send(video, Math.round((tick / fps) * 1e6)); // when it was due: what is on screen then
  }

  #send(picture, time_us) {
    const [width, height] = [
      picture.videoWidth ?? picture.width, picture.videoHeight ?? picture.height,
    ];
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    scratch.width = Math.max(1, Math.round(width * scale));
    scratch.height = Math.max(1, Math.round(height * scale));
    scratch.getContext("2d").drawImage(picture, 0, 0, scratch.width, scratch.height);
    this.#encoding = true;
    const { line } = this.session;
    scratch.toBlob(async (blob) => {
      try {
        const jpeg = await blob?.arrayBuffer();
        if (jpeg && line !== null && this.session.line === line) {
          this.sent(this.session.sendFrame(jpeg, time_us), blob);
        }
      } finally {
        this.#encoding = false;
      }
    }, "image/jpeg", JPEG_QUALITY);
  }
}
