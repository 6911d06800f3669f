// Where pictures come from: a camera of this device, a video file, a picture, a camera of the server.

import { $ } from "./dom.js";
import { FreshPictures } from "./fresh.js";
import { showNothing, showStill, showVideo, showWaiting } from "./stage.js";

const STALLED_MS = 3000; // a camera that shows nothing new for this long is said to
const GONE = "The camera is gone: unplugged, or no longer allowed. Nothing is sent any more.";
const MUTED = "The camera gives no pictures: covered, or used by another program. Nothing is sent.";
const WHY_NO_CAMERA = {
  NotAllowedError: "The browser may not use the camera. Allow it for this page (the camera sign " +
    "beside the address, or the browser's settings), then press Camera again.",
  NotFoundError: "This device has no camera that the browser knows of. Open a file, or try the " +
    "demo clip.",
  NotReadableError: "The camera is used by another program. Close that, then press Camera again.",
  OverconstrainedError: "That camera is not there any more. Choose another one.",
};

const video = $("video");
const fresh = new FreshPictures(video);

export class Source {
  // changed() is called when `trouble` has changed.
  constructor(kind, name, changed = () => {}) {
    this.kind = kind; // camera, file, picture, street or stream
    this.name = name;
    this.changed = changed;
    this.trouble = null; // why nothing is sent
    this.isStalled = false;
  }

  get fresh() {
    return fresh;
  }

  get isLive() {
    return this.kind === "camera" || this.kind === "street";
  }

  // Raises an Error whose message says what to do.
  static async camera(deviceId, changed) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("The browser gives the camera only to https pages and to localhost: start " +
        "the server with --tls. Files, pictures and the server's own cameras work without.");
    }
    const choice = deviceId ? { deviceId: { exact: deviceId } } : {};
    const source = new Source("camera", "this camera", changed);
    try {
      source.stream = await navigator.mediaDevices.getUserMedia({
        video: { width: { ideal: 1280 }, height: { ideal: 720 }, ...choice }, audio: false,
      });
    } catch (error) {
      throw new Error(WHY_NO_CAMERA[error.name] ?? `No camera: ${error.message}`);
    }
    return source;
  }

  static file(file) {
    const source = new Source("file", file.name);
    source.url = URL.createObjectURL(file);
    return source;
  }

  static address(url, name) {
    const source = new Source("file", name);
    source.url = url;
    return source;
  }

  static async picture(file) {
    const source = new Source("picture", file.name);
    try {
      source.bitmap = await createImageBitmap(file);
    } catch {
      throw new Error(`${file.name} is no picture that this browser can read. JPEG, PNG and WebP ` +
        "work in all of them.");
    }
    return source;
  }

  get deviceId() {
    return this.stream?.getVideoTracks()[0]?.getSettings().deviceId;
  }

  // On screen. Raises an Error whose message says what to do.
  async show() {
    if (this.kind === "picture") showStill(this.bitmap);
    if (this.kind === "stream") showWaiting(`Waiting for a picture of ${this.name}.`);
    if (this.kind === "picture" || this.kind === "stream") return;
    if (this.stream) {
      this.#watchTrack();
      video.srcObject = this.stream;
    } else {
      video.src = this.url;
    }
    this.fresh.reset();
    try {
      await video.play();
    } catch (error) {
      if (error.name === "AbortError") return; // something else was chosen meanwhile
      throw new Error(`The browser cannot play ${this.name}: ${this.kind === "camera"
        ? error.message : "it is no video, or of a kind that this browser does not know. MP4 with " +
          "H.264 and WebM work in most of them."}`);
    }
    if (video.videoWidth === 0) throw new Error(`${this.name} has sound alone: there is no picture.`);
    showVideo();
  }

  // A camera may be unplugged, covered, taken by another program or forbidden at any moment; the
  // element then shows its last picture for ever.
  #watchTrack() {
    const [track] = this.stream.getVideoTracks();
    track.onended = () => this.setTrouble(GONE);
    track.onmute = () => this.setTrouble(MUTED);
    track.onunmute = () => this.setTrouble(null);
    if (track.muted) this.setTrouble(MUTED);
  }

  setTrouble(text, isStalled = false) {
    if (this.trouble === text) return;
    Object.assign(this, { trouble: text, isStalled });
    this.changed();
  }

  lookForStall() {
    if (this.kind !== "camera") return;
    const isStalled = this.fresh.age > STALLED_MS;
    if (isStalled && !this.trouble) {
      this.setTrouble(document.hidden
        ? "While this page was hidden it got no pictures from the browser. Nothing was sent."
        : "The camera gives no new pictures. Nothing is sent.", true);
    } else if (!isStalled && this.isStalled) {
      this.setTrouble(null);
    }
  }

  // A file that waited for the model, for the network or for somebody to look at it.
  resume() {
    if (this.kind === "file" && video.paused && !video.ended && !document.hidden) {
      video.play().catch(() => {}); // what stopped it will be said by `show` or is on screen
    }
  }

  stopTracks() {
    this.changed = () => {};
    this.stream?.getTracks().forEach((track) => {
      track.onended = track.onmute = track.onunmute = null;
      track.stop();
    });
  }

  close() {
    this.stopTracks();
    if (this.url?.startsWith("blob:")) URL.revokeObjectURL(this.url);
    this.bitmap?.close();
    video.srcObject = null;
    video.removeAttribute("src");
    video.load();
    showNothing();
  }
}

// The cameras of this device, with the names the browser tells once one of them was allowed.
export async function listDevices(select, chosen) {
  const devices = await navigator.mediaDevices?.enumerateDevices?.().catch(() => []) ?? [];
  const cameras = devices.filter(({ kind, deviceId }) => kind === "videoinput" && deviceId);
  select.replaceChildren(...cameras.map(({ deviceId, label }, number) =>
    new Option(label || `Camera ${number + 1}`, deviceId, false, deviceId === chosen)));
  select.hidden = cameras.length < 2;
}

// Files that are dropped anywhere on the page; other() is called for anything else.
export function takeDrops(taken, other) {
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  };
  document.ondragleave = (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dropping");
  };
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) taken(file, event.dataTransfer.files.length);
    else other();
  };
}
