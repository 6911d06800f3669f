// What alerts have found: when, for how long, with a picture, and a sound if one is wanted.

import { $, clock, make } from "../dom.js";
import { keepOwn, recallOwn } from "../store.js";

const MAX_KEPT = 40;
const PICTURE_WIDTH = 200;
const SAME_MS = 3000; // two that began so close to each other are one

const keyOf = ({ alert_id, episode }) => `${alert_id} ${episode}`;

export class AlertHistory {
  #entries = recallOwn("alert-history", []); // {question, camera, at, probability, lasted_s, picture}
  #open = new Map(); // alert_id and episode -> entry
  #audio = null;

  constructor() {
    for (const entry of this.#entries) {
      if (typeof entry.lasted_s !== "number") entry.lasted_s = -1; // nobody looked when it ended
      this.#show(entry);
    }
    $("history-empty").hidden = this.#entries.length > 0;
    $("clear-history").onclick = () => {
      this.#entries = [];
      this.#open.clear();
      this.#keep();
      $("history").replaceChildren();
      $("history-empty").hidden = false;
    };
    $("sound").onclick = () => this.#toggleSound();
  }

  // An alert.triggered.
  async began(event) {
    if (this.#open.has(keyOf(event))) return;
    const entry = this.#add(event, new Date());
    this.#beep();
    if (event.evidence) {
      entry.picture = await small(event.evidence.jpeg).catch(() => null);
      this.#fill(entry);
    }
    this.#keep();
  }

  // The same from a camera's list of what happened, `ago_s` before now; known perhaps.
  found(event) {
    if (this.#open.has(keyOf(event))) return;
    const at = new Date(Date.now() - 1000 * event.ago_s);
    const known = this.#entries.find((entry) => entry.question === event.question &&
      entry.camera === (event.camera ?? "") && Math.abs(new Date(entry.at) - at) < SAME_MS);
    if (known) {
      known.lasted_s = null;
      this.#open.set(keyOf(event), known);
      this.#fill(known);
    } else {
      this.#add(event, at);
    }
    this.#keep();
  }

  #add(event, at) {
    const entry = {
      question: event.question, name: event.alert_name ?? "", camera: event.camera ?? "",
      at: at.toISOString(), probability: event.probability, lasted_s: null, picture: null,
    };
    this.#open.set(keyOf(event), entry);
    this.#entries.push(entry);
    while (this.#entries.length > MAX_KEPT) this.#entries.shift().item.remove();
    this.#show(entry);
    return entry;
  }

  ended(event) {
    const key = keyOf(event);
    const entry = this.#open.get(key);
    if (!entry) return;
    this.#open.delete(key);
    entry.lasted_s = event.lasted_s;
    this.#fill(entry);
    this.#keep();
  }

  // Nothing more will be told of those that are still on.
  endAll() {
    for (const entry of this.#open.values()) {
      entry.lasted_s = -1;
      this.#fill(entry);
    }
    this.#open.clear();
    this.#keep();
  }

  #show(entry) {
    const item = make("li");
    Object.defineProperty(entry, "item", { value: item }); // not kept
    this.#fill(entry);
    $("history").prepend(item);
    $("history-empty").hidden = true;
  }

  #fill(entry) {
    const { lasted_s } = entry;
    const at = new Date(entry.at);
    const how = lasted_s === null ? "still on" : lasted_s < 0 ? "its end was not seen"
      : `lasted ${lasted_s.toFixed(1)} s`;
    const whose = [entry.camera, entry.name].filter(Boolean).join(", ");
    entry.item.classList.toggle("on", lasted_s === null);
    entry.item.replaceChildren(
      ...(entry.picture ? [make("img", { src: entry.picture, alt: "" })] : []),
      make("div", {}, make("strong", { textContent: entry.question }),
        make("div", { className: "dim", textContent: [
          ...(whose ? [whose] : []), `${at.toLocaleDateString()} ${clock(at)}`,
          `${Math.round(100 * entry.probability)} % sure`, how,
        ].join(" · ") })));
  }

  #keep() {
    if (keepOwn("alert-history", this.#entries)) return;
    keepOwn("alert-history", this.#entries.map((entry) => ({ ...entry, picture: null })));
  }

  #toggleSound() {
    const isOn = $("sound").getAttribute("aria-pressed") !== "true";
    $("sound").setAttribute("aria-pressed", isOn);
    $("sound").textContent = isOn ? "Sound is on" : "Sound is off";
    // A browser lets a page make sounds only once somebody has pressed something on it.
    if (isOn) this.#audio ??= new AudioContext();
    this.#beep();
  }

  #beep() {
    if ($("sound").getAttribute("aria-pressed") !== "true" || this.#audio === null) return;
    const begin = this.#audio.currentTime;
    const volume = new GainNode(this.#audio, { gain: 0 });
    volume.connect(this.#audio.destination);
    for (const [at, frequency] of [[0, 660], [0.18, 880]]) {
      const tone = new OscillatorNode(this.#audio, { frequency });
      tone.connect(volume);
      tone.start(begin + at);
      tone.stop(begin + at + 0.16);
    }
    volume.gain.setValueAtTime(0.2, begin);
    volume.gain.linearRampToValueAtTime(0, begin + 0.36);
  }
}

// The evidence as a data URI that is small enough to be kept.
async function small(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
  const canvas = document.createElement("canvas");
  canvas.width = PICTURE_WIDTH;
  canvas.height = Math.max(1, Math.round((PICTURE_WIDTH * bitmap.height) / bitmap.width));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.75);
}
