// The panels beside the picture: one at a time behind tabs, all of them on a large screen.

import { $ } from "../dom.js";

const NAMES = ["chat", "alerts", "figures", "settings"];
const large = matchMedia("(min-width: 110rem)");
let open = "chat";

export function openTab(name) {
  open = name;
  document.body.dataset.tab = name;
  for (const each of NAMES) {
    const isOpen = each === name;
    $(`tab-${each}`).setAttribute("aria-selected", isOpen);
    $(`tab-${each}`).tabIndex = isOpen ? 0 : -1;
    $(`panel-${each}`).hidden = !isOpen && !large.matches;
  }
}

function arrows(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  let next = { Home: 0, End: NAMES.length - 1 }[event.key];
  if (step) next = (NAMES.indexOf(open) + step + NAMES.length) % NAMES.length;
  if (next === undefined) return;
  event.preventDefault();
  openTab(NAMES[next]);
  $(`tab-${NAMES[next]}`).focus();
}

for (const name of NAMES) $(`tab-${name}`).onclick = () => openTab(name);
$("tabs").onkeydown = arrows;
large.onchange = () => openTab(open);
openTab(open);
