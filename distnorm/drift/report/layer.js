// One layer: its measures over time, and its channels' running against batch statistics at a snapshot.

let opened = 0;
async function openLayer({ run, row, channel }, focus = false) {
  const layer = run.layers[row];
  const section = document.getElementById("layer");
  const title = document.getElementById("layer-h");
  section.hidden = false;
  title.textContent = layer.name;
  const share_ = layer.samples > 1 ? `${thousands(layer.samples)} samples share its statistics` : "each sample has statistics of its own";
  document.getElementById("layer-about").textContent = [DATA.runs.length > 1 ? run.name : null, layer.kind, `${thousands(layer.channels)} channels`, share_].filter(Boolean).join(" · ");
  section.dataset.layer = layer.name;
  delete section.dataset.drawn;
  opened += 1;
  const mine = opened;
  const [lines, snapshot] = await Promise.all([layerLines(layer.name), layerSnapshot(run, layer.name, channel)]);
  if (mine !== opened) return; // another layer was opened since
  document.getElementById("lines").replaceChildren(...runKeys(), ...lines);
  document.getElementById("snapshot").replaceChildren(...snapshot);
  section.dataset.drawn = "";
  if (focus) title.focus();
  section.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

async function layerLines(name) {
  const found = await Promise.all(DATA.measures.map(async (measure) => {
    const series = [];
    for (const [index, run] of DATA.runs.entries()) {
      const row = run.layers.findIndex((layer) => layer.name === name);
      const [median, high] = await Promise.all([grid(run, measure.key), DATA.runs.length > 1 ? null : grid(run, `${measure.key}.p95`)]);
      const points = (one) => ({ xs: one.steps, ys: one.times.map((t) => one.at(row, t)), run: index });
      if (row >= 0 && high) series.push({ ...points(high), faint: true });
      if (row >= 0 && median) series.push({ ...points(median) });
    }
    return lineChart({ title: sentence(measure.title), unitText: measure.unit, series, limit: measure.limit, healthy: measure.healthy });
  }));
  return found.filter(Boolean);
}

async function layerSnapshot(run, name, channel) {
  const there = run.snapshots.filter((one) => one.parts[name]);
  if (!there.length) return [make("p", { class: "dim" }, "No snapshot of its channels was kept.")];
  const choice = make("select", { id: "snapshot-step" }, ...there.map((one, i) => make("option", { value: String(i) }, `step ${thousands(one.step)}`)));
  choice.value = String(there.length - 1);
  const panels = make("div", { class: "lines scatters" });
  const draw = async () => panels.replaceChildren(...await snapshotPanels(there[Number(choice.value)], name, channel));
  choice.addEventListener("change", draw);
  await draw();
  const title = make("h3", {}, "Channels: running against batch statistics");
  return [make("div", { class: "head" }, title, make("label", { class: "dim" }, "at ", choice)), panels];
}

async function snapshotPanels(snapshot, name, channel) {
  snapshot.values ??= await numbers(snapshot.packed);
  const part = (key) => {
    const [begin, ...shape] = snapshot.parts[name][key] || [0, 0];
    const rows = shape.length > 1 ? shape[0] : 1;
    const count = shape[shape.length - 1];
    return Array.from({ length: rows }, (_, k) => Array.from(snapshot.values.slice(begin + k * count, begin + (k + 1) * count)));
  };
  const [running, runningVar, batch, batchVar] = ["running_mean", "running_var", "batch_mean", "batch_var"].map((key) => part(key)[0]);
  const names = snapshot.parts[name].channel || batch.map((_, c) => c);
  const marked = { marked: names.indexOf(channel), markedName: `channel ${channel}` };
  const words = (xs, ys) => (_, i) => [`channel ${names[i]}`, `running ${say(xs[i])}`, `batch ${say(ys[i])}`];
  const figures = [];
  if (running.length && batch.length) {
    figures.push(scatter({ title: "Mean", xTitle: "running", yTitle: "batch", points: [{ xs: running, ys: batch, run: 0 }], words: words(running, batch), ...marked }));
  }
  if (runningVar.length && batchVar.length) {
    const [xs, ys] = [runningVar.map(Math.sqrt), batchVar.map(Math.sqrt)];
    figures.push(scatter({ title: "Standard deviation", xTitle: "running", yTitle: "batch", log: true, points: [{ xs, ys, run: 0 }], words: words(xs, ys), ...marked }));
  }
  const ranks = part("rank_means");
  const spread = (batchVar.length ? batchVar : runningVar).map((v) => Math.sqrt(Math.max(v, 1e-30)));
  if (ranks.length > 1 && spread.length) figures.push(ranksPanel(ranks, spread, names));
  return figures;
}

// Each rank's mean less the ranks' own mean, in standard deviations, channels sorted by how far the ranks are apart.
function ranksPanel(ranks, spread, names) {
  const middle = spread.map((_, c) => ranks.reduce((sum, means) => sum + means[c], 0) / ranks.length);
  const off = ranks.map((means) => means.map((m, c) => (m - middle[c]) / spread[c]));
  const apart = spread.map((_, c) => Math.max(...off.map((row) => Math.abs(row[c]))));
  const order = apart.map((_, c) => c).sort((a, b) => apart[b] - apart[a]);
  const points = off.map((row, k) => ({ xs: order.map((_, i) => i), ys: order.map((c) => row[c]), run: k }));
  const words = (k, i) => [`channel ${names[order[i]]}`, `rank ${k}`, `${say(off[k][order[i]])} σ from the ranks’ mean`];
  return scatter({ title: `Means of ${ranks.length} ranks`, xTitle: "channels, the most apart first", yTitle: "less their mean, σ", points, words, diagonal: false });
}
