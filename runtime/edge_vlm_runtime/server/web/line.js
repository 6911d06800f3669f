// A session's connection that comes back where it stopped when it breaks: docs/protocol.md, "When
// the connection breaks". What was sent is kept until an event shows that it arrived.

const BROKEN = new Set([1005, 1006, 1011]);
const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 3000;

export class Line {
  // handlers: event(event), picture(bytes), broke(), ended(closed)
  constructor(url, protocols, handlers) {
    this.url = url;
    this.protocols = protocols;
    this.handlers = handlers;
    this.created = null;
    this.isUp = false;
    this.isClosed = false;
    this.lastSequence = 0;
    this.numSent = 0;
    this.unconfirmed = []; // {number, key, data}
    this.deadline = 0;
    this.pause = FIRST_PAUSE_MS;
    this.why = null; // what closed the connection first
    this.open(false);
  }

  open(resuming) {
    const url = new URL(this.url);
    if (resuming) url.searchParams.set("resume", "1");
    const socket = new WebSocket(url.href, this.protocols);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      if (!resuming) return;
      const { session_id, resume_token } = this.created;
      socket.send(JSON.stringify({
        type: "session.resume", session_id, resume_token, last_sequence: this.lastSequence,
      }));
    };
    socket.onmessage = (message) => {
      if (this.socket !== socket) return;
      if (typeof message.data === "string") this.take(JSON.parse(message.data));
      else this.handlers.picture(message.data);
    };
    socket.onclose = (closed) => {
      if (this.socket === socket) this.closed(closed);
    };
  }

  get bufferedAmount() {
    return this.socket.bufferedAmount;
  }

  // key: the event_id of a message, `frame N` of a frame
  send(data, key) {
    if (this.isClosed) return;
    this.numSent += 1;
    this.unconfirmed.push({ number: this.numSent, key, data });
    if (this.isUp && this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  close() {
    this.isClosed = true;
    if (this.socket.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify({ type: "session.close" }));
    } else {
      this.socket.close();
    }
  }

  take(event) {
    if (event.type === "session.resumed") {
      this.resumed(event);
    } else {
      if (event.sequence !== 0 && event.sequence <= this.lastSequence) return;
      if (event.sequence !== 0) this.lastSequence = event.sequence;
      if (event.type === "session.created") {
        this.created = event;
        this.isUp = true;
      }
      this.confirm(event);
    }
    this.handlers.event(event);
  }

  confirm(event) {
    const isFrame = event.type === "frame.accepted" || event.type === "frame.dropped";
    const key = isFrame ? `frame ${event.frame_sequence}` : event.error?.event_id ?? event.event_id;
    const index = this.unconfirmed.findIndex((sent) => sent.key === key);
    if (index >= 0) this.unconfirmed.splice(0, index + 1);
  }

  resumed(event) {
    this.unconfirmed = this.unconfirmed.filter((sent) => sent.number > event.messages_received);
    for (const sent of this.unconfirmed) this.socket.send(sent.data);
    this.isUp = true;
    this.deadline = 0;
    this.pause = FIRST_PAUSE_MS;
    this.why = null;
  }

  closed(closed) {
    const now = performance.now();
    this.isUp = false;
    this.why ??= closed;
    // A subscription to a camera has no token: it is begun anew.
    const grace = this.created?.resume_token ? this.created.limits.resume_grace_s : 0;
    if (this.deadline === 0) this.deadline = now + 1000 * grace;
    if (this.isClosed || !BROKEN.has(closed.code) || now + this.pause > this.deadline) {
      this.isClosed = true;
      this.handlers.ended(closed.code === 1008 ? closed : this.why);
      return;
    }
    this.handlers.broke();
    setTimeout(() => {
      if (!this.isClosed) this.open(true);
    }, this.pause);
    this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
  }
}
