// Whether the numbers on the page are of now.

import { $ } from "../dom.js";

const STATUS = {
  idle: ["not connected", ""], connecting: ["connecting", ""], up: ["connected", "on"],
  broken: ["connection lost, trying again", "off"],
  restarting: ["the server is away, trying again", "off"],
};

// state: of the Session; trouble: why no pictures come, or nothing.
export function showStatus(state, trouble) {
  const [text, kind] = STATUS[state];
  const isMute = state === "up" && trouble;
  $("status").textContent = isMute ? "connected, no pictures" : text;
  $("status").className = `pill ${isMute ? "off" : kind}`;
  document.body.classList.toggle("stale", state !== "up");
}
