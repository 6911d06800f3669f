// The browser page: camera or file in, kept cells over the picture, answers as they come.
// docs/protocol.md describes the messages. A server with an API key wants the page's address to end
// in #key=..., which the browser keeps to itself.

import { FreshPictures } from "./fresh.js";
import { Line } from "./line.js";
import { SentPictures, pointedPictures } from "./points.js";

const $ = (id) => document.getElementById(id);
const HEADER_BYTES = 24;
const MAX_SIDE = 1280; // larger pictures are scaled down before they are sent
const MAX_BUFFERED_BYTES = 1 << 20;
const JPEG_QUALITY = 0.92;
const STALLED_MS = 3000; // a camera that shows nothing new for this long is said to

const video = $("video");
const fresh = new FreshPictures(video);
const overlay = $("overlay");
const scratch = document.createElement("canvas");

const apiKey = new URLSearchParams(location.hash.slice(1)).get("key");
let line = null;
let created = null; // the session.created event
let source = null; // {kind: "camera" | "file", stream?, url?, trouble?: why nothing is sent}
let sequence = 0;
let unacknowledged = 0;
let timer = null;
let lastTick = -1; // file: the last due picture that was sent
let encoding = false;
let eventNumber = 0;
let heat = [];
let kept = null;
const pictures = new SentPictures();
const open = new Map(); // event_id or response_id -> {item, answer, times}

// ---- connection ---------------------------------------------------------------------------

function connect() {
  const url = new URL("v1/realtime", document.baseURI); // behind a proxy there may be a path
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.hash = url.search = "";
  created = null;
  sequence = 0;
  unacknowledged = 0;
  lastTick = -1;
  kept = null;
  heat = [];
  pictures.clear();
  status("connecting", "");
  const current = new Line(url.href, protocols(), {
    event(event) {
      if (line === current) take(event);
    },
    broke() {
      if (line === current) status("connection lost, trying again", "off");
    },
    ended(closed) {
      if (line !== current) return;
      line = null;
      stopTimer();
      status("not connected", "off");
      for (const entry of new Set(open.values())) finish(entry, "no answer: the connection ended");
      if (created === null && closed.code === 1006) explainRefusal();
      else if (closed.code !== 1000) notice(`The session ended (${closed.code}) ${closed.reason}`);
    },
  });
  line = current;
}

// The browser does not tell a page why a websocket was not opened.
async function explainRefusal() {
  const answers = await fetch("healthz").then((reply) => reply.ok, () => false);
  if (!answers) notice("The server does not answer.");
  else notice("The server answers, but takes no websocket from this page. Behind a proxy: it must " +
    "pass websockets on (Upgrade and Connection), and if it changes Host, start the server with " +
    `--allow-origin ${location.origin}`);
}

function protocols() {
  if (apiKey === null) return [];
  const text = btoa(apiKey).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["edge-vlm", `edge-vlm-key.${text}`];
}

function send(type, fields = {}) {
  eventNumber += 1;
  const event_id = `page_${eventNumber}`;
  line?.send(JSON.stringify({ type, event_id, ...fields }), event_id);
  return event_id;
}

function closeSession() {
  line?.close();
  line = null;
}

const SCORERS = { learned: "learned scorer", change: "scorer: change", none: "no scorer" };

/** What the model chooses by and how much it sees; beside it, what the server says of that. */
function showFacts({ settings, notes }) {
  const { limits } = created.model;
  const server = created.limits;
  const cache = Math.min(server.kv_capacity_tokens, limits.max_positions, limits.max_cache_tokens);
  const room = settings.attention === "frame" ? cache : Math.min(cache, limits.max_prefill_tokens);
  const frames = Math.floor(room / (limits.num_cells + 7));
  $("facts").textContent = [
    SCORERS[limits.scorer] ?? limits.scorer,
    `attention ${settings.attention} (trained: ${limits.trained_attention})`,
    `at most ${frames} whole frames`,
    `answers up to ${settings.max_answer_tokens} tokens`,
    ...(notes ?? []),
  ].join(" · ");
}

const handlers = {
  "session.created"(event) {
    created = event;
    $("model").textContent = event.model.bundle;
    $("keep").value = Math.round(event.settings.keep_ratio * 100);
    $("policy").value = event.settings.policy;
    showKeep();
    showFacts(event);
    const byScore = event.model.limits.has_scorer;
    for (const option of $("policy").options) {
      option.disabled = !byScore && ["stream", "frame_topk"].includes(option.value);
    }
    $("keep").disabled = !byScore && event.settings.policy === "keep_all";
    const canRead = event.model.limits.snapshot_tokens > 0;
    $("detail").disabled = !canRead;
    $("detail-label").title = canRead ? "Look at the newest picture alone, in full detail"
      : "This model reads video only";
    showConnected();
    send("session.update", { session: { delivery: source?.kind === "file" ? "wait" : "live" } });
    startTimer();
  },
  "session.updated"(event) {
    showFacts(event);
    $("keep").disabled = !created.model.limits.has_scorer && event.settings.policy === "keep_all";
  },
  "session.resumed"() {
    showConnected();
    resumeFile();
  },
  "frame.accepted"(event) {
    unacknowledged -= 1;
    kept = event;
    const now = new Set(event.kept_cells);
    heat = Array.from({ length: event.cells_seen }, (_, cell) =>
      0.8 * (heat[cell] ?? 0) + 0.2 * (now.has(cell) ? 1 : 0));
    $("g-frame").textContent = `${event.frame_sequence} at ${event.time_s.toFixed(1)} s`;
    const share = Math.round((100 * event.cells_kept) / event.cells_seen);
    $("g-kept").textContent = `${event.cells_kept} of ${event.cells_seen} (${share} %)`;
    $("g-age").textContent = `${Math.round(event.age_ms)} ms`;
    draw();
    resumeFile();
  },
  "frame.dropped"(event) {
    unacknowledged -= 1;
    if (event.message) notice(event.message);
    resumeFile();
  },
  "response.created"(event) {
    const entry = open.get(event.event_id);
    if (!entry) return;
    open.delete(event.event_id);
    open.set(event.response_id, entry);
    entry.responseId = event.response_id;
  },
  "response.output_text.delta"(event) {
    const entry = open.get(event.response_id);
    if (entry) entry.answer.textContent += event.delta;
    scrollDown();
  },
  "response.done"(event) {
    const entry = open.get(event.response_id);
    if (!entry) return;
    const parts = [`seen until ${event.newest_frame.time_s.toFixed(1)} s`];
    if (event.ttft_s !== null) {
      parts.unshift(`first token ${Math.round(event.ttft_s * 1000)} ms`);
      $("g-ttft").textContent = `${Math.round(event.ttft_s * 1000)} ms`;
    }
    if (event.status !== "completed") parts.unshift(event.status);
    if (event.finish_reason === "length") {
      parts.unshift(`cut at ${event.usage.output_tokens} tokens: the server's ` +
        "--max-answer-tokens allows more");
    }
    if (event.frames_shown && event.frames_shown < event.frames_accepted) {
      parts.push(`${event.frames_shown} of ${event.frames_accepted} frames looked at`);
    }
    if (event.snapshot) {
      const { frame_sequence, width, height, crops } = event.snapshot;
      const pieces = `${crops} ${crops === 1 ? "piece" : "pieces"}`;
      parts.push(`full detail of frame ${frame_sequence}: ${width}x${height} in ${pieces}`);
    }
    // The pieces that came had the model's times.
    entry.answer.textContent = event.text_in_stream_time ?? event.text;
    if (!event.text) entry.answer.textContent = "(nothing)";
    finish(entry, parts.join(", "));
    pointedPictures(event.points, pictures).then((figures) => {
      entry.item.append(...figures);
      scrollDown();
    });
  },
  "session.stats"(event) {
    $("g-fps").textContent = `${event.fps_processed.toFixed(1)} of ${event.fps_in.toFixed(1)} fps`;
    const dropped = Object.entries(event.frames_dropped);
    $("g-dropped").textContent = dropped.map(([why, n]) => `${n} ${why}`).join(", ") || "none";
    $("g-kv").max = event.kv_capacity_tokens;
    $("g-kv").value = event.kv_tokens;
    $("g-memory").textContent = `${event.frames_in_memory} frames, ` +
      `${event.kv_tokens} of ${event.kv_capacity_tokens} tokens`;
  },
  "session.go_away"() {
    notice("The server is stopping.");
  },
  error(event) {
    const entry = open.get(event.error.event_id);
    if (entry) finish(entry, `no answer: ${event.error.message}`);
    else notice(event.error.message);
  },
};

function take(event) {
  handlers[event.type]?.(event);
}

// ---- pictures in --------------------------------------------------------------------------

async function startCamera() {
  notice("");
  if (!navigator.mediaDevices?.getUserMedia) {
    notice("The browser gives the camera only to https pages and to localhost.");
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      video: { width: { ideal: 1280 }, height: { ideal: 720 } }, audio: false,
    });
    if (source?.kind === "camera" && line !== null) { // the session and what it has seen stay
      stopTracks();
    } else {
      stopSource();
    }
    const goesOn = source !== null;
    source = { kind: "camera", stream, trouble: null };
    notice("");
    watchCamera(source);
    video.srcObject = stream;
    await startVideo(goesOn);
  } catch (error) {
    notice(`No camera: ${error.message}`);
  }
}

// A camera may be unplugged, covered, taken by another program or forbidden at any moment; the
// element then shows its last picture for ever.
function watchCamera(camera) {
  const [track] = camera.stream.getVideoTracks();
  const gone = "The camera is gone: unplugged, or no longer allowed. Nothing is sent any more.";
  const muted = "The camera gives no pictures: covered, or used by another program. Nothing is sent.";
  track.onended = () => cameraTrouble(camera, gone);
  track.onmute = () => cameraTrouble(camera, muted);
  track.onunmute = () => cameraTrouble(camera, null);
  if (track.muted) cameraTrouble(camera, muted);
}

function cameraTrouble(camera, text, isStalled = false) {
  if (source !== camera || camera.trouble === text) return;
  Object.assign(camera, { trouble: text, isStalled });
  notice("");
  if (created && line?.isUp) showConnected();
}

function lookForStall() {
  const isStalled = fresh.age > STALLED_MS;
  if (isStalled && !source.trouble) {
    cameraTrouble(source, document.hidden
      ? "While this page was hidden it got no pictures from the browser. Nothing was sent."
      : "The camera gives no new pictures. Nothing is sent.", true);
  } else if (!isStalled && source.isStalled) {
    cameraTrouble(source, null);
  }
}

function showConnected() {
  if (source?.trouble) status("connected, no pictures", "off");
  else status("connected", "on");
}

async function startFile(file) {
  notice("");
  stopSource();
  source = { kind: "file", url: URL.createObjectURL(file) };
  video.src = source.url;
  try {
    await startVideo();
  } catch (error) {
    stopSource();
    notice(`The browser cannot play ${file.name}: ${error.message}`);
  }
}

async function startVideo(goesOn = false) {
  fresh.reset();
  await video.play();
  const aspect = video.videoWidth / video.videoHeight;
  $("stage").style.aspectRatio = aspect;
  $("stage").style.width = `min(100%, ${60 * aspect}vh)`;
  $("hint").hidden = true;
  $("stop").disabled = false;
  if (!goesOn) connect();
  else if (created && line?.isUp) showConnected();
}

function stopTracks() {
  source?.stream?.getTracks().forEach((track) => {
    track.onended = track.onmute = track.onunmute = null;
    track.stop();
  });
}

function stopSource() {
  stopTimer();
  closeSession();
  status("not connected", "");
  stopTracks();
  if (source?.url) URL.revokeObjectURL(source.url);
  source = null;
  notice("");
  video.srcObject = null;
  video.removeAttribute("src");
  video.load();
  kept = null;
  pictures.clear();
  draw();
  $("hint").hidden = false;
  $("stop").disabled = true;
}

function startTimer() {
  stopTimer();
  // Twice as often as pictures are due, so that a late tick costs half an interval at most.
  timer = setInterval(capture, 500 / created.settings.fps_cap);
  capture();
}

function stopTimer() {
  clearInterval(timer);
  timer = null;
}

function capture() {
  if (!source || !created || encoding || video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) {
    return;
  }
  if (!line.isUp) { // a camera's pictures of that time are lost, a file waits
    if (source.kind === "file") video.pause();
    return;
  }
  if (source.kind === "camera") lookForStall();
  if (source.trouble) return;
  if (!fresh.isFresh) return; // what is on screen was sent: a held or a frozen picture
  if (line.bufferedAmount > MAX_BUFFERED_BYTES) return; // the network is the bottleneck
  const fps = created.settings.fps_cap;
  let now_s = performance.now() / 1000;
  if (source.kind === "file") {
    if (unacknowledged >= created.limits.max_unacknowledged_frames) {
      video.pause(); // a file waits for the model instead of losing pictures
      return;
    }
    now_s = video.currentTime;
  }
  const tick = Math.floor(now_s * fps + 1e-3);
  if (tick <= lastTick) return;
  lastTick = tick;
  fresh.take();
  const time_us = Math.round((tick / fps) * 1e6); // when it was due: what is on screen then
  const scale = Math.min(1, MAX_SIDE / Math.max(video.videoWidth, video.videoHeight));
  scratch.width = Math.round(video.videoWidth * scale);
  scratch.height = Math.round(video.videoHeight * scale);
  scratch.getContext("2d").drawImage(video, 0, 0, scratch.width, scratch.height);
  encoding = true;
  const current = line;
  scratch.toBlob(async (blob) => {
    try {
      if (blob) sendFrame(current, blob, await blob.arrayBuffer(), time_us);
    } finally {
      encoding = false;
    }
  }, "image/jpeg", JPEG_QUALITY);
}

function sendFrame(current, blob, jpeg, time_us) {
  if (line !== current) return;
  sequence += 1;
  pictures.add(sequence, blob);
  unacknowledged += 1;
  const message = new Uint8Array(HEADER_BYTES + jpeg.byteLength);
  const view = new DataView(message.buffer);
  view.setUint8(0, 1); // version
  view.setUint8(1, 1); // JPEG
  view.setUint32(8, sequence, true);
  view.setUint32(12, jpeg.byteLength, true);
  view.setBigUint64(16, BigInt(time_us), true);
  message.set(new Uint8Array(jpeg), HEADER_BYTES);
  current.send(message, `frame ${sequence}`);
}

function resumeFile() {
  if (source?.kind === "file" && video.paused && !video.ended && !document.hidden) video.play();
}

// ---- the picture --------------------------------------------------------------------------

function draw() {
  const context = overlay.getContext("2d");
  const box = overlay.getBoundingClientRect();
  overlay.width = box.width * devicePixelRatio;
  overlay.height = box.height * devicePixelRatio;
  if ($("heat").checked && kept) drawCells(context);
}

function drawCells(context) {
  const grid = created.model.limits.cell_grid;
  const [width, height] = [overlay.width / grid, overlay.height / grid];
  const now = new Set(kept.kept_cells);
  for (let cell = 0; cell < grid * grid; cell += 1) {
    const [x, y] = [(cell % grid) * width, Math.floor(cell / grid) * height];
    if (now.has(cell)) {
      context.fillStyle = `rgba(245, 158, 11, ${0.35 * heat[cell]})`;
      context.fillRect(x, y, width, height);
      context.strokeStyle = "rgba(245, 158, 11, 0.9)";
      context.lineWidth = 1.5 * devicePixelRatio;
      context.strokeRect(x + 1, y + 1, width - 2, height - 2);
    } else {
      context.fillStyle = "rgba(8, 12, 18, 0.6)";
      context.fillRect(x, y, width, height);
    }
  }
}

// ---- the conversation ---------------------------------------------------------------------

function ask(text) {
  notice("");
  if (!created || line === null) {
    notice("Start the camera or choose a file first.");
    return false;
  }
  const item = document.createElement("li");
  const entry = { item };
  for (const name of ["question", "answer", "times"]) {
    entry[name] = document.createElement("div");
    entry[name].className = name;
    item.append(entry[name]);
  }
  entry.question.textContent = text;
  entry.answer.classList.add("open");
  $("dialogue").append(item);
  const detail = $("detail").checked && !$("detail").disabled ? "snapshot" : "video";
  open.set(send("response.create", { text, detail }), entry);
  $("cancel").disabled = false;
  scrollDown();
  return true;
}

function finish(entry, times) {
  for (const [key, value] of open) if (value === entry) open.delete(key);
  entry.answer.classList.remove("open");
  entry.times.textContent = times;
  $("cancel").disabled = open.size === 0;
  scrollDown();
}

function scrollDown() {
  $("dialogue").scrollTop = $("dialogue").scrollHeight;
}

function status(text, kind) {
  $("status").textContent = text;
  $("status").className = `pill ${kind}`;
}

// What is wrong with the camera stands there for as long as it is.
function notice(text) {
  $("notice").textContent = text || source?.trouble || "";
  $("again").hidden = !source?.trouble;
}

function showKeep() {
  $("keep-text").textContent = `${$("keep").value} %`;
}

// ---- controls -----------------------------------------------------------------------------

$("camera").onclick = startCamera;
$("again").onclick = startCamera;
$("stop").onclick = stopSource;
$("file").onchange = (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) startFile(file);
};
$("heat").onchange = draw;
$("keep").oninput = showKeep;
$("keep").onchange = () =>
  send("session.update", { session: { keep_ratio: $("keep").value / 100 } });
$("policy").onchange = () => {
  const session = { policy: $("policy").value };
  if (session.policy === "keep_all" && !created?.model.limits.has_scorer) {
    session.keep_ratio = 1; // a smaller one would have no effect, and is refused
    $("keep").value = 100;
    showKeep();
  }
  send("session.update", { session });
};
$("cancel").onclick = () => send("response.cancel");
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (text && ask(text)) $("question").value = "";
};
video.onseeked = () => {
  // Time went back: that is another stream, so another session.
  if (source?.kind === "file" && created && video.currentTime * created.settings.fps_cap < lastTick) {
    closeSession();
    connect();
  }
};
document.onvisibilitychange = () => { // a hidden page is shown no pictures: a file waits
  if (!document.hidden) resumeFile();
  else if (source?.kind === "file") video.pause();
};
new ResizeObserver(draw).observe(overlay);
