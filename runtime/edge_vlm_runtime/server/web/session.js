// The session of this page: a Line, and when the server was restarted the next one.

import { protocols } from "./access.js";
import { Line } from "./line.js";

const HEADER_BYTES = 24;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
// How a connection ends that may be had again, once there was a session.
const PASSING = new Set([1001, 1005, 1006, 1011, 1012, 1013]);
const GONE = new Set(["E-SESSION-GONE", "E-REPLAY-LOST"]);

export class Session {
  // handlers: event(event), picture(bytes), state(state), ended(closed, hadBegun)
  // state: idle, connecting, up, broken (it will go on) or restarting (a new one is tried for)
  constructor(handlers) {
    this.handlers = handlers;
    this.state = "idle";
    this.created = null; // the session.created event
    this.isAgain = false; // it follows one that the server has lost, and with it its memory
    this.line = null;
    this.stream = null;
    this.timer = null;
    this.eventNumber = 0;
    this.frameNumber = 0;
    this.unacknowledged = 0;
    addEventListener("online", () => this.hurry());
  }

  get isUp() {
    return this.state === "up";
  }

  // Whether a message has a session to arrive at, at once or when its connection is back.
  get isOpen() {
    return this.created !== null && this.line !== null && this.state !== "restarting";
  }

  get bufferedAmount() {
    return this.line.bufferedAmount;
  }

  // stream: the name of a camera of the server, or null for pictures of one's own.
  open(stream = null) {
    this.close();
    this.stream = stream;
    this.isAgain = false;
    this.pause = FIRST_PAUSE_MS;
    this.created = null;
    this.connect("connecting");
  }

  close() {
    clearTimeout(this.timer);
    this.line?.close();
    this.line = null;
    this.created = null;
    this.enter("idle");
  }

  enter(state) {
    if (this.state === state) return;
    this.state = state;
    this.handlers.state(state);
  }

  connect(state) {
    const url = new URL("v1/realtime", document.baseURI); // behind a proxy there may be a path
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    url.hash = url.search = "";
    if (this.stream !== null) {
      url.searchParams.set("stream", this.stream);
      url.searchParams.set("subscribe_pictures", "true");
    }
    this.frameNumber = 0;
    this.unacknowledged = 0;
    this.code = null; // of the last error
    this.enter(state);
    const line = new Line(url.href, protocols(), {
      event: (event) => {
        if (this.line === line) this.take(event);
      },
      picture: (bytes) => {
        if (this.line === line) this.handlers.picture(bytes);
      },
      broke: () => {
        if (this.line === line) this.enter("broken");
      },
      ended: (closed) => {
        if (this.line === line) this.ended(closed);
      },
    });
    this.line = line;
  }

  take(event) {
    if (event.type === "session.created") {
      this.isAgain = this.created !== null && this.created.session_id !== event.session_id;
      this.created = event;
      this.pause = FIRST_PAUSE_MS;
      this.enter("up");
    } else if (event.type === "session.resumed") {
      this.enter("up");
    } else if (event.type === "frame.accepted" || event.type === "frame.dropped") {
      this.unacknowledged -= 1;
    } else if (event.type === "error") {
      this.code = event.error.code;
    }
    this.handlers.event(event);
  }

  ended(closed) {
    this.line = null;
    const hadBegun = this.created !== null;
    // A camera of the server may have no session yet.
    const isAwaited = this.stream !== null && closed.code === 1013;
    if (isAwaited || hadBegun && (PASSING.has(closed.code) || GONE.has(this.code))) {
      this.enter("restarting");
      this.timer = setTimeout(() => this.connect("restarting"), this.pause);
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
      return;
    }
    this.created = null;
    this.enter("idle");
    this.handlers.ended(closed, hadBegun);
  }

  // The network is back: no reason to wait any longer.
  hurry() {
    if (this.state !== "restarting" || this.line !== null) return;
    clearTimeout(this.timer);
    this.connect("restarting");
  }

  // Returns the event_id, which an answer or an error repeats.
  send(type, fields = {}) {
    this.eventNumber += 1;
    const event_id = `page_${this.eventNumber}`;
    this.line?.send(JSON.stringify({ type, event_id, ...fields }), event_id);
    return event_id;
  }

  // Returns the number of the frame.
  sendFrame(jpeg, time_us) {
    this.frameNumber += 1;
    this.unacknowledged += 1;
    const message = new Uint8Array(HEADER_BYTES + jpeg.byteLength);
    const view = new DataView(message.buffer);
    view.setUint8(0, 1); // version
    view.setUint8(1, 1); // JPEG
    view.setUint32(8, this.frameNumber, true);
    view.setUint32(12, jpeg.byteLength, true);
    view.setBigUint64(16, BigInt(time_us), true);
    message.set(new Uint8Array(jpeg), HEADER_BYTES);
    this.line?.send(message, `frame ${this.frameNumber}`);
    return this.frameNumber;
  }
}
