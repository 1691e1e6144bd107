// What is known of the chosen point: its runs, curves with the band of its seeds, heat maps, confusion, the command.

import { extent } from "d3-array";
import { scaleLinear } from "d3-scale";
import { loadCurves, loadDetails } from "./data.js";
import { make } from "./dom.js";
import { formatAccuracy, formatPercent, formatSeconds, formatValue, formatX } from "./format.js";
import { paired, welch } from "./stats.js";

const CURVES = { "val/acc": "validation accuracy", "train/acc": "training accuracy", "val/loss": "validation loss", "train/loss": "training loss" };
const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9a8700", "#808890"];

export class Detail {
  constructor(view, root) {
    this.view = view;
    this.root = root;
    root.addEventListener("click", async (event) => {
      const { copy, run, unpin } = event.target.dataset;
      if (copy !== undefined) {
        await navigator.clipboard?.writeText(copy).catch(() => {});
        event.target.textContent = "copied";
      }
      if (run !== undefined) view.selectRun(Number(run));
      if (unpin !== undefined) view.togglePin(Number(unpin));
    });
  }

  async draw() {
    const { view } = this, { table } = view;
    const turn = this.turn = {}; // a later call of draw makes this one stop
    const points = [...new Set([view.selected, ...view.pinned].filter((i) => i >= 0))], alone = view.selectedRun;
    if (!points.length && alone < 0) {
      this.root.replaceChildren(make("p", { class: "hint" }, "Choose a point (click, or arrow keys and Enter): its curves, seeds and command appear here. Pin two or more to compare them."));
      return;
    }
    const wanted = (alone >= 0 ? [alone] : points.flatMap((i) => table.runsOf[i])).map((run) => table.runs.id[run]);
    const [curves, details] = await Promise.all([loadCurves(table), loadDetails(wanted)]);
    if (this.turn !== turn) return;
    const parts = [];
    if (alone >= 0) parts.push(this.describeRun(alone));
    else if (view.selected >= 0) parts.push(this.describePoint(view.selected));
    if (view.pinned.length > 1) parts.push(this.comparePinned(view.pinned));
    const lines = alone >= 0 ? [{ label: table.runs.name[alone], runs: [alone] }]
      : points.map((i) => ({ label: table.points.label[i], runs: table.runsOf[i] }));
    parts.push(this.drawCurves(lines, curves, details));
    const shownRun = alone >= 0 ? alone : view.selected >= 0 ? table.runsOf[view.selected].find((run) => details[table.runs.id[run]]) ?? table.runsOf[view.selected][0] : undefined;
    if (shownRun !== undefined) parts.push(...this.drawDetails(shownRun, details[table.runs.id[shownRun]]));
    this.root.replaceChildren(...parts);
  }

  describePoint(i) {
    const { table, measured } = this.view, { points, runs } = table, first = table.runsOf[i][0];
    const rows = table.runsOf[i].map((run) => make("tr", {},
      make("td", {}, make("button", { type: "button", class: "open", "data-run": run }, runs.id[run])), make("td", { class: "number" }, formatValue(runs.seed[run])),
      make("td", { class: "number" }, formatPercent(runs.val[run] ?? NaN)), make("td", { class: "number" }, formatPercent(runs.test[run] ?? NaN)),
      make("td", { class: "number" }, formatSeconds(runs.seconds[run] ?? NaN)), make("td", {}, link(runs.url[run]))));
    const head = ["run", "seed", "val acc %", "test acc %", "time", "W&B"].map((name) => make("th", { scope: "col" }, name));
    return make("div", { class: "about" },
      make("h3", {}, points.label[i]),
      make("p", {}, `${formatAccuracy(measured, i)} at ${formatX("macs", points.macs[i])}, ${formatX("params", points.params[i])} parameters.`,
        points.lost[i] ? ` ${points.lost[i]} more of its seeds did not finish.` : ""),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "runs of this point" }, make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows))),
      repeat(runs, first));
  }

  describeRun(run) {
    const { runs } = this.view.table;
    return make("div", { class: "about" },
      make("h3", {}, `${runs.name[run]} (${runs.id[run]})`),
      make("p", {}, `${runs.state[run]} after ${runs.epoch[run]} of ${runs.epochs[run]} epochs`, runs.why[run] ? `: ${runs.why[run]}` : "", "."),
      runs.url[run] ? make("p", {}, link(runs.url[run])) : null, repeat(runs, run));
  }

  // The settings in which pinned points differ, and the first one's accuracy against each other one's.
  comparePinned(pins) {
    const { view } = this, { table, measured } = view, { points } = table;
    const differing = table.keys.filter(({ name }) => new Set(pins.map((i) => String(points.values[name][i]))).size > 1);
    const row = (name, text) => make("tr", {}, make("th", { scope: "row" }, name), pins.map((i) => make("td", { class: "number" }, text(i))));
    const [base, ...others] = pins;
    const tests = others.map((i) => {
      const apart = welch(measured.values[i], measured.values[base]);
      const together = paired(measured.seeds[i], measured.values[i], measured.seeds[base], measured.values[base]);
      return make("p", {}, make("strong", {}, points.label[i]), " against ", make("strong", {}, points.label[base]), ": ", describeTests(apart, together));
    });
    return make("div", { class: "compare" }, make("h3", {}, `${pins.length} pinned points`),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "pinned points side by side" }, make("table", {},
        make("thead", {}, make("tr", {}, make("td"), pins.map((i) => make("th", { scope: "col" }, points.label[i], " ", make("button", { type: "button", class: "small", "data-unpin": i, "aria-label": `unpin ${points.label[i]}` }, "×"))))),
        make("tbody", {}, differing.map(({ name }) => row(name, (i) => formatValue(points.values[name][i]))),
          row("MACs", (i) => formatX("macs", points.macs[i])), row("accuracy %", (i) => formatAccuracy(measured, i))))), tests);
  }

  drawCurves(lines, curves, details) {
    const { state, table } = this.view, metric = state.values.curve;
    const select = make("select", { id: "explorer-curve", "aria-label": "curve", onchange: (event) => state.set({ curve: event.target.value }) },
      Object.entries(CURVES).map(([value, text]) => make("option", { value, selected: value === metric }, text)));
    const series = lines.map(({ label, runs }, n) => ({
      label, colour: LINES[n % LINES.length],
      runs: runs.map((run) => {
        const full = details[table.runs.id[run]];
        const scale = table.curves.scales[table.curves.metrics.indexOf(metric)];
        const source = full?.curves?.[metric] ? { epochs: full.epochs, values: full.curves[metric].map((v) => (v === null ? NaN : v / scale)) } : { epochs: curves[run].epochs, values: curves[run][metric] };
        return source.epochs.map((epoch, k) => [epoch, source.values[k]]).filter(([, value]) => value !== null && Number.isFinite(value));
      }).filter((points) => points.length),
    })).filter(({ runs }) => runs.length);
    const isSampled = lines.some(({ runs }) => runs.some((run) => !details[table.runs.id[run]] && table.runs.epoch[run] > table.curves.points));
    const head = make("div", { class: "bar" }, make("h3", {}, "Curves"), select);
    if (!series.length) return make("div", {}, head, make("p", { class: "hint" }, "These runs have no such values."));
    return make("div", { class: "curves" }, head, drawLines(series, CURVES[metric], metric.endsWith("acc")), legend(series), curveTable(series, metric.endsWith("acc")),
      isSampled ? make("p", { class: "hint" }, `At ${table.curves.points} epochs of each run. Full curves: those of the front, of the best, and of \`cifar report --keep RUN\`; \`cifar report --serve\` has all.`) : null);
  }

  drawDetails(run, details) {
    if (!details) return [make("p", { class: "hint" }, "Heat maps and the confusion matrix are kept for the front and the best 30 points; `cifar report --keep RUN` keeps those of a run, and `cifar report --serve` has all.")];
    const parts = Object.values(details.heat).map((heat) => drawHeat(heat));
    if (details.confusion) parts.push(drawConfusion(details.confusion));
    return parts.length ? [make("div", { class: "pair" }, parts)] : [];
  }
}

export function describeTests(apart, together) {
  const points = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(100 * value).toFixed(2)}`;
  const interval = ({ difference, half }) => `${points(difference - half)} to ${points(difference + half)}`;
  const p = (value) => (value < 0.001 ? "p < 0.001" : `p = ${value.toFixed(3)}`);
  const sentences = [`${points(apart.difference)} points`];
  if (Number.isFinite(apart.half)) sentences.push(` (95 % interval ${interval(apart)}, Welch, ${p(apart.p)})`);
  else sentences.push("; an interval needs two seeds and more on both sides");
  if (together.n > 1 && Number.isFinite(together.half)) sentences.push(`; over the ${together.n} seeds that both have ${points(together.difference)} (${interval(together)}, paired t-test, ${p(together.p)})`);
  return `${sentences.join("")}.`;
}

const repeat = (runs, run) => make("p", { class: "repeat" }, make("code", {}, runs.command[run]), " ",
  make("button", { type: "button", class: "small", "data-copy": runs.command[run] }, "copy"), make("br"), make("span", { class: "hint" }, runs.folder[run]));
const link = (url) => (/^https?:/.test(url) ? make("a", { href: url, rel: "noreferrer noopener", target: "_blank" }, "open") : "–");

function drawLines(series, label, isAccuracy) {
  const width = 620, height = 260, margin = { left: 54, right: 12, top: 10, bottom: 34 };
  const all = series.flatMap(({ runs }) => runs.flat());
  const x = scaleLinear().domain(extent(all, ([epoch]) => epoch)).range([margin.left, width - margin.right]);
  const y = scaleLinear().domain(extent(all, ([, value]) => value)).nice().range([height - margin.bottom, margin.top]);
  const format = isAccuracy ? (value) => formatPercent(value, 0) : formatValue;
  const grid = y.ticks(5).flatMap((tick) => [
    make("svg:line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick) }),
    make("svg:text", { x: margin.left - 8, y: y(tick), dy: "0.32em", "text-anchor": "end" }, format(tick))]);
  const epochs = x.ticks(8).filter(Number.isInteger).map((tick) => make("svg:text", { x: x(tick), y: height - margin.bottom + 16, "text-anchor": "middle" }, String(tick)));
  const lines = series.flatMap(({ runs, colour }) => {
    const { epochs: at, low, high, middle } = band(runs);
    const edge = at.map((epoch, i) => `${x(epoch)},${y(high[i])}`).concat(at.map((epoch, i) => `${x(epoch)},${y(low[i])}`).reverse()).join(" ");
    return [runs.length > 1 ? make("svg:polygon", { points: edge, fill: colour, "fill-opacity": 0.18 }) : null,
      make("svg:polyline", { points: at.map((epoch, i) => `${x(epoch)},${y(middle[i])}`).join(" "), fill: "none", stroke: colour, "stroke-width": 2 })].filter(Boolean);
  });
  return make("svg:svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${label} by epoch; the values are in the table below` },
    grid, epochs, make("svg:text", { x: (margin.left + width) / 2, y: height - 3, "text-anchor": "middle" }, "epoch"), lines);
}

// Mean, smallest and largest value of the seeds at each epoch that any of them has.
function band(runs) {
  const by = new Map();
  for (const run of runs) for (const [epoch, value] of run) by.has(epoch) ? by.get(epoch).push(value) : by.set(epoch, [value]);
  const most = Math.max(...[...by.values()].map((values) => values.length));
  const epochs = [...by.keys()].filter((epoch) => by.get(epoch).length === most || runs.length === 1).sort((a, b) => a - b), values = epochs.map((epoch) => by.get(epoch));
  return { epochs, low: values.map((v) => Math.min(...v)), high: values.map((v) => Math.max(...v)), middle: values.map((v) => v.reduce((a, b) => a + b, 0) / v.length) };
}

const legend = (series) => make("ul", { class: "legend" }, series.map(({ label, colour, runs }) =>
  make("li", {}, make("span", { class: "swatch", style: `background:${colour}` }), `${label}${runs.length > 1 ? ` (mean and range of ${runs.length} seeds)` : ""}`)));

function curveTable(series, isAccuracy) {
  const bands = series.map(({ runs }) => band(runs)), epochs = [...new Set(bands.flatMap(({ epochs: e }) => e))].sort((a, b) => a - b);
  const picked = epochs.length > 12 ? epochs.filter((_, i) => i % Math.ceil(epochs.length / 12) === 0 || i === epochs.length - 1) : epochs;
  const cell = (b, epoch) => { const i = b.epochs.indexOf(epoch); return i < 0 ? "–" : isAccuracy ? formatPercent(b.middle[i]) : formatValue(b.middle[i]); };
  return make("details", {}, make("summary", {}, "as a table"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "curves as a table" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "epoch"), series.map(({ label }) => make("th", { scope: "col" }, label)))),
    make("tbody", {}, picked.map((epoch) => make("tr", {}, make("th", { scope: "row" }, String(epoch)), bands.map((b) => make("td", { class: "number" }, cell(b, epoch)))))))));
}

function drawHeat({ label, layers, epochs, low, high, cells }) {
  const bytes = Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0)), canvas = make("canvas", { width: epochs.length, height: layers.length, role: "img", "aria-label": `${label} by layer and epoch; first and last values are in the table below` });
  const context = canvas.getContext("2d"), image = context.createImageData(epochs.length, layers.length);
  bytes.forEach((value, at) => image.data.set(value ? [...viridis((value - 1) / 254), 255] : [128, 128, 128, 60], 4 * at));
  context.putImageData(image, 0, 0);
  const read = (at) => (bytes[at] ? formatValue(10 ** (low + ((bytes[at] - 1) / 254) * (high - low))) : "–");
  const rows = layers.map((layer, r) => make("tr", {}, make("th", { scope: "row" }, layer), make("td", { class: "number" }, read(r * epochs.length)), make("td", { class: "number" }, read((r + 1) * epochs.length - 1))));
  const info = make("p", { class: "hint readout" }, `${layers[0]} is at the top, ${layers.at(-1)} at the bottom; epoch ${epochs[0]} to ${epochs.at(-1)}`);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), c = Math.min(epochs.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * epochs.length))), r = Math.min(layers.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * layers.length)));
    info.textContent = `${layers[r]}, epoch ${epochs[c]}: ${read(r * epochs.length + c)}`;
  });
  return make("figure", { class: "heat" }, make("figcaption", {}, `${label}, layer × epoch`), canvas,
    make("p", { class: "scale" }, formatValue(10 ** low), make("span", { class: "ramp" }), formatValue(10 ** high), " (log)"), info,
    make("details", {}, make("summary", {}, "as a table"), make("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `${label} as a table` }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), make("th", { scope: "col" }, `epoch ${epochs[0]}`), make("th", { scope: "col" }, `epoch ${epochs.at(-1)}`))), make("tbody", {}, rows)))));
}

function drawConfusion({ classes, counts, split }) {
  const totals = counts.map((row) => row.reduce((a, b) => a + b, 0));
  const share = (r, c) => (totals[r] ? counts[r][c] / totals[r] : NaN);
  return make("figure", { class: "confusion" }, make("figcaption", {}, `Confusion, % of each true class (${split === "test" ? "test" : "validation"} images)`),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "confusion matrix" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "true \\ said"), classes.map((name) => make("th", { scope: "col", class: "slant" }, make("span", {}, name))))),
      make("tbody", {}, classes.map((name, r) => make("tr", {}, make("th", { scope: "row" }, name), classes.map((_, c) => {
        const value = share(r, c);
        return make("td", { class: r === c ? "number right" : "number", style: `--share:${Math.round(100 * (r === c ? value : Math.min(1, 6 * value)) || 0)}%` }, Number.isFinite(value) ? (100 * value).toFixed(value > 0.0995 || !value ? 0 : 1) : "–");
      })))))));
}

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
export function viridis(t) {
  const at = Math.min(Math.max(t, 0), 1) * 4, k = Math.min(3, Math.floor(at)), f = at - k;
  return STOPS[k].map((value, i) => Math.round(value + f * (STOPS[k + 1][i] - value)));
}
