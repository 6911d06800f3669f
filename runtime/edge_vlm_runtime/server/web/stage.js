// The picture: a video element for cameras and files, a canvas for still pictures and for those of
// the server's cameras, and over both what the model looked at.

import { $ } from "./dom.js";

const video = $("video");
const still = $("still");
const overlay = $("overlay");

const HINT = $("hint-text").textContent;

let grid = 0;
let shown = null; // {cells: Set, heat: share of the last frames that kept each cell}

function setAspect(width, height) {
  $("stage").style.setProperty("--aspect", width / height);
  $("hint").hidden = true;
}

export function showVideo() {
  still.hidden = true;
  video.hidden = false;
  setAspect(video.videoWidth, video.videoHeight);
}

// An ImageBitmap.
export function showStill(bitmap) {
  video.hidden = true;
  still.hidden = false;
  still.width = bitmap.width;
  still.height = bitmap.height;
  still.getContext("2d").drawImage(bitmap, 0, 0);
  setAspect(bitmap.width, bitmap.height);
}

export function showNothing() {
  showWaiting(HINT);
  $("hint-demos").hidden = false;
}

// Until there is a picture.
export function showWaiting(text) {
  still.hidden = true;
  video.hidden = false;
  $("hint-text").textContent = text;
  $("hint-demos").hidden = true;
  $("hint").hidden = false;
  forget();
}

// A frame.accepted: which cells of it were kept.
export function showCells(event, cellGrid) {
  grid = cellGrid;
  const cells = new Set(event.kept_cells);
  const heat = Array.from({ length: event.cells_seen }, (_, cell) =>
    0.8 * (shown?.heat[cell] ?? 0) + 0.2 * (cells.has(cell) ? 1 : 0));
  shown = { cells, heat };
  draw();
}

export function forget() {
  shown = null;
  draw();
}

function draw() {
  const context = overlay.getContext("2d");
  const box = overlay.getBoundingClientRect();
  overlay.width = box.width * devicePixelRatio;
  overlay.height = box.height * devicePixelRatio;
  $("legend").hidden = !($("heat").checked && shown);
  if ($("heat").checked && shown) drawCells(context);
}

// What was dropped is dimmed, and a line runs round what was kept.
function drawCells(context) {
  const [width, height] = [overlay.width / grid, overlay.height / grid];
  const isKept = (column, row) => column >= 0 && row >= 0 && column < grid && row < grid &&
    shown.cells.has(row * grid + column);
  context.lineWidth = 2 * devicePixelRatio;
  context.strokeStyle = "#2dd4bf";
  context.beginPath();
  for (let cell = 0; cell < grid * grid; cell += 1) {
    const [column, row] = [cell % grid, Math.floor(cell / grid)];
    const [x, y] = [column * width, row * height];
    if (!isKept(column, row)) {
      context.fillStyle = "rgba(8, 12, 18, 0.55)";
      context.fillRect(x, y, width, height);
      continue;
    }
    context.fillStyle = `rgba(45, 212, 191, ${0.22 * shown.heat[cell]})`;
    context.fillRect(x, y, width, height);
    const edges = [[0, -1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1], [-1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 1, 1]];
    for (const [across, down, x0, y0, x1, y1] of edges) {
      if (isKept(column + across, row + down)) continue;
      context.moveTo(x + x0 * width, y + y0 * height);
      context.lineTo(x + x1 * width, y + y1 * height);
    }
  }
  context.stroke();
}

$("heat").onchange = draw;
new ResizeObserver(draw).observe(overlay);
