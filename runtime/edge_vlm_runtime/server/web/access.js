// The server's API key, and requests with it. The key comes behind #key= in the page's address,
// which a browser keeps to itself, or from the key field; that one is kept until the tab is closed.

const KEPT = "edge-vlm.key";

let typed = null;
try {
  typed = sessionStorage.getItem(KEPT);
} catch { /* then it is asked for again after a reload */ }

export function apiKey() {
  return typed ?? new URLSearchParams(location.hash.slice(1)).get("key");
}

export function setApiKey(text) {
  typed = text;
  try {
    sessionStorage.setItem(KEPT, text);
  } catch { /* as above */ }
}

// A browser sets no headers on a websocket: the key goes as a subprotocol.
export function protocols() {
  const key = apiKey();
  if (key === null) return [];
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  const text = btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["edge-vlm", `edge-vlm-key.${text}`];
}

// Why a request came to nothing; `status` 0: there was no answer.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The reply to a request below the page's own folder, or Refused.
export async function request(path, options = {}) {
  const key = apiKey();
  const isSendable = key === null || /^[\x20-\x7e]*$/.test(key); // else no header can hold it
  const headers = key === null || !isSendable ? {} : { Authorization: `Bearer ${key}` };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    throw new Refused(0, `the server does not answer (${error.message})`);
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Refused(reply.status, told?.error?.message ?? `status ${reply.status}`);
}

export async function json(path) {
  return (await request(path)).json();
}
