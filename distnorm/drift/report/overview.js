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
    let worst = NaN;
    for (const [index, run] of DATA.runs.entries()) {
      const values = await grid(run, measure.key);
      if (!values || !run.steps.length) continue;
      const [image, found] = miniature(measure, run, values, width, canvas.height);
      context.putImageData(image, index * (width + 3), 0);
      if (!(badness(measure, found) <= badness(measure, worst))) worst = found;
    }
    tab.querySelector(".value").textContent = Number.isNaN(worst) ? "not measured" : `worst ${say(worst)}${unit(measure)}`;
    tab.classList.toggle("beyond", DATA.runs.some((run) => run.alarms.some((alarm) => alarm.measure === measure.key && alarm.state === "raised")));
  }));
}

// The worst of all that falls on a pixel, and the worst of all.
function miniature(measure, run, values, width, height) {
  const image = new ImageData(width, height);
  const colours = ramp();
  const [rows, times] = [run.layers.length, run.steps.length];
  let worst = NaN;
  for (let y = 0; y < height; y++) {
    const [r0, r1] = [Math.floor((y * rows) / height), Math.max(Math.floor((y * rows) / height) + 1, Math.floor(((y + 1) * rows) / height))];
    for (let x = 0; x < width; x++) {
      const [t0, t1] = [Math.floor((x * times) / width), Math.max(Math.floor((x * times) / width) + 1, Math.floor(((x + 1) * times) / width))];
      let found = NaN;
      for (let row = r0; row < r1; row++) {
        for (let t = t0; t < t1; t++) {
          const value = values.at(row, t);
          if (!(badness(measure, value) <= badness(measure, found))) found = value;
        }
      }
      if (Number.isNaN(found)) continue;
      if (!(badness(measure, found) <= badness(measure, worst))) worst = found;
      image.data.set([...colours[Math.round(share(measure, found) * 255)], 255], 4 * (y * width + x));
    }
  }
  return [image, worst];
}
