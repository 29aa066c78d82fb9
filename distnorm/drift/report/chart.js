// Lines over steps and points over channels, as SVG; all charts follow one cursor.

const charts = new Set();
let domain = [0, 1];

function setDomain() {
  const ends = DATA.runs.filter((run) => run.steps.length).map((run) => [run.steps[0] - gapOf(run) / 2,
    run.steps[run.steps.length - 1] + gapOf(run) / 2]);
  if (ends.length) domain = [Math.min(...ends.map((e) => e[0])), Math.max(...ends.map((e) => e[1]))];
}

// Steps between two measurements: the median.
function gapOf(run) {
  const gaps = run.steps.slice(1).map((step, i) => step - run.steps[i]).sort((a, b) => a - b);
  return gaps.length ? gaps[gaps.length >> 1] : 1;
}

// The range of measurements that each of so many pixels shows, -1 where there was none near it: a cell reaches half way
// to the next, and at most as far as measurements of its kind are apart. All pixels show a measurement that is alone.
function columnsOf(grid, width) {
  const found = new Int32Array(2 * width).fill(-1);
  if (!grid) return found;
  const { times, steps } = grid;
  if (times.length === 1) return found.fill(times[0]);
  const gap = gapOf(grid);
  for (let i = 0; i < times.length; i++) {
    const before = i ? Math.max((steps[i - 1] + steps[i]) / 2, steps[i] - gap) : steps[i] - gap / 2;
    const after = i + 1 < steps.length ? Math.min((steps[i] + steps[i + 1]) / 2, steps[i] + gap) : steps[i] + gap / 2;
    const first = Math.max(0, Math.floor(placeOf(before, width) + 0.01));
    const last = Math.min(width - 1, Math.max(first, Math.ceil(placeOf(after, width) - 0.01) - 1));
    for (let x = first; x <= last; x++) {
      if (found[2 * x] < 0) found[2 * x] = times[i];
      found[2 * x + 1] = times[i];
    }
  }
  return found;
}

function placeOf(step, width) {
  return ((step - domain[0]) / (domain[1] - domain[0])) * width;
}

function moveCursor(step, from = null) {
  for (const chart of charts) if (!chart.element.isConnected) charts.delete(chart);
  for (const chart of charts) if (chart !== from) chart.cursor(step);
}

// Round numbers, at most `most` of them.
function ticks(low, high, most) {
  const raw = (high - low) / Math.max(most, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// Powers of ten, with their double and fivefold where that leaves few.
function logTicks(low, high) {
  const found = (factors) => Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, i) => Math.floor(low) + i)
    .flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`)))
    .filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
  const marks = [[1, 2, 5], [1, 3], [1]].map(found).find((some) => some.length <= 6) || [];
  return marks.length > 1 ? marks : ticks(10 ** low, 10 ** high, 4).filter((v) => v > 0);
}

function path(xs, ys, toX, toY, width) {
  const parts = [];
  const put = (i, move) => parts.push(`${move ? "M" : "L"}${toX(xs[i]).toFixed(1)} ${toY(ys[i]).toFixed(1)}`);
  const bucket = Math.max(1, Math.floor(xs.length / (2 * width)));
  let pen = false;
  for (let i = 0; i < xs.length; i += bucket) {
    const known = [];
    for (let j = i; j < Math.min(i + bucket, xs.length); j++) if (Number.isFinite(ys[j])) known.push(j);
    if (!known.length) continue; // a measure of evaluations alone is joined over what was not measured
    const low = known.reduce((a, b) => (ys[b] < ys[a] ? b : a));
    const high = known.reduce((a, b) => (ys[b] > ys[a] ? b : a));
    for (const j of new Set([Math.min(low, high), Math.max(low, high)])) {
      put(j, !pen);
      pen = true;
    }
  }
  return parts.join("");
}

// series: [{name, xs, ys, run, faint, dashed}]; the cursor's values are said beside the title.
function lineChart({ title, unitText = "", series, limit = null, healthy = null, wide = false }) {
  const [width, height, left, bottom] = wide ? [420, 170, 40, 18] : [260, 92, 38, 14];
  const known = series.flatMap((one) => Array.from(one.ys)).filter(Number.isFinite);
  if (!known.length) return null;
  let [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (healthy !== null && Math.abs(healthy) < 4 * Math.max(Math.abs(high), 1e-9)) [low, high] = [Math.min(low, healthy), Math.max(high, healthy)];
  if (limit && limit.at < high * 3 && limit.at > low / 3) [low, high] = [Math.min(low, limit.at), Math.max(high, limit.at)];
  if (high - low <= 1e-9 * Math.abs(high)) high = low + (Math.abs(low) || 1);
  const toX = (x) => left + ((x - domain[0]) / (domain[1] - domain[0])) * (width - left - 4);
  const toY = (y) => 6 + ((high - y) / (high - low)) * (height - bottom - 12);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over steps` });
  for (const y of ticks(low, high, wide ? 4 : 3)) {
    svg.append(make("line", { x1: left, x2: width - 4, y1: toY(y), y2: toY(y), class: "gridline" }),
      make("text", { x: left - 5, y: toY(y) + 3.5, "text-anchor": "end" }, say(y)));
  }
  for (const x of ticks(domain[0], domain[1], wide ? 5 : 2).filter((x) => x > domain[0])) {
    svg.append(make("text", { x: Math.min(toX(x), width - 16), y: height - 2, "text-anchor": "middle" }, thousands(x)));
  }
  if (limit && limit.at >= low && limit.at <= high) {
    svg.append(make("line", { x1: left, x2: width - 4, y1: toY(limit.at), y2: toY(limit.at), class: "limit" }));
  }
  for (const one of series) {
    const shape = path(one.xs, one.ys, toX, toY, width);
    const points = one.ys.length < 2 ? " points" : "";
    svg.append(make("path", { d: points ? `${shape}h0` : shape, class: `line run-${one.run % 6}${one.faint ? " faint" : ""}${one.dashed ? " dashed" : ""}${points}` }));
  }
  const cursorLine = make("line", { y1: 4, y2: height - bottom, class: "cursor", visibility: "hidden" });
  svg.append(cursorLine);
  const now = make("span", { class: "now" });
  const figure = make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), now), svg);
  const chart = { element: figure, cursor };
  function cursor(step) {
    cursorLine.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) return rest();
    cursorLine.setAttribute("x1", toX(step));
    cursorLine.setAttribute("x2", toX(step));
    now.replaceChildren(...series.filter((one) => !one.faint).map((one) => value(one, nearest(one.xs, step))));
  }
  function value(one, i) {
    const name = one.name && series.filter((other) => !other.faint).length > 1 ? `${one.name} ` : "";
    return make("span", { class: `run-${one.run % 6}` }, `${name}${say(i < 0 ? NaN : one.ys[i])}`);
  }
  function rest() {
    const named = series.filter((one) => !one.faint && one.name).map((one) =>
      make("span", { class: `key run-${one.run % 6}${one.dashed ? " dashed" : ""}` }, one.name));
    const once = series.every((one) => one.ys.length === 1);
    now.replaceChildren(...(named.length > 1 ? named : [unitText]), ...(once ? series.filter((one) => !one.faint).map((one) => value(one, 0)) : []));
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const step = domain[0] + ((x - left) / (width - left - 4)) * (domain[1] - domain[0]);
    moveCursor(Math.min(domain[1], Math.max(domain[0], step)));
  });
  svg.addEventListener("pointerleave", () => moveCursor(null));
  charts.add(chart);
  rest();
  return figure;
}

// points: [{xs, ys, run}]; log axes where all is positive and it is wanted; the diagonal is where both agree.
// `words(k, i)`: lines on point i of points[k].
function scatter({ title, xTitle, yTitle, points, words, log = false, diagonal = true, marked = -1, markedName = "" }) {
  const [width, height, left, bottom] = [300, 250, 46, 32];
  const map = log ? (v) => Math.log10(Math.max(v, 1e-30)) : (v) => v;
  const bounds = (values) => {
    const known = values.map(map).filter(Number.isFinite);
    const [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const room = (high - low) * 0.05 || 0.5;
    return known.length ? [low - room, high + room] : [0, 1];
  };
  let xs = bounds(points.flatMap((p) => p.xs));
  let ys = bounds(points.flatMap((p) => p.ys));
  if (diagonal) xs = ys = [Math.min(xs[0], ys[0]), Math.max(xs[1], ys[1])];
  const toX = (v) => left + ((map(v) - xs[0]) / (xs[1] - xs[0])) * (width - left - 8);
  const toY = (v) => 8 + ((ys[1] - map(v)) / (ys[1] - ys[0])) * (height - bottom - 8);
  const back = log ? (v) => 10 ** v : (v) => v;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${yTitle} over ${xTitle}` });
  const marks = (ends) => (log ? logTicks(...ends) : ticks(...ends, 4));
  for (const y of marks(ys)) {
    svg.append(make("line", { x1: left, x2: width - 8, y1: toY(y), y2: toY(y), class: "gridline" }),
      make("text", { x: left - 6, y: toY(y) + 3.5, "text-anchor": "end" }, say(y)));
  }
  for (const x of marks(xs)) {
    svg.append(make("text", { x: Math.min(toX(x), width - 14), y: height - 18, "text-anchor": "middle" }, say(x)));
  }
  svg.append(make("text", { x: width - 8, y: height - 3, "text-anchor": "end", class: "axis" }, `${xTitle} →`));
  if (diagonal) svg.append(make("line", { x1: toX(back(xs[0])), y1: toY(back(xs[0])), x2: toX(back(xs[1])), y2: toY(back(xs[1])), class: "diagonal" }));
  for (const one of points) {
    const shape = one.xs.map((x, i) => `M${toX(x).toFixed(1)} ${toY(one.ys[i]).toFixed(1)}h0`).join("");
    svg.append(make("path", { d: shape, class: `points run-${one.run % 6}` }));
  }
  hover(svg, points.flatMap((one, k) => one.xs.map((x, i) => ({ x: toX(x), y: toY(one.ys[i]), text: () => words(k, i) }))), width);
  if (marked >= 0 && marked < points[0].xs.length) {
    const [x, y] = [toX(points[0].xs[marked]), toY(points[0].ys[marked])];
    svg.append(make("circle", { cx: x, cy: y, r: 6, class: "ring" }),
      make("text", { x: x > width - 80 ? x - 9 : x + 9, y: y + 3.5, class: "axis", "text-anchor": x > width - 80 ? "end" : "start" }, markedName));
  }
  return make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), make("span", { class: "now" }, `↑ ${yTitle}`)), svg);
}

// Say what the point nearest to the pointer is, and ring it.
function hover(svg, places, width) {
  const ring = make("circle", { r: 5, class: "ring near", visibility: "hidden" });
  svg.append(ring);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const far = (one) => (one.x - x) ** 2 + (one.y - y) ** 2;
    const found = places.reduce((a, b) => (far(b) < far(a) ? b : a), { x: Infinity, y: Infinity });
    if (!(far(found) < 14 ** 2)) return rest();
    for (const [name, value] of [["cx", found.x], ["cy", found.y], ["visibility", "visible"]]) ring.setAttribute(name, value);
    putTip(found.text(), event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", rest);
  function rest() {
    ring.setAttribute("visibility", "hidden");
    document.getElementById("tip").hidden = true;
  }
}

// Which colour is which run: once above many charts.
function runKeys() {
  if (DATA.runs.length < 2) return [];
  return [make("p", { class: "keys" }, ...DATA.runs.map((run, index) => make("span", { class: `key run-${index % 6}` }, run.name)))];
}

// Lines beside a place in the window, the first in bold.
function putTip([first, ...rest], x, y) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(make("b", {}, first), ...rest.map((line) => make("span", {}, line)));
  tip.hidden = false;
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(x + 16, width - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 14 : y + 18}px`;
}
