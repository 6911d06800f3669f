// Alerts: yes/no questions that are asked of every picture. Those set here are kept by the browser
// and watched for in each session of its own; a camera of the server has its own.

import { json } from "../access.js";
import { $, make } from "../dom.js";
import { keep, recall } from "../store.js";
import { AlertHistory } from "./alert_history.js";

const POLL_MS = 2000;
const STATES = {
  idle: "watching", holding: "about to begin", active: "happening now",
  waiting: "not watched: nothing runs", arming: "being set", refused: "not watched by this server",
};
const RULE = ["on_threshold", "off_threshold", "hold_s", "cooldown_s"];

// What was set in any tab, but for this one.
const kept = (rule) => recall("alerts", []).filter(({ question }) => question !== rule.question);

export class Alerts {
  #rules = recall("alerts", []); // {question, on_threshold, ...}: of this browser
  #statuses = new Map(); // alert_id -> AlertStatus
  #wanted = new Map(); // event_id -> the rule that was sent
  #rows = new Map(); // question or alert_id -> elements
  #refused = new Set(); // questions that this server does not take; another one may
  #isOwn = true;

  constructor(session) {
    this.session = session;
    this.history = new AlertHistory();
    $("alert-form").onsubmit = (event) => {
      event.preventDefault();
      this.#create();
    };
    setInterval(() => {
      if (this.#statuses.size > 0 && session.isUp) session.send("alert.list");
    }, POLL_MS);
    this.showExamples(null);
    this.#render();
  }

  showExamples(card) {
    const examples = card?.alerts?.length ? card.alerts : ["Is there a person now?"];
    $("alert-question").placeholder = examples[0];
    $("alert-chips").replaceChildren(...examples.map((text) => make("button", {
      type: "button", className: "chip", textContent: text,
      onclick: () => { $("alert-question").value = text; $("alert-question").focus(); },
    })));
  }

  begin(isOwn) {
    this.#isOwn = isOwn;
    this.#statuses.clear();
    this.#wanted.clear();
    this.#refused.clear();
    if (isOwn) {
      for (const rule of this.#rules) this.#send(rule, true);
    } else {
      this.session.send("alert.list");
      this.#readHistory(this.session.stream);
    }
    this.#render();
  }

  // What a camera's alerts have found before somebody looked.
  async #readHistory(stream) {
    const path = `v1/streams/${encodeURIComponent(stream)}/events`;
    const { events } = await json(path).catch(() => ({ events: [] })); // an alert will tell itself
    if (this.session.stream !== stream) return;
    for (const event of events) {
      if (event.type === "alert.triggered") this.history.found(event);
      else this.history.ended(event);
    }
  }

  end() {
    this.#isOwn = true;
    this.#statuses.clear();
    this.#wanted.clear();
    this.history.endAll();
    this.#render();
  }

  handlers = {
    "alert.created": (event) => {
      this.#wanted.delete(event.event_id);
      this.#take(event.alert);
    },
    "alert.listed": (event) => {
      this.#statuses.clear();
      for (const status of event.alerts) this.#take(status);
      this.#render();
    },
    "alert.deleted": (event) => {
      this.#statuses.delete(event.alert_id);
      this.#render();
    },
    "alert.triggered": (event) => {
      const status = this.#statuses.get(event.alert_id);
      if (status) Object.assign(status, { state: "active", probability: event.probability });
      this.history.began(event);
      this.#render();
    },
    "alert.cleared": (event) => {
      const status = this.#statuses.get(event.alert_id);
      if (status) Object.assign(status, { state: "idle", probability: event.probability });
      this.history.ended(event);
      this.#render();
    },
  };

  // Whether the error was about an alert.
  takeError({ event_id, message }) {
    const { rule, isKept } = this.#wanted.get(event_id) ?? {};
    if (!rule) return false;
    this.#wanted.delete(event_id);
    if (isKept) this.#refused.add(rule.question);
    else this.#forget(rule);
    this.#say(`${rule.question}: ${message}`);
    this.#render();
    return true;
  }

  #say(text) {
    $("alert-trouble").textContent = text;
  }

  #create() {
    const question = $("alert-question").value.trim();
    this.#say("");
    if (!question) return;
    const rule = { question };
    for (const name of RULE) rule[name] = Number($(`alert-${name}`).value);
    if (rule.off_threshold > rule.on_threshold) {
      this.#say("It cannot end above the certainty it begins at.");
      return;
    }
    if (!this.#isOwn && !this.session.isOpen) {
      this.#say("The server is away: set it when it is back.");
      return;
    }
    if (this.#isOwn) {
      if (this.#rules.some((each) => each.question === question)) {
        this.#say("That is watched for already. Remove it first to change it.");
        return;
      }
      this.#rules.push(rule);
      keep("alerts", [...kept(rule), rule]);
    }
    if (this.session.isOpen) this.#send(rule);
    $("alert-question").value = "";
    this.#render();
  }

  // isKept: since an earlier session
  #send(rule, isKept = false) {
    this.#wanted.set(this.session.send("alert.create", rule), { rule, isKept });
  }

  #take(status) {
    this.#statuses.set(status.alert_id, status);
    this.#render();
  }

  #forget(rule) {
    this.#rules = this.#rules.filter((each) => each.question !== rule.question);
    keep("alerts", kept(rule));
  }

  #remove(entry) {
    this.#say("");
    if (entry.alert_id && this.session.isOpen) this.session.send("alert.delete", { alert_id: entry.alert_id });
    if (this.#isOwn) this.#forget(entry);
    this.#render();
  }

  // What there is to show: of a session those it has, before it those that will be watched for.
  get #entries() {
    const statuses = [...this.#statuses.values()].map((status) => ({
      ...status, question: status.rule.question, key: status.alert_id,
    }));
    if (!this.#isOwn) return statuses;
    const known = new Set(statuses.map(({ question }) => question));
    const state = this.session.isUp ? "arming" : "waiting";
    const waiting = this.#rules.filter(({ question }) => !known.has(question)).map(({ question }) => ({
      question, key: question, probability: null,
      state: this.session.isUp && this.#refused.has(question) ? "refused" : state,
    }));
    return [...statuses, ...waiting];
  }

  #render() {
    const entries = this.#entries;
    const keys = new Set(entries.map(({ key }) => key));
    for (const [key, row] of this.#rows) {
      if (keys.has(key)) continue;
      row.item.remove();
      this.#rows.delete(key);
    }
    for (const entry of entries) {
      if (!this.#rows.has(entry.key)) this.#rows.set(entry.key, this.#row());
      this.#fill(this.#rows.get(entry.key), entry);
    }
    $("alerts-empty").hidden = entries.length > 0;
    const active = entries.filter(({ state }) => state === "active").length;
    $("alert-count").textContent = active || "";
    $("alert-count").hidden = active === 0;
    document.title = active ? `(${active}) edge-vlm` : "edge-vlm";
  }

  #row() {
    const row = {
      name: make("strong"), question: make("span"), state: make("span", { className: "state" }),
      meter: make("meter", { min: 0, max: 1 }), share: make("span", { className: "share" }),
      remove: make("button", { type: "button", className: "quiet", textContent: "Remove" }),
    };
    row.item = make("li", {}, make("div", { className: "what" }, row.name, row.question),
      row.remove, row.state, row.meter, row.share);
    $("alert-list").append(row.item);
    return row;
  }

  #fill(row, entry) {
    row.name.textContent = entry.name ? `${entry.name}: ` : "";
    row.question.textContent = entry.question;
    row.state.textContent = STATES[entry.state] ?? entry.state;
    row.item.dataset.state = entry.state;
    const isKnown = typeof entry.probability === "number";
    row.meter.hidden = !isKnown;
    row.meter.value = isKnown ? entry.probability : 0;
    row.meter.ariaLabel = `How sure of yes: ${entry.question}`;
    const unsure = isKnown && entry.answer_mass !== null && entry.answer_mass < 0.5;
    row.share.textContent = !isKnown ? "" : `${Math.round(100 * entry.probability)} % yes` +
      (unsure ? ", but the model would not answer this by yes or no" : "");
    row.remove.ariaLabel = `Remove: ${entry.question}`;
    row.remove.onclick = () => this.#remove(entry);
  }
}
