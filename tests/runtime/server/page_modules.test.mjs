// Modules of the page that need no browser: node --test tests/runtime/server/page_modules.test.mjs

import assert from "node:assert/strict";
import test from "node:test";

const WEB = new URL("../../../runtime/edge_vlm_runtime/server/web/", import.meta.url);
const load = (name) => import(new URL(name, WEB));

class FakeSocket {
  static OPEN = 1;
  static all = [];
  readyState = 1;
  sent = [];
  constructor(url) {
    this.url = url;
    FakeSocket.all.push(this);
  }
  send(data) { this.sent.push(data); }
  close() {}
  tell(event) { this.onmessage({ data: JSON.stringify(event) }); }
}
Object.assign(globalThis, {
  WebSocket: FakeSocket,
  addEventListener() {},
  document: { baseURI: "https://box.local/vlm/" },
  location: { protocol: "https:", hash: "" },
});

test("points are shown by their labels", async () => {
  const { withoutMarkup } = await load("markup.js");
  assert.equal(withoutMarkup('a <points coords="7.5 1 550 400">mushroom</points>.'), "a mushroom.");
  assert.equal(withoutMarkup('<tracks coords="0.0 1 100 200;1.0 1 300 400">red ball</tracks> and ' +
    '<points coords="1 3 500 250"> </points>'), "red ball and (here)");
  assert.equal(withoutMarkup("3 < 4 and <b>bold</b>"), "3 < 4 and <b>bold</b>");
  const whole = 'so: <points coords="1 3 500 250">cube</points>';
  for (let length = 4; length < whole.length; length += 1) { // while it is written
    const shown = withoutMarkup(whole.slice(0, length));
    assert.ok(!shown.includes("coords"), shown);
  }
});

test("what can well be asked about a street", async () => {
  const elements = { addEventListener() {}, textContent: "", parentElement: {}, getContext() {} };
  const { document: before } = globalThis;
  globalThis.document = { ...before, getElementById: () => elements, createElement: () => elements };
  globalThis.ResizeObserver = class { observe() {} };
  const { questionsAbout, thingsOf } = await load("street.js");
  assert.deepEqual([...thingsOf("red cat, blue dog")], [["cat", "red"], ["dog", "blue"]]);
  assert.deepEqual([...thingsOf("")], []);
  assert.equal(questionsAbout(null).length, 2);
  const asked = questionsAbout("cat", "red", false);
  assert.ok(asked.includes("What is the red thing?") && asked.includes("What colour is the cat?"));
  assert.ok(!asked.some((text) => text.startsWith("When")));
  assert.equal(questionsAbout("cat", "red", true).at(-1), "When did the cat appear?");
  globalThis.document = before;
});

test("what the slider says follows the number of parts", async () => {
  const { keepWords } = await load("panels/settings.js");
  assert.match(keepWords(0.5, "stream", 81), /^Of the 81 parts of a picture about 41 are read/);
  assert.match(keepWords(0.05, "random", 16), /about 1 is read: any, by chance.*small things/);
  assert.match(keepWords(0.2, "keep_all", 16), /Every part .* nothing is saved/);
  // Where something else decides, the slider does not claim to.
  assert.match(keepWords(0.2, "stream", 81, { vision_tokens_per_s: 40 }), /40 parts a second/);
  assert.match(keepWords(0.2, "stream", 81, { change_threshold: 0.4 }), /changed enough/);
});

function begun() {
  const states = [];
  const ends = [];
  const session = {};
  const created = (session_id, resume_token = "") => ({
    type: "session.created", session_id, resume_token, sequence: 1, limits: { resume_grace_s: 30 },
  });
  return { states, ends, session, created, handlers: {
    event() {}, picture() {}, state: (state) => states.push(state),
    ended: (closed) => ends.push(closed.code),
  } };
}

test("a session that the server has lost is begun anew", async (context) => {
  const { Session } = await load("session.js");
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const { states, ends, created, handlers } = begun();
  const session = new Session(handlers);
  session.open();
  const first = FakeSocket.all.at(-1);
  assert.equal(first.url, "wss://box.local/vlm/v1/realtime");
  first.tell(created("one", "token"));
  first.onclose({ code: 1001, reason: "the server is stopping" });
  context.mock.timers.tick(600);
  assert.notEqual(FakeSocket.all.at(-1), first);
  FakeSocket.all.at(-1).onclose({ code: 1006, reason: "" }); // still away
  context.mock.timers.tick(1100);
  const third = FakeSocket.all.at(-1);
  third.tell(created("two", "token"));
  assert.ok(session.isAgain);
  // Its connection breaks, and the server does not know it any more.
  third.onclose({ code: 1006, reason: "" });
  context.mock.timers.tick(300);
  const resuming = FakeSocket.all.at(-1);
  assert.equal(new URL(resuming.url).searchParams.get("resume"), "1");
  resuming.tell({ type: "error", sequence: 0, error: { code: "E-SESSION-GONE", message: "" } });
  resuming.onclose({ code: 1008, reason: "there is no such session" });
  context.mock.timers.tick(600);
  FakeSocket.all.at(-1).tell(created("three", "token"));
  assert.deepEqual(states, ["connecting", "up", "restarting", "up", "broken", "restarting", "up"]);
  assert.deepEqual(ends, []);
});

test("a refusal is final, a camera without session is waited for", async (context) => {
  const { Session } = await load("session.js");
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const { states, ends, created, handlers } = begun();
  const session = new Session(handlers);
  session.open();
  FakeSocket.all.at(-1).tell({
    type: "error", sequence: 0, error: { code: "E-UNAUTHORIZED", message: "no" },
  });
  FakeSocket.all.at(-1).onclose({ code: 1008, reason: "no" });
  assert.deepEqual([states.at(-1), ends], ["idle", [1008]]);

  session.open("front door");
  const query = new URL(FakeSocket.all.at(-1).url).searchParams;
  assert.deepEqual([query.get("stream"), query.get("subscribe_pictures")], ["front door", "true"]);
  FakeSocket.all.at(-1).onclose({ code: 1013, reason: "no session just now" });
  context.mock.timers.tick(600);
  FakeSocket.all.at(-1).tell(created("front door"));
  assert.ok(session.isUp && !session.isAgain);
  FakeSocket.all.at(-1).onclose({ code: 1006, reason: "" }); // a subscription is not resumed
  assert.equal(states.at(-1), "restarting");
  context.mock.timers.tick(600);
  assert.equal(new URL(FakeSocket.all.at(-1).url).searchParams.get("resume"), null);
  FakeSocket.all.at(-1).tell(created("front door"));
  assert.ok(!session.isAgain); // the camera's memory is that of before
});

function storage() {
  const kept = new Map();
  return { getItem: (name) => kept.get(name) ?? null, setItem: (name, text) => kept.set(name, text),
    removeItem: (name) => kept.delete(name) };
}

test("what was kept in another form does not stop the page", async () => {
  const { recall } = await load("store.js");
  globalThis.localStorage = storage();
  for (const text of ["null", "5", "{}", "[null, 1, {}, {\"question\": 2}]", "{"]) {
    localStorage.setItem("edge-vlm.alerts", text);
    assert.deepEqual(recall("alerts", []), [], text);
  }
  localStorage.setItem("edge-vlm.settings", "[]");
  assert.deepEqual(recall("settings", {}), {});
  localStorage.setItem("edge-vlm.settings", "null");
  assert.deepEqual(recall("settings", {}), {});
});

test("of two tabs each keeps its own conversation", async () => {
  const { keepOwn, recallOwn } = await load("store.js");
  globalThis.localStorage = storage();
  const [first, second] = [storage(), storage()];
  globalThis.sessionStorage = first;
  keepOwn("dialogue", [{ question: "one" }]);
  globalThis.sessionStorage = second;
  assert.deepEqual(recallOwn("dialogue", []), [{ question: "one" }]); // a new tab
  keepOwn("dialogue", [{ question: "two" }]);
  globalThis.sessionStorage = first;
  assert.deepEqual(recallOwn("dialogue", []), [{ question: "one" }]);
  globalThis.sessionStorage = { getItem() { throw new Error(); }, setItem() { throw new Error(); } };
  assert.equal(keepOwn("dialogue", []), true);
  assert.deepEqual(recallOwn("dialogue", [{ question: "?" }]), []);
});

test("pictures of a film carry its time in every browser", async (context) => {
  const film = {
    addEventListener() {}, getContext: () => ({ drawImage() {} }), readyState: 4,
    videoWidth: 64, videoHeight: 48, parentElement: {}, textContent: "", currentTime: 0,
    toBlob(done) { this.encoded = done({ arrayBuffer: async () => "jpeg" }); },
  };
  const { document: before } = globalThis;
  globalThis.document = { ...before, getElementById: () => film, createElement: () => film };
  globalThis.window = globalThis;
  globalThis.HTMLMediaElement = { HAVE_CURRENT_DATA: 2 };
  const { Capture } = await load("capture.js");
  context.after(() => {
    Object.assign(globalThis, { document: before, VideoFrame: undefined });
    delete globalThis.window;
  });
  const browsers = {
    "none": undefined,
    "ahead of a busy page": class { timestamp = film.currentTime * 1e6 + 4e5; close() {} },
    "whole seconds": class { timestamp = Math.trunc(film.currentTime); close() {} },
    "not of this film": class { constructor() { throw new Error("InvalidStateError"); } },
  };
  for (const [browser, shown] of Object.entries(browsers)) {
    globalThis.VideoFrame = shown;
    const sent = [];
    const session = {
      isUp: true, line: {}, bufferedAmount: 0, unacknowledged: 0,
      created: { limits: { max_unacknowledged_frames: 4 } },
      sendFrame: (jpeg, time_us) => sent.push(time_us),
    };
    const source = { kind: "file", fresh: { isFresh: true, take() {} }, lookForStall() {} };
    const capture = new Capture(session, source, { fps_cap: 2 }, () => {});
    for (film.currentTime = 0.05; film.currentTime < 3; film.currentTime += 0.5) {
      capture.retime();
      await film.encoded;
    }
    capture.stop();
    assert.deepEqual(sent, [0, 5e5, 1e6, 15e5, 2e6, 25e5], browser);
  }
});
