// Numbers: packed planes to arrays (see pack.py), and numbers to words.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MEASURE = new Map(DATA.measures.map((m) => [m.key, m]));
const STATS = { median: "", p95: ".p95", max: ".max" };

async function inflate(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The codes of a plane: low bytes, then high bytes; as they are or as differences along rows.
async function codes(plane) {
  const bytes = await inflate(plane.data);
  const count = bytes.length / 2;
  const columns = plane.shape[plane.shape.length - 1];
  const out = new Uint16Array(count);
  let last = 0;
  for (let i = 0; i < count; i++) {
    let code = bytes[i] | (bytes[count + i] << 8);
    if (plane.change) {
      if (i % columns === 0) last = 0;
      last = (last + ((code >> 1) ^ -(code & 1))) & 0xffff;
      code = last;
    }
    out[i] = code;
  }
  return out;
}

async function numbers(plane) {
  const found = await codes(plane);
  const powers = Array.from({ length: 36 }, (_, e) => Number(`1e${e + plane.base}`));
  const special = [NaN, 0, Infinity, -Infinity];
  return Float64Array.from(found, (code) => {
    if (code < 4) return special[code];
    const n = (code - 4) >> 1;
    const size = ((n % 900) + 100) * powers[Math.floor(n / 900)];
    return code & 1 ? -size : size;
  });
}

// One measure of one run: `at(layer, measurement)`, and the measurements that made it, with their steps; decoded when it
// is first asked for, then kept.
const decoded = new Map();
function grid(run, key) {
  const name = `${DATA.runs.indexOf(run)} ${key}`;
  if (!decoded.has(name)) decoded.set(name, decode(run, key));
  return decoded.get(name);
}

async function decode(run, key) {
  const plane = run.planes[key];
  if (!plane) return null;
  const worst = run.worst[key.replace(/\.(max|p95)$/, "")];
  const [values, channels] = await Promise.all([numbers(plane), worst ? codes(worst) : null]);
  const columns = plane.shape[1];
  const at = (layer, t) => values[layer * columns + Math.floor(t / plane.k)];
  const times = Array.from(run.steps.keys()).filter((t) => run.layers.some((_, row) => !Number.isNaN(at(row, t))));
  return {
    at,
    times,
    steps: times.map((t) => run.steps[t]),
    channel: (layer, t) => (channels ? channels[layer * worst.shape[1] + Math.floor(t / worst.k)] - 1 : -1),
  };
}

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

// Three significant digits, thin spaces between thousands.
function say(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not measured";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (value && (size < 1e-3 || size >= 1e6)) {
    const [digits, exponent] = value.toExponential(2).split("e");
    const power = [...String(Number(exponent))].map((c) => SUPERSCRIPT[c]).join("");
    return `${digits.replace(/\.?0+$/, "")}·10${power}`.replace("-", "−");
  }
  return thousands(Number(value.toPrecision(3)));
}

function thousands(value) {
  const [whole, part] = String(value).split(".");
  return (whole.replace(/\B(?=(\d{3})+$)/g, "\u2009") + (part ? `.${part}` : "")).replace("-", "−");
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function unit(measure) {
  return measure.unit ? ` ${measure.unit}` : "";
}

function beyond(limit, value) {
  return Boolean(limit) && (limit.side === "above" ? value > limit.at : value < limit.at);
}

// Elements, with text that is never markup.
const SVG = "http://www.w3.org/2000/svg";
function make(tag, attributes = {}, ...children) {
  const is = ["svg", "path", "line", "circle", "text", "g", "rect", "title"].includes(tag);
  const element = is ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// The measurement nearest to a step, -1 without any.
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low > high ? -1 : low;
}
