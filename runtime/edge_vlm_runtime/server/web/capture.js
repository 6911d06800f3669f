// Takes pictures of the source when they are due, and sends them.

import { $ } from "./dom.js";

const MAX_SIDE = 1280; // larger pictures are scaled down before they are sent
const MAX_BUFFERED_BYTES = 1 << 20;
const JPEG_QUALITY = 0.92;
const MOST_LOOKS = 4;

const video = $("video");
const scratch = document.createElement("canvas");

// Seconds of the film. A busy page's `currentTime` is behind what is on screen, by seconds at worst.
function timeOnScreen() {
  if (!window.VideoFrame) return video.currentTime;
  let time_us = null;
  // Where no picture was drawn for a while the last one is given once more: so until two agree.
  for (let look = 0; look < MOST_LOOKS; look += 1) {
    let shown;
    try {
      shown = new VideoFrame(video);
    } catch {
      return video.currentTime; // not of every kind of film in every browser
    }
    const { timestamp } = shown;
    shown.close();
    if (timestamp === time_us) break;
    time_us = timestamp;
  }
  // Firefox gives `currentTime` in whole seconds where microseconds belong; a film's first picture
  // has 0, however long it stays.
  const isSeconds = time_us <= video.currentTime && (time_us > 0 || video.currentTime < 1);
  return isSeconds ? video.currentTime : time_us / 1e6;
}

function draw(picture) {
  const [width, height] = [
    picture.videoWidth ?? picture.width, picture.videoHeight ?? picture.height,
  ];
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  scratch.width = Math.max(1, Math.round(width * scale));
  scratch.height = Math.max(1, Math.round(height * scale));
  scratch.getContext("2d").drawImage(picture, 0, 0, scratch.width, scratch.height);
}

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
    this.source.begin?.();
    this.retime();
    if (this.source.kind !== "picture") return;
    draw(this.source.bitmap);
    this.#send(0);
  }

  retime() {
    clearInterval(this.#timer);
    if (!["camera", "file", "street"].includes(this.source.kind)) return;
    const capture = () => (this.source.kind === "street" ? this.#render() : this.#capture());
    // Twice as often as pictures are due, so that a late tick costs half an interval at most.
    this.#timer = setInterval(capture, 500 / this.settings.fps_cap);
    capture();
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
      now_s = timeOnScreen();
    }
    if (Math.floor(now_s * fps + 1e-3) <= this.#lastTick) return;
    draw(video);
    if (source.kind === "file") {
      let before_s = now_s; // the film goes on meanwhile, so what was drawn may be its next picture
      for (let look = 0; (now_s = timeOnScreen()) !== before_s; look += 1) {
        if (look === MOST_LOOKS) return; // the next time then
        before_s = now_s;
        draw(video);
      }
    }
    this.#lastTick = Math.floor(now_s * fps + 1e-3);
    source.fresh.take();
    this.#send(Math.round((this.#lastTick / fps) * 1e6)); // when it was due
  }

  // Of the street: whoever is slower than it misses pictures.
  async #render() {
    const { source, session, settings: { fps_cap: fps } } = this;
    const { line } = session;
    const isBehind = session.unacknowledged >= session.created?.limits.max_unacknowledged_frames;
    if (this.#encoding || !session.isUp || isBehind) return;
    const tick = Math.floor(source.now_s * fps + 1e-3);
    if (tick <= this.#lastTick) return;
    this.#lastTick = tick;
    this.#encoding = true;
    try {
      const blob = await source.picture(tick / fps);
      const jpeg = await blob?.arrayBuffer();
      if (jpeg && this.source === source && this.#timer !== null && session.line === line) {
        this.sent(session.sendFrame(jpeg, Math.round((tick / fps) * 1e6)), blob);
      }
    } finally {
      this.#encoding = false;
    }
  }

  // What was drawn.
  #send(time_us) {
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
