// A small line of the last values of something, with the newest, the mean and the largest in words.

const POINTS = 60;
const [WIDTH, HEIGHT] = [120, 28];

export class Chart {
  #values = [];

  // format(value) gives the words.
  constructor(svg, format) {
    this.svg = svg;
    this.format = format;
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "no values yet");
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.append(this.line);
  }

  add(value) {
    this.#values.push(value);
    if (this.#values.length > POINTS) this.#values.shift();
    const most = Math.max(...this.#values);
    const step = WIDTH / Math.max(this.#values.length - 1, 9);
    this.line.setAttribute("points", this.#values.map((each, number) => {
      const y = most > 0 ? (HEIGHT - 2) * (1 - each / most) + 1 : HEIGHT - 1;
      return `${(number * step).toFixed(1)},${y.toFixed(1)}`;
    }).join(" "));
    const mean = this.#values.reduce((sum, each) => sum + each, 0) / this.#values.length;
    const words = `mean ${this.format(mean)}, max ${this.format(most)}`;
    this.svg.setAttribute("aria-label", `last ${this.#values.length} values: ${words}`);
    this.svg.nextElementSibling.textContent = words;
  }

  clear() {
    this.#values = [];
    this.line.setAttribute("points", "");
    this.svg.setAttribute("aria-label", "no values yet");
    this.svg.nextElementSibling.textContent = "";
  }
}
