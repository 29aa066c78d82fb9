// Maps, layers × steps, one a run: drawn on canvas, read by pointer and by keys.

const state = { measure: null, stat: "median", cell: null };
const maps = [];
const BAR_ROOM = 84; // beside the longest bar, for its value
const MOST_LANES = 4;

class Heatmap {
  constructor(run, index) {
    this.run = run;
    this.index = index;
    this.rowHeight = Math.min(24, Math.max(3, Math.floor(520 / Math.max(run.layers.length, 1))));
    const height = this.rowHeight * run.layers.length;
    this.canvas = make("canvas", {});
    this.overlay = make("svg", { class: "over", "aria-hidden": "true" });
    this.cells = make("div", { class: "cells", tabindex: "0", role: "application", "aria-roledescription": "map of layers over steps" }, this.canvas, this.overlay);
    this.cells.style.height = `${height}px`;
    this.labels = make("div", { class: "labels", "aria-hidden": "true" });
    this.axis = make("svg", { class: "axis-x", "aria-hidden": "true" });
    const caption = make("figcaption", {}, make("span", { class: `key run-${index % 6}` }, run.name));
    this.element = make("figure", { class: "map" }, DATA.runs.length > 1 ? caption : "",
      make("div", { class: "body" }, this.labels, this.cells, make("span", { class: "axis-name", "aria-hidden": "true" }, "step"), this.axis));
    this.drawLabels();
    this.listen();
    charts.add({ element: this.element, cursor: (step) => this.showCursor(step) });
  }

  drawLabels() {
    const every = Math.ceil(14 / this.rowHeight);
    for (let row = 0; row < this.run.layers.length; row += every) {
      const label = make("span", { title: this.run.layers[row].name }, make("bdi", {}, this.run.layers[row].name));
      label.style.top = `${(row + 0.5) * this.rowHeight}px`;
      this.labels.append(label);
    }
  }

  listen() {
    this.cells.addEventListener("pointermove", (event) => this.point(event, false));
    this.cells.addEventListener("click", (event) => {
      this.point(event, true);
      if (state.cell) openLayer(state.cell);
    });
    this.cells.addEventListener("pointerleave", () => leaveCell());
    this.cells.addEventListener("keydown", (event) => this.key(event));
    this.cells.addEventListener("focus", () => {
      if (this.cells.matches(":focus-visible")) this.select(this.last || { row: 0, t: this.run.steps.length - 1 }, true);
    });
    this.cells.addEventListener("blur", () => leaveCell());
  }

  async draw() {
    const width = Math.max(1, Math.round(this.cells.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round(this.cells.clientHeight * devicePixelRatio));
    const key = state.measure.key + STATS[state.stat];
    this.grid = (await grid(this.run, key)) || (await grid(this.run, state.measure.key));
    this.isOnce = this.grid?.times.length === 1;
    this.cells.classList.toggle("once", this.isOnce);
    this.columns = columnsOf(this.grid, width);
    const barWidth = Math.max(1, width - BAR_ROOM * devicePixelRatio);
    const colours = ramp();
    const rows = this.run.layers.length;
    const image = new ImageData(width, Math.max(rows, 1));
    for (let row = 0; this.grid && row < rows; row++) {
      for (let x = 0; x < width; x++) {
        const t = this.worstAt(row, x);
        const place = t < 0 ? NaN : share(state.measure, this.grid.at(row, t));
        if (Number.isNaN(place) || (this.isOnce && x > Math.max(place * barWidth, 2))) continue;
        const [r, g, b] = colours[Math.round(place * 255)];
        image.data.set([r, g, b, 255], 4 * (row * width + x));
      }
    }
    const flat = new OffscreenCanvas(width, Math.max(rows, 1));
    flat.getContext("2d").putImageData(image, 0, 0);
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const line = this.rowHeight >= 9 ? Math.round(devicePixelRatio) : 0;
    context.fillStyle = css("--page");
    const size = height / Math.max(rows, 1);
    for (let row = 0; row < rows; row++) {
      const [top, next] = [Math.round(row * size), Math.round((row + 1) * size)];
      context.drawImage(flat, 0, row, width, 1, 0, top, width, Math.max(1, next - top - line));
      context.fillRect(0, next - line, width, line);
    }
    this.cells.setAttribute("aria-label", `${this.run.name}: ${state.measure.title}, ${rows} layers over ${this.grid?.times.length ?? 0} measurements. Arrow keys move, Enter opens the layer.`);
    this.drawMarks();
  }

  // The worst measurement under a device pixel: what is coloured is what is said.
  worstAt(row, x) {
    const [first, last] = [this.columns[2 * x], this.columns[2 * x + 1]];
    let best = first;
    for (let t = first + 1; t <= last; t++) {
      if (badness(state.measure, this.grid.at(row, t)) > badness(state.measure, this.grid.at(row, best))) best = t;
    }
    return best;
  }

  drawMarks() {
    const width = this.cells.clientWidth;
    const marks = [make("line", { x1: 0, x2: width, y1: 0.5, y2: 0.5, class: "gridline" })];
    this.vertical = make("line", { class: "cursor", visibility: "hidden", y1: 0, y2: this.cells.clientHeight });
    this.box = make("rect", { class: "cell", visibility: "hidden" });
    this.axis.previousSibling.textContent = this.isOnce ? "" : "step";
    const rings = this.isOnce ? this.markBars(marks, width) : this.markSteps(marks, width);
    this.axis.replaceChildren(...marks);
    this.overlay.replaceChildren(...rings, this.vertical, this.box);
  }

  // Of a measurement that is alone: a bar a layer, and its value.
  markBars(marks, width) {
    const [t] = this.grid.times;
    marks.push(make("text", { x: 0, y: 16 }, `measured once, at step ${thousands(this.run.steps[t])}`));
    this.axis.setAttribute("height", 22);
    return this.rowHeight < 12 ? [] : this.run.layers.flatMap((_, row) => {
      const value = this.grid.at(row, t);
      const x = (share(state.measure, value) || 0) * (width - BAR_ROOM) + 8;
      return Number.isNaN(value) ? [] : [make("text", { x, y: (row + 0.5) * this.rowHeight + 3.5 }, say(value))];
    });
  }

  // Ticks, and the alarms below them: those too near to each other to tell apart stand in lanes.
  markSteps(marks, width) {
    for (const x of ticks(domain[0], domain[1], width / 90).filter((x) => x >= domain[0])) {
      const at = placeOf(x, width);
      const anchor = at < 16 ? "start" : at > width - 20 ? "end" : "middle";
      marks.push(make("line", { x1: at, x2: at, y1: 0, y2: 4, class: "gridline" }), make("text", { x: at, y: 16, "text-anchor": anchor }, thousands(x)));
    }
    const rings = [];
    const lanes = [];
    for (const alarm of this.run.alarms) {
      const x = placeOf(alarm.step, width);
      const free = lanes.findIndex((last) => x - last >= 11);
      const lane = free >= 0 ? free : Math.min(lanes.length, MOST_LANES - 1);
      lanes[lane] = x;
      const y = 22 + 12 * lane;
      const own = alarm.measure === state.measure.key;
      const raised = alarm.state === "raised";
      const shape = raised ? `M${x} ${y}l5 9h-10z` : `M${x - 4} ${y + 5}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`;
      marks.push(make("path", { d: shape, class: `alarm ${alarm.state}${own ? "" : " other"}` }, make("title", {}, `step ${thousands(alarm.step)}: ${alarm.message}`)));
      const row = this.run.layers.findIndex((layer) => layer.name === alarm.layer);
      if (own && raised && row >= 0) {
        const place = { cx: x, cy: (row + 0.5) * this.rowHeight, r: 6 };
        rings.push(make("circle", { ...place, class: "halo" }), make("circle", { ...place, class: "ring" }));
      }
    }
    this.axis.setAttribute("height", 24 + 12 * Math.max(lanes.length, 1));
    return rings;
  }

  point(event, pinned) {
    if (!this.grid) return;
    const box = this.cells.getBoundingClientRect();
    const row = Math.min(this.run.layers.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / this.rowHeight)));
    const x = Math.min(this.canvas.width - 1, Math.max(0, Math.floor((event.clientX - box.left) * devicePixelRatio)));
    const t = this.worstAt(row, x);
    if (t >= 0) this.select({ row, t }, pinned, event);
  }

  key(event) {
    if (!this.grid?.times.length) return;
    const { times } = this.grid;
    const { row, t } = this.last || { row: 0, t: this.run.steps.length - 1 };
    const far = Math.max(1, Math.round(times.length / 20));
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [0, -far], PageDown: [0, far], Home: [0, -1e9], End: [0, 1e9] };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (state.cell) openLayer(state.cell, true);
    } else if (moves[event.key]) {
      event.preventDefault();
      const [down, right] = moves[event.key];
      this.select({ row: Math.min(this.run.layers.length - 1, Math.max(0, row + down)), t: times[Math.min(times.length - 1, Math.max(0, nearest(times, t) + right))] }, true);
    }
  }

  // Select the measurement of a layer that is nearest to one.
  select({ row, t: wanted }, spoken, event = null) {
    if (!this.grid?.times.length || row < 0) return;
    const t = this.grid.times[nearest(this.grid.times, wanted)];
    this.last = { row, t };
    state.cell = { map: this, run: this.run, row, t, channel: this.grid.channel(row, t) };
    const layer = this.run.layers[row];
    const value = this.grid.at(row, t);
    const text = this.words(layer, value, state.cell.channel, t);
    if (spoken || event) document.getElementById("readout").textContent = text.join(" · ");
    showTip(text, event, this, row, t);
    for (const map of maps) map.frame(layer.name, this.run.steps[t]);
    moveCursor(this.run.steps[t]);
  }

  words(layer, value, channel, t) {
    const stat = state.measure.over_channels ? { median: "median ", p95: "95th percentile ", max: "largest " }[state.stat] : "";
    const text = [layer.name, `step ${thousands(this.run.steps[t])}`, `${stat}${state.measure.title} ${say(value)}${Number.isFinite(value) ? unit(state.measure) : ""}`];
    if (channel >= 0) text.push(`worst channel ${channel}`);
    if (beyond(state.measure.limit, value)) text.push(`beyond the limit ${say(state.measure.limit.at)}`);
    return DATA.runs.length > 1 ? [this.run.name, ...text] : text;
  }

  // Frame a cell by the layer's name and the step, in every run.
  frame(name, step) {
    const row = this.run.layers.findIndex((layer) => layer.name === name);
    if (!this.box || row < 0 || !this.grid?.times.length) return;
    const width = this.cells.clientWidth;
    const at = this.grid.steps[nearest(this.grid.steps, step)];
    const gap = gapOf(this.grid);
    const left = this.isOnce ? 0 : placeOf(at - gap / 2, width);
    const size = this.isOnce ? width : Math.max(3, placeOf(at + gap / 2, width) - left);
    const place = { x: left, y: row * this.rowHeight, width: size, height: this.rowHeight, visibility: "visible" };
    for (const [name_, value] of Object.entries(place)) this.box.setAttribute(name_, value);
  }

  showCursor(step) {
    if (!this.vertical) return;
    this.vertical.setAttribute("visibility", step === null || this.isOnce ? "hidden" : "visible");
    if (step === null) return this.box.setAttribute("visibility", "hidden");
    const x = placeOf(step, this.cells.clientWidth);
    this.vertical.setAttribute("x1", x);
    this.vertical.setAttribute("x2", x);
  }
}

function leaveCell() {
  document.getElementById("tip").hidden = true;
  moveCursor(null);
}

function showTip(text, event, map, row, t) {
  const box = map.cells.getBoundingClientRect();
  const x = event ? event.clientX : box.left + placeOf(map.run.steps[t], box.width);
  putTip(text, x, event ? event.clientY : box.top + (row + 0.5) * map.rowHeight);
}
