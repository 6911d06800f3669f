// Where an answer points, drawn on the pictures it means: the page keeps the last ones it has sent.

const MAX_PICTURES = 128;
const MAX_BYTES = 16 << 20;
const MAX_SHOWN = 4; // pictures under one answer
const WIDTH = 300;
const COLOURS = ["#22d3ee", "#f472b6", "#a3e635", "#facc15", "#c084fc", "#fb923c"];

export class SentPictures {
  #blobs = new Map(); // frame number -> JPEG, oldest first
  #bytes = 0;

  add(sequence, blob) {
    this.#blobs.set(sequence, blob);
    this.#bytes += blob.size;
    for (const [oldest, { size }] of this.#blobs) {
      if (this.#blobs.size <= MAX_PICTURES && this.#bytes <= MAX_BYTES) break;
      this.#blobs.delete(oldest);
      this.#bytes -= size;
    }
  }

  get(sequence) {
    return this.#blobs.get(sequence);
  }

  clear() {
    this.#blobs.clear();
    this.#bytes = 0;
  }
}

// Figures with the pictures that `points` belong to, the last few of them; of a track each picture
// shows the way so far.
export async function pointedPictures(points, pictures) {
  const known = points.filter((point) => pictures.get(point.frame_sequence));
  const frames = [...new Set(known.map((point) => point.frame_sequence))];
  return Promise.all(frames.slice(-MAX_SHOWN).map((frame) =>
    figureOf(frame, known, pictures.get(frame))));
}

async function figureOf(frame, points, blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = document.createElement("canvas");
  canvas.width = WIDTH;
  canvas.height = Math.max(1, Math.round((WIDTH * bitmap.height) / bitmap.width));
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  context.font = "600 13px system-ui, sans-serif";
  const here = points.filter((point) => point.frame_sequence === frame);
  for (const point of here) {
    context.strokeStyle = context.fillStyle = COLOURS[point.object_id % COLOURS.length];
    if (point.kind === "track") drawWay(context, point, points);
    drawPoint(context, point);
  }
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const labels = [...new Set(here.map((point) => point.label))].filter(Boolean).join(", ");
  caption.textContent = `${labels ? `${labels}, ` : ""}frame ${frame} at ` +
    `${here[0].time_s.toFixed(1)} s`;
  figure.append(canvas, caption);
  return figure;
}

// A ring with a dark edge, so that it is seen on any picture.
function drawPoint(context, { x, y, object_id }) {
  const [column, row] = [x * context.canvas.width, y * context.canvas.height];
  const colour = context.strokeStyle;
  for (const [style, width] of [["rgba(0, 0, 0, 0.7)", 7], [colour, 4]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.beginPath();
    context.arc(column, row, 10, 0, 2 * Math.PI);
    context.stroke();
  }
  context.strokeStyle = "rgba(0, 0, 0, 0.7)";
  context.lineWidth = 3;
  context.strokeText(object_id, column + 16, row + 5);
  context.fillText(object_id, column + 16, row + 5);
  context.strokeStyle = colour;
}

function drawWay(context, last, points) {
  context.lineWidth = 3;
  const way = points.filter((point) => point.kind === "track" && point.label === last.label &&
    point.object_id === last.object_id && point.time_s <= last.time_s);
  way.sort((one, other) => one.time_s - other.time_s);
  context.beginPath();
  for (const { x, y } of way) context.lineTo(x * context.canvas.width, y * context.canvas.height);
  context.stroke();
}
