// All measures at a glance: a small map each, that chooses the large one.

function drawOverview(choose) {
  const box = document.getElementById("overview");
  for (const measure of DATA.measures) {
    const canvas = make("canvas", { width: 132, height: 44, "aria-hidden": "true" });
    const value = make("span", { class: "value" });
    const tab = make("button", { type: "button", role: "tab", id: `tab-${measure.key}`, "aria-controls": "panel", "aria-selected": "false", tabindex: "-1", title: measure.title }, make("span", { class: "name" }, sentence(measure.title)), canvas, value);
    tab.addEventListener("click", () => choose(measure.key));
    box.append(tab);
  }
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const count = DATA.measures.length;
    const now = DATA.measures.indexOf(state.measure);
    const next = DATA.measures[(now + step + count) % count].key;
    choose(next);
    document.getElementById(`tab-${next}`).focus();
  });
}

function markOverview() {
  for (const measure of DATA.measures) {
    const tab = document.getElementById(`tab-${measure.key}`);
    const chosen = measure === state.measure;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    const box = tab.parentElement;
    if (chosen && box.scrollWidth > box.clientWidth) box.scrollLeft = tab.offsetLeft - box.clientWidth / 2 + tab.offsetWidth / 2;
  }
}

async function fillOverview() {
  await Promise.all(DATA.measures.map(async (measure) => {
    const tab = document.getElementById(`tab-${measure.key}`);
    const canvas = tab.querySelector("canvas");
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const width = Math.floor((canvas.width - 3 * (DATA.runs.length - 1)) / DATA.runs.length);
    let all = null;
    for (const [index, run] of DATA.runs.entries()) {
      const values = await grid(run, measure.key);
      if (!values || !run.steps.length) continue;
      context.putImageData(miniature(measure, run, values, width, canvas.height), index * (width + 3), 0);
      all = summary(measure, run, values, all);
    }
    const said = all && `${say(all.worst)}${unit(measure)}`;
    const isConstant = all?.low === all?.high;
    tab.querySelector(".value").textContent = !all || Number.isNaN(all.worst) ? "not measured" : isConstant ? `always ${said}` : `worst ${said}`;
    tab.classList.toggle("quiet", !all || !(share(measure, all.worst) > 0.01));
    tab.classList.toggle("beyond", DATA.runs.some((run) => run.alarms.some((alarm) => alarm.measure === measure.key && alarm.state === "raised")));
  }));
}

// The worst of all that falls on a pixel.
function miniature(measure, run, grid, width, height) {
  const image = new ImageData(width, height);
  const colours = ramp();
  const rows = run.layers.length;
  const columns = columnsOf(grid, width);
  for (let y = 0; y < height; y++) {
    const r0 = Math.floor((y * rows) / height);
    const r1 = Math.max(r0 + 1, Math.floor(((y + 1) * rows) / height));
    for (let x = 0; x < width; x++) {
      let found = NaN;
      for (let row = r0; row < r1; row++) {
        for (let t = columns[2 * x]; t >= 0 && t <= columns[2 * x + 1]; t++) found = worse(measure, found, grid.at(row, t));
      }
      if (!Number.isNaN(found)) image.data.set([...colours[Math.round(share(measure, found) * 255)], 255], 4 * (y * width + x));
    }
  }
  return image;
}

function worse(measure, a, b) {
  return badness(measure, b) > badness(measure, a) ? b : a;
}

// What all values are together: the worst, and whether there is but one.
function summary(measure, run, grid, before) {
  const found = before || { worst: NaN, low: Infinity, high: -Infinity };
  for (const t of grid.times) {
    for (let row = 0; row < run.layers.length; row++) {
      const value = grid.at(row, t);
      if (Number.isNaN(value)) continue;
      found.worst = worse(measure, found.worst, value);
      found.low = Math.min(found.low, value);
      found.high = Math.max(found.high, value);
    }
  }
  return found;
}
