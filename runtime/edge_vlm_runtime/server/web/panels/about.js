// What is told of the model and of the server before anything runs: the banner of a toy model, the
// addresses for other devices, and the field for the key.

import { Refused, apiKey, json, setApiKey } from "../access.js";
import { $, make } from "../dom.js";
import { keep, recall } from "../store.js";

// The answer of v1/edge_vlm/page, or null from an older server. Raises Refused for a wrong key.
export async function lookAround() {
  let facts = null;
  try {
    facts = await json("v1/edge_vlm/page");
  } catch (error) {
    if (error instanceof Refused && error.status !== 404) throw error;
  }
  showAddresses(facts);
  return facts;
}

export function showModel(model, ...panels) {
  $("model").textContent = model.bundle;
  const card = model.card ?? null; // null from an older server, too
  for (const panel of panels) panel.showExamples(card);
  const hidden = recall("banner-hidden", "");
  $("banner").hidden = card === null || hidden === model.bundle;
  if (card === null) return;
  $("banner-title").textContent = card.is_toy ? "This is a toy model." : "About this model.";
  $("banner-text").textContent = card.summary;
  $("banner-close").onclick = () => {
    keep("banner-hidden", model.bundle);
    $("banner").hidden = true;
  };
}

function showAddresses(facts) {
  const isHere = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  const list = facts?.addresses ?? [];
  $("addresses").replaceChildren(...list.map(({ url, qr }) => make("li", {},
    make("img", { src: qr, alt: `QR code of ${url}`, className: "qr" }),
    make("a", { href: url, textContent: url }))));
  const notes = [];
  if (facts === null) notes.push("This server does not tell its addresses: it is an older version.");
  else if (list.length === 0) {
    notes.push(isHere ? "Only this computer reaches the server. For other devices start it with " +
      "--host 0.0.0.0, --tls (their cameras need https) and an API key."
      : `Other devices reach it as you do: ${location.origin}`);
  } else {
    if (facts.has_key) notes.push("The codes hold the API key: show them to nobody who may not watch.");
    else notes.push("Everybody in this network may watch: there is no API key.");
    if (!facts.is_tls) notes.push("Without --tls a phone can watch and ask, but not use its camera.");
    else notes.push("A certificate of the server's own is warned of once on each device.");
  }
  $("address-notes").textContent = notes.join(" ");
}

// The browser does not tell a page why a websocket was not opened.
export async function whyRefused() {
  const answers = await fetch("healthz").then((reply) => reply.ok, () => false);
  return !answers ? "The server does not answer."
    : "The server answers, but takes no websocket from this page. Behind a proxy: it must pass " +
      "websockets on (Upgrade and Connection), and if it changes Host, start the server with " +
      `--allow-origin ${location.origin}`;
}

// taken() is called when somebody has given a key.
export function askForKey(message, taken) {
  const isFirst = apiKey() === null;
  $("key-form").hidden = false;
  $("key-label").textContent = isFirst ? "This server wants an API key" : "That is not its API key";
  $("key-note").textContent = isFirst ? "Whoever started the server has it." : message;
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    const text = $("key").value.trim();
    if (!text) return;
    setApiKey(text);
    $("key").value = "";
    $("key-form").hidden = true;
    taken();
  };
}
