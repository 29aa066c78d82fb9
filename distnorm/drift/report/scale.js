// Colour: a ramp whose lightness is even from healthy to the end of the span, in the page's theme.

// Lightness, chroma, hue (OKLCH) at even distances; healthy recedes into the page, so that drift stands out.
const RAMPS = {
  light: [[0.965, 0.008, 95], [0.86, 0.075, 88], [0.755, 0.125, 68], [0.65, 0.155, 46], [0.545, 0.165, 25],
    [0.44, 0.14, 5], [0.335, 0.105, 335]],
  dark: [[0.245, 0.012, 270], [0.35, 0.085, 305], [0.455, 0.135, 340], [0.565, 0.155, 10], [0.68, 0.155, 38],
    [0.8, 0.13, 70], [0.925, 0.085, 98]],
};

function isDark() {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function toLab([lightness, chroma, hue]) {
  const angle = (hue * Math.PI) / 180;
  return [lightness, chroma * Math.cos(angle), chroma * Math.sin(angle)];
}

// OKLab to sRGB: Ottosson 2020.
function toRgb([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((c) => {
    const value = c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, value)));
  });
}

const ramps = {};
function ramp() {
  const theme = isDark() ? "dark" : "light";
  if (!ramps[theme]) {
    const stops = RAMPS[theme].map(toLab);
    ramps[theme] = Array.from({ length: 256 }, (_, i) => {
      const place = (i / 255) * (stops.length - 1);
      const from = Math.min(Math.floor(place), stops.length - 2);
      return toRgb(stops[from].map((v, j) => v + (stops[from + 1][j] - v) * (place - from)));
    });
  }
  return ramps[theme];
}

// Where a value stands between healthy (0) and the end of the span (1); nan stays nan.
function share(measure, value) {
  if (Number.isNaN(value)) return NaN;
  if (!Number.isFinite(value)) return value > 0 === measure.span > measure.healthy ? 1 : 0;
  let place;
  if (measure.log || measure.two_sided) {
    if (value <= 0) return measure.span < measure.healthy ? 1 : 0;
    place = Math.log(value / measure.healthy) / Math.log(measure.span / measure.healthy);
    if (measure.two_sided) place = Math.abs(place);
  } else {
    place = (value - measure.healthy) / (measure.span - measure.healthy);
  }
  return Math.min(1, Math.max(0, place));
}

// The same without bounds, to find the worst of several.
function badness(measure, value) {
  if (Number.isNaN(value)) return -Infinity;
  if (measure.two_sided) return Math.abs(Math.log(Math.max(value, 1e-300) / measure.healthy));
  return measure.span < measure.healthy ? -value : value;
}

function css(name) {
  const probe = document.getElementById("tip");
  probe.style.outlineColor = `var(${name})`;
  const colour = getComputedStyle(probe).outlineColor;
  probe.style.outlineColor = "";
  return colour;
}

// The shared scale, with what is healthy and the limit marked on it.
function drawLegend(box, measure) {
  const colours = ramp();
  const stops = Array.from({ length: 17 }, (_, i) => `rgb(${colours[i * 15 + (i >> 4) * 15]})`).join(",");
  const bar = make("div", { class: "ramp" });
  bar.style.background = `linear-gradient(90deg, ${stops})`;
  const marks = [[0, `healthy ${say(measure.healthy)}`, "healthy"],
    [1, `${say(measure.span)}${unit(measure)}`, "span"]];
  if (measure.limit) marks.push([share(measure, measure.limit.at), `limit ${say(measure.limit.at)}`, "limit"]);
  const scale = make("div", { class: "marks" });
  for (const [place, text, kind] of marks) {
    const side = place > 0.75 ? " end" : place < 0.25 ? " start" : "";
    const mark = make("span", { class: kind + (kind === "limit" ? side : "") }, kind === "limit" ? make("b", {}, text) : text);
    mark.style.left = `${100 * place}%`;
    scale.append(mark);
  }
  box.replaceChildren(bar, scale);
  box.setAttribute("role", "img");
  const limit = measure.limit ? `, limit ${say(measure.limit.at)}` : "";
  box.setAttribute("aria-label", `Colours from healthy, ${say(measure.healthy)}, to ${say(measure.span)}${limit}`);
}
