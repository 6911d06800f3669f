// The browser page: pictures in, answers, alerts and what the model looked at out. This module puts
// the others together; docs/page.md says what can be done, docs/protocol.md what is sent.

import { Capture } from "./capture.js";
import { $ } from "./dom.js";
import { askForKey, lookAround, showModel, whyRefused } from "./panels/about.js";
import { Alerts } from "./panels/alerts.js";
import { Cameras } from "./panels/cameras.js";
import { Dialogue } from "./panels/dialogue.js";
import * as gauges from "./panels/gauges.js";
import { Settings } from "./panels/settings.js";
import { showStatus } from "./panels/status.js";
import "./panels/tabs.js";
import { Session } from "./session.js";
import { Source, listDevices, takeDrops } from "./source.js";
import { forget, showCells, showStill } from "./stage.js";
import { Street, onStreet } from "./street.js";
import { subscribedPicture } from "./subscribed.js";

const video = $("video");
let source = null;
let capture = null;
let starts = 0; // so that of two sources chosen at once the later one wins

const session = new Session({
  event: take,
  picture: takePicture,
  state: showState,
  ended,
});
const settings = new Settings(session, () => capture?.retime(), notice);
const alerts = new Alerts(session);
const dialogue = new Dialogue(session, notice);
const cameras = new Cameras((name) => start(() => new Source("stream", name)), refused);

// ---- the session --------------------------------------------------------------------------

const own = {
  "session.created"(event) {
    if (session.isAgain) {
      notice("");
      dialogue.note("Restarted: this is a new session and its memory is empty.");
    }
    dialogue.pictures.clear();
    const isOwn = source.kind !== "stream";
    showModel(event.model, dialogue, alerts);
    settings.begin(event, source.isLive ? "live" : "wait", isOwn);
    alerts.begin(isOwn);
    gauges.begin(isOwn);
    if (event.stream) own["stream.updated"](event);
    capture?.start();
  },
  "session.resumed"() {
    source.resume();
  },
  "frame.accepted"(event) {
    showCells(event, session.created.model.limits.cell_grid);
    source.resume();
  },
  "frame.dropped"(event) {
    if (event.message) notice(event.message);
    source.resume();
  },
  "stream.updated"({ stream }) {
    source.trouble = stream.state === "live" ? null
      : stream.detail ?? (stream.state === "ended" ? "This film is over. It can still be asked about."
        : "The camera gives no pictures.");
    troubleChanged();
  },
  "session.go_away"() {
    notice("The server is stopping.");
  },
  error({ error }) {
    const isTaken = alerts.takeError(error) || dialogue.takeError(error);
    if (isTaken) return;
    settings.takeError(error);
    notice(error.message);
  },
};
const parts = [own, dialogue.handlers, alerts.handlers, settings.handlers, gauges.handlers];

function take(event) {
  for (const handlers of parts) handlers[event.type]?.(event);
}

async function takePicture(bytes) {
  const watched = source;
  const picture = await subscribedPicture(bytes);
  if (picture === null || source !== watched) return;
  dialogue.pictures.add(picture.sequence, picture.blob);
  showStill(picture.bitmap);
  picture.bitmap.close();
}

function showState(state) {
  showStatus(state, source?.trouble);
  if (state !== "up") forget(); // what it looked at was of another picture
  if (state === "restarting") dialogue.endAll();
}

function ended(closed, hadBegun) {
  capture?.stop();
  dialogue.endAll();
  gauges.sessionEnded();
  alerts.end();
  settings.end();
  if (session.code === "E-UNAUTHORIZED") {
    notice(closed.reason);
    refused(new Error(closed.reason));
  } else if (!hadBegun && closed.code === 1006) {
    whyRefused().then(notice);
  } else if (closed.code !== 1000) {
    notice(`The session ended (${closed.code}) ${closed.reason}`);
  }
}

// ---- what is watched ----------------------------------------------------------------------

// open() returns a Source, or raises an Error whose message says why there is none.
async function start(open) {
  starts += 1;
  const mine = starts;
  notice("");
  let next;
  try {
    next = await open();
    if (mine !== starts) {
      next.close();
      return;
    }
    // Another camera of this device: the session and what it has seen stay.
    const goesOn = source?.kind === "camera" && next.kind === "camera" && session.created !== null;
    if (goesOn) source.stopTracks();
    else stop();
    source = next;
    if (goesOn) capture.source = next;
    else gauges.forgetCharts();
    $("stop").disabled = false;
    await source.show();
    if (mine !== starts) return;
    if (goesOn) troubleChanged();
    else begin();
  } catch (error) {
    if (mine !== starts) return;
    if (source !== null && source === next) stop();
    notice(error.message);
  }
}

function begin() {
  const isStream = source.kind === "stream";
  capture = isStream ? null : new Capture(session, source, settings, (number, blob) =>
    dialogue.pictures.add(number, blob));
  cameras.mark(isStream ? source.name : null);
  session.open(isStream ? source.name : null);
}

function leave() {
  capture?.stop();
  capture = null;
  if (session.created !== null) {
    dialogue.endAll();
    gauges.sessionEnded();
  }
  session.close();
  alerts.end();
  settings.end();
}

function stop() {
  leave();
  cameras.mark(null);
  source?.close();
  source = null;
  dialogue.pictures.clear();
  notice("");
  $("stop").disabled = true;
}

function troubleChanged() {
  notice("");
  showState(session.state);
}

async function startCamera(deviceId) {
  await start(() => Source.camera(deviceId, troubleChanged));
  if (source?.kind === "camera") await listDevices($("device"), source.deviceId);
}

async function startFile(file, number = 1) {
  const isPicture = file.type.startsWith("image/") && file.type !== "image/svg+xml";
  await start(async () => isPicture ? Source.picture(file) : Source.file(file));
  if (number > 1 && source?.name === file.name) notice(`One at a time: this is ${file.name}.`);
}

function refused(error) {
  askForKey(error.message, () => {
    notice("");
    look();
  });
}

// What there is before anything runs.
async function look() {
  try {
    const facts = await lookAround();
    if (facts !== null && session.created === null) {
      showModel(facts.model, dialogue, alerts);
      settings.showDefaults(facts);
    }
    cameras.look();
  } catch (error) {
    if (error.status === 401) refused(error);
    else notice(`The page cannot look: ${error.message}.`);
  }
}

// What is wrong with the camera stands there for as long as it is.
function notice(text) {
  $("notice").textContent = text || source?.trouble || "";
  $("again").hidden = !(source?.trouble && source.kind === "camera");
}

// ---- controls -----------------------------------------------------------------------------

$("camera").onclick = () => startCamera($("device").value);
$("again").onclick = () => startCamera($("device").value);
$("device").onchange = () => startCamera($("device").value);
$("stop").onclick = () => { starts += 1; stop(); };
const startDemo = () => start(() => Source.address("demo/clip.mp4", "the demo clip"));
for (const id of ["demo", "hint-demo"]) $(id).onclick = startDemo;
onStreet(() => start(() => new Street(troubleChanged, dialogue)));
$("file").onchange = (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) startFile(file);
};
takeDrops(startFile, () => notice("Drop a file of this device: a video or a picture."));
video.onseeked = () => {
  if (session.created === null || !capture?.wentBack) return;
  leave(); // another stream: another session
  begin();
};
document.addEventListener("visibilitychange", () => { // a hidden page is shown no pictures
  if (!document.hidden) source?.resume();
  else if (source?.kind === "file") video.pause(); // a file waits
});

look();
