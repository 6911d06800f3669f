// How the model watches and answers. What is chosen here holds for every session of this browser,
// before its start and after it.

import { $ } from "../dom.js";
import { keep, recall } from "../store.js";

const FIELDS = {
  keep_ratio: { id: "keep", read: (text) => text / 100, write: (value) => Math.round(100 * value) },
  policy: { id: "policy", read: (text) => text, write: (value) => value },
  fps_cap: { id: "fps", read: Number, write: (value) => value },
  max_answer_tokens: { id: "length", read: Number, write: (value) => value },
  temperature: { id: "temperature", read: Number, write: (value) => value },
  instructions: { id: "instructions", read: (text) => text, write: (value) => value },
};
const BY_SCORE = ["stream", "frame_topk"];
const HOW_CHOSEN = {
  stream: "the most telling ones, and more of them when something happens",
  frame_topk: "the most telling ones, as many of each picture",
  random: "any, by chance (to compare with)",
  difference: "the ones whose pixels changed",
};
const SCORERS = { learned: "learned scorer", change: "scorer: change", none: "no scorer" };

// What decides instead of a share, where the server was told so.
function otherRule({ vision_tokens_per_s: rate, change_threshold: change }, policy) {
  if (policy === "keep_all") {
    return "Every part of every picture is read: nothing is missed, and nothing is saved.";
  }
  if (rate > 0) return `The server reads ${rate} parts a second of video, whatever the share.`;
  if (change > 0) return "The server reads every part that has changed enough, whatever the share.";
  return null;
}

// What a share of parts means, in plain words.
export function keepWords(ratio, policy, cells, inForce = {}) {
  const other = otherRule(inForce, policy);
  if (other !== null) return other;
  const few = Math.max(1, Math.round(ratio * cells));
  const cost = ratio <= 0.2 ? "Fast and light; small things may be missed."
    : ratio <= 0.6 ? "A good middle." : "Careful, and slower.";
  const which = HOW_CHOSEN[policy] ?? "those that were chosen";
  return `Of the ${cells} parts of a picture about ${few} ${few === 1 ? "is" : "are"} read: ` +
    `${which}. ${cost}`;
}

export class Settings {
  chosen = recall("settings", {}); // what somebody changed here
  #inForce = {};
  #model = null;
  #updates = new Map(); // event_id -> names of its fields

  // changed() is called when another rate is in force; notice(text) says what went wrong.
  constructor(session, changed, notice) {
    Object.assign(this, { session, changed, notice });
    for (const [name, field] of Object.entries(FIELDS)) {
      const element = $(field.id);
      element.onchange = () => this.#choose(name, field, element);
    }
    $("keep").oninput = () => this.#showWords();
    $("defaults").onclick = () => this.#reset();
  }

  get fps_cap() {
    return this.#inForce.fps_cap ?? 2;
  }

  // Before a session: what the server begins with.
  showDefaults({ settings, model }) {
    this.#model = model.limits;
    this.defaults = settings;
    this.#enter(settings);
  }

  // The session has begun. `delivery`: how pictures of its source are sent.
  begin(created, delivery, isOwn) {
    this.#model = created.model.limits;
    this.#updates.clear();
    $("settings-fields").disabled = !isOwn;
    $("keep").disabled = !isOwn;
    $("settings-whose").hidden = isOwn;
    if (isOwn) {
      this.defaults = created.settings;
      this.session.send("session.update", { session: { delivery } });
    }
    this.#enter(created.settings);
    if (isOwn) this.#apply(this.#usable());
    this.#showFacts(created);
  }

  // Nothing runs: everything may be chosen again.
  end() {
    $("settings-fields").disabled = false;
    $("settings-whose").hidden = true;
    this.#lock();
  }

  handlers = {
    "session.updated": (event) => {
      this.#updates.delete(event.event_id);
      this.#enter(event.settings);
      this.#showFacts(event);
    },
  };

  // Whether the error was about a setting: what was in force stays.
  takeError({ event_id }) {
    const names = this.#updates.get(event_id);
    if (!names) return false;
    this.#updates.delete(event_id);
    for (const name of names) delete this.chosen[name];
    keep("settings", this.chosen);
    this.#show(this.#inForce);
    return true;
  }

  // What was chosen for one model may be impossible with another.
  #usable() {
    const usable = { ...this.chosen };
    if (!this.#model.has_scorer && BY_SCORE.includes(usable.policy)) {
      delete usable.policy;
      this.notice("This model has no scorer: cells are not chosen by score here.");
    }
    const policy = usable.policy ?? this.#inForce.policy;
    if (policy === "keep_all" && !this.#model.has_scorer) delete usable.keep_ratio;
    return usable;
  }

  #choose(name, field, element) {
    if (!element.reportValidity()) return;
    const patch = { [name]: field.read(element.value) };
    if (patch.policy === "keep_all" && this.#model && !this.#model.has_scorer) {
      patch.keep_ratio = 1; // a smaller one would have no effect, and is refused
    }
    Object.assign(this.chosen, patch);
    keep("settings", this.chosen);
    this.#apply(patch);
  }

  #apply(patch) {
    const names = Object.keys(patch);
    this.#show({ ...this.#inForce, ...patch });
    if (names.length === 0 || !this.session.isOpen) return; // the next one begins with it
    this.#updates.set(this.session.send("session.update", { session: patch }), names);
  }

  #reset() {
    const patch = Object.fromEntries(Object.keys(this.chosen)
      .filter((name) => this.defaults && name in this.defaults)
      .map((name) => [name, this.defaults[name]]));
    this.chosen = {};
    keep("settings", {});
    this.#apply(patch);
  }

  #enter(settings) {
    const rate = this.#inForce.fps_cap;
    this.#inForce = settings;
    this.#show(settings);
    const canRead = this.#model.snapshot_tokens > 0;
    $("detail").disabled = !canRead;
    $("detail-note").textContent = canRead ? "looks at the newest picture alone, to read a label"
      : "this model reads video only";
    if (settings.fps_cap !== rate) this.changed();
  }

  #show(settings) {
    const shown = this.session.created === null ? { ...settings, ...this.chosen } : settings;
    for (const [name, { id, write }] of Object.entries(FIELDS)) {
      if (!(name in shown)) continue; // an older server
      $(id).value = write(shown[name]);
      if (name === "policy" && $(id).value === "") { // one that this page cannot choose
        $(id).add(new Option(shown.policy, shown.policy, false, true));
      }
    }
    this.#lock();
    this.#showWords();
  }

  #lock() {
    const hasScorer = this.#model?.has_scorer ?? true;
    for (const option of $("policy").options) {
      option.disabled = !hasScorer && BY_SCORE.includes(option.value);
    }
    const isShared = $("settings-fields").disabled;
    $("keep").disabled = isShared || otherRule(this.#inForce, $("policy").value) !== null;
  }

  #showWords() {
    const isAll = $("policy").value === "keep_all";
    $("keep-text").textContent = isAll ? "100 %" : `${$("keep").value} %`;
    const cells = this.#model?.num_cells ?? 81;
    $("keep-words").textContent = keepWords($("keep").value / 100, $("policy").value, cells,
      this.#inForce);
  }

  // What the model chooses by and how much it sees; beside it, what the server says of that.
  #showFacts({ settings, notes, video }) {
    const { scorer, trained_attention } = this.#model;
    const frames = video?.frames_that_fit; // an older server does not tell
    $("facts").textContent = [
      SCORERS[scorer] ?? scorer,
      `attention ${settings.attention} (trained: ${trained_attention})`,
      ...(frames === undefined ? [] : [`remembers up to ${frames} pictures`]),
      `answers up to ${settings.max_answer_tokens} tokens`,
      ...(notes ?? []),
    ].join(" · ");
  }
}
