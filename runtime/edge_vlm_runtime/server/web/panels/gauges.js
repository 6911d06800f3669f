// What the session measures: numbers, small charts, and how much was saved since the page opened.

import { $ } from "../dom.js";
import { Chart } from "./chart.js";

const ms = (value) => `${Math.round(value)} ms`;
const megabytes = (value) => value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GB`
  : `${Math.round(value / 2 ** 20)} MB`;
const watts = (value) => `${value.toFixed(1)} W`;
const number = (value) => value.toLocaleString("en");

const charts = {
  age: new Chart($("c-age"), ms),
  ttft: new Chart($("c-ttft"), ms),
  fps: new Chart($("c-fps"), (value) => `${value.toFixed(1)} fps`),
  rss: new Chart($("c-rss"), megabytes),
  power: new Chart($("c-power"), watts),
};
const before = { seen: 0, kept: 0 }; // of sessions that have ended
let current = { seen: 0, kept: 0 };
let base = current; // what the session had when this page came to it; null: not told yet

function showSaved() {
  const seen = before.seen + current.seen;
  const kept = before.kept + current.kept;
  if (seen === 0) return;
  const saved = seen - kept;
  $("saved").textContent = `${Math.round((100 * saved) / seen)} % saved so far: ` +
    `${number(saved)} of ${number(seen)} picture parts never had to be read`;
}

// A camera of the server has read pictures before: those are not counted here.
export function begin(isOwn) {
  sessionEnded();
  base = isOwn ? { seen: 0, kept: 0 } : null;
}

// The session has ended: its numbers are the last there are.
export function sessionEnded() {
  before.seen += current.seen;
  before.kept += current.kept;
  current = { seen: 0, kept: 0 };
}

// Another source: what was drawn is not about it.
export function forgetCharts() {
  for (const chart of Object.values(charts)) chart.clear();
}

export const handlers = {
  "frame.accepted"(event) {
    $("g-frame").textContent = `${event.frame_sequence} at ${event.time_s.toFixed(1)} s`;
    const share = Math.round((100 * event.cells_kept) / event.cells_seen);
    $("g-kept").textContent = `${event.cells_kept} of ${event.cells_seen} (${share} %)`;
    // Without reuse every part is looked at anew: nothing to tell.
    const anew = event.share_recomputed ?? 1;
    if (anew < 1) $("tile-recomputed").hidden = false;
    $("g-recomputed").textContent = `${Math.round(100 * anew)} %`;
    $("g-age").textContent = ms(event.age_ms);
    charts.age.add(event.age_ms);
  },
  "response.done"(event) {
    if (event.ttft_s === null) return;
    $("g-ttft").textContent = ms(event.ttft_s * 1000);
    charts.ttft.add(event.ttft_s * 1000);
  },
  "session.stats"(event) {
    $("g-fps").textContent = `${event.fps_processed.toFixed(1)} of ${event.fps_in.toFixed(1)} fps`;
    charts.fps.add(event.fps_processed);
    const dropped = Object.entries(event.frames_dropped);
    $("g-dropped").textContent = dropped.map(([why, n]) => `${n} ${why}`).join(", ") || "none";
    $("g-kv").max = event.kv_capacity_tokens;
    $("g-kv").value = event.kv_tokens;
    $("g-memory").textContent = `${event.frames_in_memory} frames, ` +
      `${event.kv_tokens} of ${event.kv_capacity_tokens} tokens`;
    base ??= { seen: event.cells_seen, kept: event.cells_kept };
    current = { seen: event.cells_seen - base.seen, kept: event.cells_kept - base.kept };
    showSaved();
    // Older servers and machines without a sensor tell neither: no chart is better than an empty one.
    for (const [id, value, words] of [
      ["rss", event.memory_bytes, megabytes], ["power", event.power_watts, watts],
    ]) {
      $(`tile-${id}`).hidden = typeof value !== "number";
      if (typeof value !== "number") continue;
      $(`g-${id}`).textContent = words(value);
      charts[id].add(value);
    }
  },
};
