// The page: theme, choice of measure, train/eval gap, alarms.

const byId = (id) => document.getElementById(id);

function theme() {
  const root = document.documentElement;
  const keep = (value) => { try { localStorage.setItem("distnorm-theme", value); } catch { /* a page without storage */ } };
  try {
    const kept = localStorage.getItem("distnorm-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* likewise */ }
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    keep(root.dataset.theme);
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

async function choose(key, stat = "median") {
  state.measure = MEASURE.get(key);
  state.stat = hasStat(stat) ? stat : "median";
  byId("measure-title").textContent = sentence(state.measure.title) + (state.measure.unit ? `, ${state.measure.unit}` : "");
  byId("measure-normal").textContent = `Normal: ${state.measure.normal}.` + (state.measure.limit ? ` Alarm ${state.measure.limit.side} ${say(state.measure.limit.at)}: ${state.measure.limit.meaning}.` : "");
  drawStats();
  markOverview();
  await drawMaps();
}

function hasStat(stat) {
  return DATA.runs.some((run) => run.planes[state.measure.key + STATS[stat]]);
}

function drawStats() {
  const names = { median: "median", p95: "95 %", max: "largest" };
  const box = byId("stats");
  const there = Object.keys(names).filter(hasStat);
  box.hidden = there.length < 2;
  box.replaceChildren(box.firstElementChild, ...there.map((stat) => {
    const input = make("input", { type: "radio", name: "stat", value: stat, checked: stat === state.stat });
    input.addEventListener("change", () => { state.stat = stat; drawMaps(); });
    return make("label", {}, input, make("span", {}, names[stat]));
  }));
}

async function drawMaps() {
  if (!state.measure) return;
  drawLegend(byId("legend"), state.measure);
  await Promise.all(maps.map((map) => map.draw()));
  document.documentElement.dataset.ready = `${state.measure.key}${STATS[state.stat]}`;
}

function redraw() {
  drawMaps();
  fillOverview();
}

function drawGap() {
  const box = byId("gap-lines");
  if (!box) return;
  const series = (name, extra = {}) => DATA.runs.flatMap((run, index) => {
    const points = run.scalars[name];
    return points ? [{ xs: points[0], ys: points[1].map((v) => v ?? NaN), run: index, dashed: extra.dashed }] : [];
  });
  const several = DATA.runs.length > 1;
  const losses = ["train/loss", "val/loss"].flatMap((name, i) => series(name, { dashed: i === 1 }).map((one) =>
    (several ? one : { ...one, name, run: i })));
  const kinds = several && losses.some((one) => one.dashed) ? "train/loss, and dashed val/loss" : "";
  const figures = [losses.length ? lineChart({ title: "Loss", unitText: kinds, series: losses, wide: true }) : null];
  for (const measure of DATA.model) {
    const [title, ...more] = measure.title.split(": ");
    const unitText = [measure.unit, more.join(": ")].filter(Boolean).join(" · ");
    figures.push(lineChart({ title: sentence(title), unitText, series: series(`drift/model/${measure.key}`), limit: measure.limit, healthy: 0, wide: true }));
  }
  box.replaceChildren(...runKeys(), ...figures.filter(Boolean));
}

function showAlarms() {
  for (const button of document.querySelectorAll("button[data-alarm]")) {
    button.addEventListener("click", async () => {
      const map = maps[Number(button.dataset.run)];
      const alarm = map.run.alarms[Number(button.dataset.alarm)];
      await choose(alarm.measure);
      map.last = { row: map.run.layers.findIndex((layer) => layer.name === alarm.layer), t: nearest(map.run.steps, alarm.step) };
      map.cells.scrollIntoView({ block: "center" });
      map.cells.focus({ preventScroll: true, focusVisible: true });
    });
  }
}

// The measure of the worst alarm that is left, else of the last one, else the first measure.
function first() {
  const alarms = DATA.runs.flatMap((run) => run.alarms).filter((alarm) => alarm.state === "raised" && MEASURE.has(alarm.measure));
  const badly = (alarm) => Math.abs(Math.log(Math.max(alarm.value, 1e-9) / Math.max(alarm.limit, 1e-9)));
  const headline = document.querySelector(".verdict.alarm[data-measure], .verdict.recovered[data-measure]");
  if (headline && MEASURE.has(headline.dataset.measure)) return headline.dataset.measure;
  return alarms.length ? alarms.reduce((a, b) => (badly(b) > badly(a) ? b : a)).measure : DATA.measures[0].key;
}

function start() {
  theme();
  setDomain();
  const shown = DATA.runs.filter((run) => run.steps.length && run.layers.length);
  for (const run of DATA.runs) maps.push(new Heatmap(run, DATA.runs.indexOf(run)));
  byId("maps").replaceChildren(...maps.filter((map) => shown.includes(map.run)).map((map) => map.element));
  drawGap();
  showAlarms();
  byId("close").addEventListener("click", () => { byId("layer").hidden = true; });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") byId("layer").hidden = byId("tip").hidden = true;
  });
  const [medians, others] = DATA.thinned;
  if (others > 1) {
    byId("thinned").hidden = false;
    byId("thinned").textContent = `To keep this page small, the 95 % and largest values are the worst of ${others} measurements` + (medians > 1 ? `, medians of ${medians}.` : ".");
  }
  if (!DATA.measures.length || !shown.length) {
    document.documentElement.dataset.ready = "nothing";
    byId("panel").replaceChildren(make("p", { class: "note" }, "Nothing was measured: train with drift=light or drift=full."));
    return;
  }
  drawOverview(choose);
  choose(first()).then(fillOverview);
  let waiting = 0;
  new ResizeObserver(() => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(drawMaps); }).observe(byId("maps"));
}

start();
