// The server's own cameras: GET v1/streams, as often as somebody may look at the list.

import { json, request } from "../access.js";
import { $, make } from "../dom.js";

const POLL_MS = 4000;
const STATES = { live: "live", waiting: "waiting", ended: "ended" };

export class Cameras {
  #cards = new Map(); // name -> elements
  #timer = null;

  // choose(name) is called when somebody wants to see one; refused(error) when the key is wrong.
  constructor(choose, refused) {
    Object.assign(this, { choose, refused, chosen: null });
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.look();
    });
  }

  async look() {
    clearTimeout(this.#timer);
    try {
      const { data } = await json("v1/streams");
      this.#show(data);
    } catch (error) {
      if (error.status === 401) this.refused(error);
      if (error.status === 404 || error.status === 401) { // an older server has no such list
        this.#show([]);
        return;
      }
    }
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), POLL_MS);
  }

  mark(name) {
    this.chosen = name;
    for (const [each, { button }] of this.#cards) {
      button.setAttribute("aria-pressed", each === name);
    }
  }

  #show(streams) {
    $("cameras").hidden = streams.length === 0;
    const names = new Set(streams.map(({ id }) => id));
    for (const [name, { item }] of this.#cards) {
      if (names.has(name)) continue;
      item.remove();
      this.#cards.delete(name);
    }
    for (const stream of streams) {
      if (!this.#cards.has(stream.id)) this.#cards.set(stream.id, this.#card(stream.id));
      this.#fill(this.#cards.get(stream.id), stream);
    }
    this.mark(this.chosen);
  }

  #card(name) {
    const card = {
      picture: make("img", { alt: "", hidden: true }), state: make("span", { className: "state" }),
      newest: null,
    };
    card.button = make("button", { type: "button", onclick: () => this.choose(name) },
      card.picture, make("span", { className: "name", textContent: name }), card.state);
    card.item = make("li", {}, card.button);
    $("cameras").append(card.item);
    return card;
  }

  #fill(card, { id, state, detail, newest_frame, alerts }) {
    const active = (alerts ?? []).filter((alert) => alert.state === "active").length;
    card.state.textContent = [STATES[state] ?? state, ...(active ? [`${active} alert`] : [])]
      .join(", ");
    card.item.dataset.state = active ? "alert" : state;
    card.button.title = detail ?? "";
    const newest = newest_frame?.frame_sequence ?? null;
    if (newest === null || newest === card.newest) return;
    card.newest = newest;
    request(`v1/streams/${encodeURIComponent(id)}/snapshot`).then(async (reply) => {
      URL.revokeObjectURL(card.picture.src);
      card.picture.src = URL.createObjectURL(await reply.blob());
      card.picture.hidden = false;
    }, () => { card.picture.hidden = true; }); // gone meanwhile: the list will say so
  }
}
