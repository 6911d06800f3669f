// Questions and answers. They are kept when the page is loaded again, and can be copied and saved.

import { $, clock, make } from "../dom.js";
import { withoutMarkup } from "../markup.js";
import { SentPictures, pointedPictures } from "../points.js";
import { keepOwn, recallOwn } from "../store.js";

const MAX_KEPT = 100; // entries
const WITH_PICTURES = 12; // of them, the last ones
const GENERAL_QUESTIONS = ["What is happening?", "What has changed?", "How many people are there?"];

const list = $("dialogue");

export class Dialogue {
  pictures = new SentPictures();
  #open = new Map(); // event_id or response_id -> entry
  #entries = []; // {question, answer, times, at, figures: [{picture, caption}]} or {note, at}
  #asked = -1; // arrow up: which earlier question is shown

  // notice(text) says what went wrong.
  constructor(session, notice) {
    Object.assign(this, { session, notice });
    for (const entry of recallOwn("dialogue", [])) this.#show(entry);
    $("ask").onsubmit = (event) => {
      event.preventDefault();
      const text = $("question").value.trim();
      if (text && this.#put(text)) $("question").value = "";
    };
    $("question").onkeydown = (event) => this.#recallQuestion(event);
    $("cancel").onclick = () => session.send("response.cancel");
    $("copy").onclick = () => this.#copy();
    $("export").onclick = () => this.#save();
    $("clear").onclick = () => this.#clear();
    this.showExamples(null);
    this.#showEmpty();
  }

  // Questions to begin with: what the model's card names, or such as any model is asked.
  showExamples(card) {
    $("chips").replaceChildren(...(card?.questions?.length ? card.questions : GENERAL_QUESTIONS)
      .map((text) => make("button", {
        type: "button", className: "chip", textContent: text, onclick: () => this.#put(text),
      })));
  }

  note(text) {
    const entry = { note: text, at: new Date().toISOString() };
    this.#show(entry);
    this.#keep();
  }

  // The connection has ended: nothing will come any more.
  endAll() {
    for (const entry of new Set(this.#open.values())) {
      this.#finish(entry, "no answer: the connection ended");
    }
  }

  handlers = {
    "response.created": (event) => {
      const entry = this.#open.get(event.event_id) ?? this.#elsewhere(event.text);
      this.#open.delete(event.event_id);
      this.#open.set(event.response_id, entry);
    },
    "response.output_text.delta": (event) => {
      const entry = this.#open.get(event.response_id);
      if (!entry) return;
      entry.raw += event.delta;
      entry.parts.answer.textContent = withoutMarkup(entry.raw);
      scrollDown();
    },
    "response.done": (event) => {
      const entry = this.#open.get(event.response_id);
      if (!entry) return;
      // The pieces that came had the model's times.
      entry.answer = withoutMarkup(event.text_in_stream_time ?? event.text) || "(nothing)";
      entry.parts.answer.textContent = entry.answer;
      this.#finish(entry, timesOf(event));
      pointedPictures(event.points ?? [], this.pictures).then((figures) => {
        entry.parts.item.append(...figures);
        entry.figures = figures.map((figure) => ({
          picture: figure.querySelector("canvas").toDataURL("image/jpeg", 0.8),
          caption: figure.querySelector("figcaption").textContent,
        }));
        if (figures.length > 0) this.#keep();
        scrollDown();
      });
    },
  };

  // Whether the error was about a question.
  takeError({ event_id, message }) {
    const entry = this.#open.get(event_id);
    if (entry) this.#finish(entry, `no answer: ${message}`);
    return entry !== undefined;
  }

  #put(text) {
    const detail = $("detail").checked && !$("detail").disabled ? "snapshot" : "video";
    this.notice("");
    if (!this.session.isOpen) {
      this.notice(this.session.state === "restarting" ? "The server is away: ask when it is back."
        : "Start the camera or choose a file first.");
      return false;
    }
    const event_id = this.session.send("response.create", { text, detail });
    const entry = { question: text, answer: "", times: "", at: new Date().toISOString(), raw: "" };
    this.#show(entry);
    entry.parts.answer.classList.add("open");
    this.#open.set(event_id, entry);
    this.#asked = -1;
    $("cancel").disabled = false;
    scrollDown();
    return true;
  }

  // Somebody else has asked the same session: another viewer of a camera, or a program.
  #elsewhere(question) {
    const at = new Date().toISOString();
    const entry = { question: `${question} (asked elsewhere)`, answer: "", times: "", at, raw: "" };
    this.#show(entry);
    return entry;
  }

  #finish(entry, times) {
    for (const [key, value] of this.#open) if (value === entry) this.#open.delete(key);
    entry.times = times;
    entry.parts.answer.classList.remove("open");
    entry.parts.times.textContent = times;
    $("cancel").disabled = this.#open.size === 0;
    this.#keep();
    scrollDown();
  }

  #show(entry) {
    this.#entries.push(entry);
    const when = make("time", { dateTime: entry.at, textContent: clock(new Date(entry.at)) });
    if (entry.note) {
      list.append(make("li", { className: "note" }, `${entry.note} `, when));
    } else {
      const parts = {};
      for (const name of ["question", "answer", "times"]) {
        parts[name] = make("div", { className: name, textContent: entry[name] });
      }
      parts.item = make("li", {}, when, ...Object.values(parts));
      for (const { picture, caption } of entry.figures ?? []) {
        parts.item.append(make("figure", {}, make("img", { src: picture, alt: "" }),
          make("figcaption", { textContent: caption })));
      }
      Object.defineProperty(entry, "parts", { value: parts }); // not kept
      list.append(parts.item);
    }
    this.#showEmpty();
    scrollDown();
  }

  #showEmpty() {
    const isEmpty = this.#entries.length === 0;
    $("empty").hidden = !isEmpty;
    for (const name of ["copy", "export", "clear"]) $(name).disabled = isEmpty;
  }

  #keep() {
    const kept = this.#entries.slice(-MAX_KEPT).map(({ raw, figures, ...entry }, number, all) =>
      all.length - number <= WITH_PICTURES && figures ? { ...entry, figures } : entry);
    if (keepOwn("dialogue", kept)) return;
    keepOwn("dialogue", kept.map(({ figures, ...entry }) => entry)); // there is little room
  }

  #clear() {
    const open = new Set(this.#open.values());
    for (const entry of this.#entries) {
      if (entry.parts && open.has(entry)) this.session.send("response.cancel");
    }
    this.#open.clear();
    $("cancel").disabled = true;
    this.#entries = [];
    list.replaceChildren();
    this.#keep();
    this.#showEmpty();
    $("question").focus();
  }

  #recallQuestion(event) {
    const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    const earlier = this.#entries.filter(({ question }) => question).map((entry) => entry.question);
    if (!step || earlier.length === 0) return;
    event.preventDefault();
    this.#asked = Math.max(-1, Math.min(earlier.length - 1, this.#asked + step));
    $("question").value = this.#asked < 0 ? "" : earlier.at(-1 - this.#asked);
  }

  get #markdown() {
    const told = this.#entries.map(({ note, question, answer, times, at }) => note
      ? `*${at} ${note}*`
      : `**${question}**  \n${answer || "(no answer)"}  \n*${at}${times ? `, ${times}` : ""}*`);
    return `# Conversation with edge-vlm\n\n${told.join("\n\n")}\n`;
  }

  async #copy() {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(this.#markdown);
    } catch {
      said = "The browser does not let this page copy: use Save";
    }
    $("copied").textContent = said;
    setTimeout(() => { $("copied").textContent = ""; }, 4000);
  }

  #save() {
    const url = URL.createObjectURL(new Blob([this.#markdown], { type: "text/markdown" }));
    const name = `edge-vlm-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.md`;
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

function timesOf(event) {
  const parts = [`seen until ${event.newest_frame.time_s.toFixed(1)} s`];
  if (event.ttft_s !== null) parts.unshift(`first token ${Math.round(event.ttft_s * 1000)} ms`);
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
  return parts.join(", ");
}

function scrollDown() {
  list.scrollTop = list.scrollHeight;
}
