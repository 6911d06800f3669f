// The demo street: pictures that the server renders in real time, of things the demo model knows.

import { request } from "./access.js";
import { $ } from "./dom.js";
import { Source } from "./source.js";
import { showStill, showWaiting } from "./stage.js";

const SEEDS = 1000; // another street each time
const FRESH_S = 8; // "when" is asked of things that came no longer ago: see docs/demo-model.md

export class Street extends Source {
  #things = new Map(); // name -> {colour, since: time in seconds}
  #subject = null;
  #suggested = "";
  #isClosed = false;

  // dialogue shows what can well be asked now.
  constructor(changed, dialogue, seed = Math.floor(Math.random() * SEEDS)) {
    super("street", `demo street ${seed}`, changed);
    Object.assign(this, { seed, dialogue });
  }

  async show() {
    this.began = performance.now();
    showWaiting(`Rendering ${this.name}.`);
  }

  // A session begins: the model's own examples are shown.
  begin() {
    this.#suggested = "";
  }

  get now_s() {
    return (performance.now() - this.began) / 1000;
  }

  // Puts what is to be seen at a moment on screen; returns it as a JPEG, or null if there is none.
  async picture(time_s) {
    let blob;
    try {
      const reply = await request(`demo/street.jpg?seed=${this.seed}&time_s=${time_s}`);
      blob = await reply.blob();
      const bitmap = await createImageBitmap(blob);
      if (this.#isClosed) return null; // something else is on screen by now
      this.#know(reply.headers.get("X-Edge-Vlm-Truth") ?? "", time_s);
      showStill(bitmap);
      bitmap.close();
    } catch (error) {
      if (this.#isClosed) return null;
      this.setTrouble(`No picture of the street: ${error.message}`);
      return null;
    }
    this.setTrouble(null);
    return blob;
  }

  close() {
    this.#isClosed = true;
    super.close();
    $("truth").hidden = true;
  }

  #know(truth, time_s) {
    const there = thingsOf(truth);
    for (const name of this.#things.keys()) if (!there.has(name)) this.#things.delete(name);
    for (const [name, colour] of there) {
      this.#things.set(name, { since: this.#things.get(name)?.since ?? time_s, colour });
    }
    $("truth-now").textContent = `Really there now: ${truth || "nothing"}`;
    const model = this.dialogue.session.created?.model;
    $("truth-memory").hidden = !model?.card?.is_toy;
    $("truth").hidden = false;
    if (!this.#things.has(this.#subject)) this.#subject = newest(this.#things);
    const { colour, since } = this.#things.get(this.#subject) ?? {};
    const isFresh = since > 0 && time_s - since <= FRESH_S; // what was there before has no time
    const questions = questionsAbout(this.#subject, colour, isFresh);
    if (questions.join() === this.#suggested) return; // a chip is not taken away under a finger
    this.#suggested = questions.join();
    this.dialogue.showExamples({ questions });
  }
}

// call() is called when somebody wants to see one.
export function onStreet(call) {
  for (const id of ["street", "hint-street"]) $(id).onclick = call;
}

// "red cat, blue dog" by name.
export function thingsOf(truth) {
  return new Map(truth.split(", ").filter(Boolean).map((words) => words.split(" ").reverse()));
}

function newest(things) {
  return [...things].sort(([, a], [, b]) => b.since - a.since)[0]?.[0] ?? null;
}

export function questionsAbout(name, colour, isFresh) {
  const general = ["What is there now?", "How many things are there now?"];
  if (name === null) return general;
  const about = [`What colour is the ${name}?`, `What is the ${colour} thing?`,
    `Where is the ${name} now?`];
  return [...general, ...about, ...(isFresh ? [`When did the ${name} appear?`] : [])];
}
