// What is known of the chosen point: its runs, curves with the band of its seeds, heat maps, confusion, the command.

import { extent } from "d3-array";
import { scaleLinear } from "d3-scale";
import { loadCurves, loadDetails } from "./data.js";
import { copyText, keepFocus, make } from "./dom.js";
import { formatAccuracy, formatP, formatPercent, formatPoints, formatSeconds, formatValue, formatX } from "./format.js";
import { SvgPen, paintBanner, readTheme } from "./pen.js";
import { paired, welch } from "./stats.js";

const CURVES = { "val/acc": "validation accuracy", "train/acc": "training accuracy", "val/loss": "validation loss", "train/loss": "training loss" };
const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9a8700", "#808890"];

export class Detail {
  constructor(view, root) {
    this.view = view;
    this.root = root;
    root.addEventListener("click", async (event) => {
      const { copy, run, pin, unpin } = event.target.dataset;
      if (copy !== undefined) {
        event.target.textContent = (await copyText(copy)) ? "copied" : "cannot copy here";
      }
      if (run !== undefined) view.selectRun(Number(run));
      if (pin !== undefined) view.togglePin(Number(pin));
      if (unpin !== undefined) view.togglePin(Number(unpin));
    });
  }

  async draw() {
    const { view } = this, { table } = view;
    const turn = this.turn = {}; // a later call of draw makes this one stop
    const points = [...new Set([...view.pinned, view.selected].filter((i) => i >= 0))], alone = view.selectedRun;
    if (!points.length && alone < 0) {
      this.root.replaceChildren(make("p", { class: "hint" }, "Choose a point in the plot or the table: its seeds, curves, gradients, mistakes and command appear here."));
      return;
    }
    const wanted = (alone >= 0 ? [alone] : points.flatMap((i) => table.runsOf[i])).map((run) => table.runs.id[run]);
    const [curves, details] = await Promise.all([loadCurves(table), loadDetails(wanted)]);
    if (this.turn !== turn) return;
    const parts = [];
    if (alone >= 0) parts.push(this.describeRun(alone));
    else if (view.selected >= 0) parts.push(this.describePoint(view.selected));
    if (view.compared.length) parts.push(this.comparePinned(view.compared));
    const lines = alone >= 0 ? [{ label: table.runs.name[alone], runs: [alone] }]
      : points.map((i) => ({ label: table.points.label[i], runs: table.runsOf[i] }));
    parts.push(this.drawCurves(lines, curves, details));
    const shownRun = alone >= 0 ? alone : view.selected >= 0 ? table.runsOf[view.selected].find((run) => details[table.runs.id[run]]) ?? table.runsOf[view.selected][0] : undefined;
    if (shownRun !== undefined) parts.push(...this.drawDetails(shownRun, details[table.runs.id[shownRun]]));
    keepFocus(this.root, () => this.root.replaceChildren(...parts));
  }

  describePoint(i) {
    const { table, measured } = this.view, { points, runs } = table, first = table.runsOf[i][0];
    const rows = table.runsOf[i].map((run) => make("tr", {},
      make("td", {}, make("button", { type: "button", class: "open", "data-run": run }, runs.id[run])), make("td", { class: "number" }, formatValue(runs.seed[run])),
      make("td", { class: "number" }, formatPercent(runs.val[run] ?? NaN)), make("td", { class: "number" }, formatPercent(runs.test[run] ?? NaN)),
      make("td", { class: "number" }, formatSeconds(runs.seconds[run] ?? NaN)), make("td", {}, link(runs.url[run]))));
    const head = ["run", "seed", "val acc %", "test acc %", "time", "W&B"].map((name, n) => make("th", { scope: "col", class: n > 0 && n < 5 ? "number" : null }, name));
    return make("div", { class: "about" },
      make("div", { class: "bar" }, make("h3", {}, points.label[i]), make("button", { type: "button", class: "small", "data-pin": i, "aria-pressed": String(this.view.pinned.includes(i)) }, this.view.pinned.includes(i) ? "pinned" : "pin to compare")),
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
    const differing = [...table.keys.map(({ name }) => name), ...table.also].filter((name) => new Set(pins.map((i) => String(points.values[name][i]))).size > 1);
    const row = (name, text) => make("tr", {}, make("th", { scope: "row" }, name), pins.map((i) => make("td", { class: "number" }, text(i))));
    const [base, ...others] = pins;
    const tests = others.map((i) => {
      const apart = welch(measured.values[i], measured.values[base]);
      const together = paired(measured.seeds[i], measured.values[i], measured.seeds[base], measured.values[base]);
      return make("p", {}, make("strong", {}, points.label[i]), " against ", make("strong", {}, points.label[base]), ": ", describeTests(apart, together));
    });
    return make("div", { class: "compare" }, make("h3", {}, `${pins.length} points compared`),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "pinned points side by side" }, make("table", {},
        make("thead", {}, make("tr", {}, make("td"), pins.map((i) => make("th", { scope: "col" }, points.label[i], " ", view.pinned.includes(i) ? make("button", { type: "button", class: "small", "data-unpin": i, "aria-label": `unpin ${points.label[i]}` }, "×") : null)))),
        make("tbody", {}, differing.map((name) => row(name, (i) => formatValue(points.values[name][i]))),
          row("MACs", (i) => formatX("macs", points.macs[i])), row("parameters", (i) => formatX("params", points.params[i])), row("accuracy", (i) => formatAccuracy(measured, i))))), tests);
  }

  drawCurves(lines, curves, details) {
    const { state, table } = this.view;
    const read = (run, metric) => {
      const full = details[table.runs.id[run]];
      const scale = table.curves.scales[table.curves.metrics.indexOf(metric)];
      const source = full?.curves?.[metric] ? { epochs: full.epochs, values: addUp(full.curves[metric]).map((v) => v / scale) } : { epochs: curves[run].epochs, values: curves[run][metric] };
      return source.epochs.map((epoch, k) => [epoch, source.values[k]]).filter(([, value]) => value !== null && Number.isFinite(value));
    };
    // Runs on all images have no curves of validation: then another curve is shown, and those are not offered.
    const known = Object.keys(CURVES).filter((metric) => lines.some(({ runs }) => runs.some((run) => read(run, metric).length)));
    const metric = known.includes(state.values.curve) ? state.values.curve : known[0];
    const select = make("select", { id: "explorer-curve", "aria-label": "curve", onchange: (event) => state.set({ curve: event.target.value }) },
      known.map((value) => make("option", { value, selected: value === metric }, CURVES[value])));
    const series = lines.map(({ label, runs }, n) => ({
      label, colour: LINES[n % LINES.length], runs: runs.map((run) => read(run, metric)).filter((points) => points.length),
    })).filter(({ runs }) => runs.length);
    const isSampled = lines.some(({ runs }) => runs.some((run) => !details[table.runs.id[run]] && table.runs.epoch[run] > table.curves.points));
    this.chart = series.length ? { series, label: CURVES[metric], isAccuracy: metric.endsWith("acc") } : null;
    const save = (kind) => make("button", { type: "button", class: "small", "data-save": kind, "data-figure": "curves", "aria-label": `curves as ${kind.toUpperCase()}` }, kind.toUpperCase());
    const head = make("div", { class: "bar" }, make("h3", {}, "Curves"), series.length ? [select, save("svg"), save("png")] : null);
    if (!series.length) return make("div", {}, head, make("p", { class: "hint" }, "These runs have no curves."));
    return make("div", { class: "curves" }, head, drawLines(this.chart, Math.min(620, Math.max(300, this.root.clientWidth))), legend(series), curveTable(series, metric.endsWith("acc")),
      isSampled ? make("p", { class: "hint" }, `At ${table.curves.points} epochs of each run. Full curves: those of the front, of the best, and of \`cifar report --keep RUN\`; \`cifar report --serve\` has all.`) : null);
  }

  toSvg() {
    const width = 820, height = 400 + 18 * this.chart.series.length, pen = new SvgPen(width, height);
    pen.rect(0, 0, width, height, { fill: readTheme().paper });
    paintLines(pen, this.chart, { width, height: 380 }, readTheme());
    this.chart.series.forEach(({ label, colour, runs }, n) => {
      pen.rect(62, 391 + 18 * n, 18, 4, { fill: colour });
      pen.text(88, 397 + 18 * n, describeSeries(label, runs), { fill: readTheme().ink, size: 12 });
    });
    paintBanner(pen, this.view.table.banner);
    return String(pen);
  }

  drawDetails(run, details) {
    if (!details) return [make("p", { class: "hint" }, "Heat maps and the confusion matrix are kept for the front and the best 30 points; `cifar report --keep RUN` keeps those of a run, and `cifar report --serve` has all.")];
    const { runs } = this.view.table, of = ` · ${runs.id[run]}`, parts = Object.values(details.heat ?? {}).map((heat) => drawHeat(heat, of));
    if (details.confusion) parts.push(drawConfusion(details.confusion, of), drawClasses(details.confusion, details.mistakes, of));
    return parts.length ? parts : [make("p", { class: "hint" }, `The run ${runs.id[run]} has noted no gradients by layer and no predictions.`)];
  }
}

export function describeTests(apart, together) {
  const points = formatPoints, p = formatP;
  const interval = ({ difference, half }) => `${points(difference - half)} to ${points(difference + half)}`;
  if (!Number.isFinite(apart.difference)) return "one of them has no such accuracy.";
  const sentences = [`${points(apart.difference)} points`];
  if (Number.isFinite(apart.half)) sentences.push(` (95 % interval ${interval(apart)}, Welch, ${p(apart.p)})`);
  else if (apart.isFlat) sentences.push("; the seeds of each do not differ, so there is no interval");
  else sentences.push("; an interval needs two seeds and more on both sides");
  if (together.n > 1 && Number.isFinite(together.half)) sentences.push(`; over the ${together.n} seeds that both have ${points(together.difference)} (${interval(together)}, paired t-test, ${p(together.p)})`);
  return `${sentences.join("")}.`;
}

const repeat = (runs, run) => runs.command[run] && make("p", { class: "repeat" }, make("code", {}, runs.command[run]), " ",
  make("button", { type: "button", class: "small", "data-copy": runs.command[run] }, "copy"), make("br"), make("span", { class: "hint" }, runs.folder[run]));
const link = (url) => (/^https?:/.test(url) ? make("a", { href: url, rel: "noreferrer noopener", target: "_blank" }, "open") : "–");

const LINE_MARGIN = { left: 54, right: 14, top: 26, bottom: 36 };

function lineScales({ series }, { width, height }) {
  const all = series.flatMap(({ runs }) => runs.flat()), { left, right, top, bottom } = LINE_MARGIN;
  const x = scaleLinear().domain(extent(all, ([epoch]) => epoch)).range([left, width - right]);
  const y = scaleLinear().domain(extent(all, ([, value]) => value)).nice().range([height - bottom, top]);
  return { x, y };
}

// The curves with the bands of their seeds, by either pen.
function paintLines(pen, chart, size, theme) {
  const { series, label, isAccuracy } = chart, { x, y } = lineScales(chart, size), { width, height } = size, { left, right, bottom } = LINE_MARGIN;
  for (const tick of y.ticks(5)) {
    pen.path((c) => { c.moveTo(left, y(tick)); c.lineTo(width - right, y(tick)); }, { stroke: theme.line });
    pen.text(left - 8, y(tick), isAccuracy ? formatPercent(tick, y.domain()[1] - y.domain()[0] < 0.05 ? 1 : 0) : formatValue(tick), { fill: theme.muted, size: 11, anchor: "end", baseline: "middle" });
  }
  for (const tick of x.ticks(width < 450 ? 5 : 8).filter(Number.isInteger)) pen.text(x(tick), height - bottom + 16, String(tick), { fill: theme.muted, size: 11, anchor: "middle" });
  pen.text((left + width - right) / 2, height - 4, "epoch", { fill: theme.muted, size: 11, anchor: "middle" });
  pen.text(left - 8, 14, `${label}${isAccuracy ? ", %" : ""}`, { fill: theme.muted, size: 11 });
  for (const { runs, colour } of series) {
    const { epochs: at, low, high, middle } = band(runs);
    if (runs.length > 1) pen.path((c) => {
      at.forEach((epoch, i) => (i ? c.lineTo(x(epoch), y(high[i])) : c.moveTo(x(epoch), y(high[i]))));
      for (let i = at.length - 1; i >= 0; i--) c.lineTo(x(at[i]), y(low[i]));
      c.closePath();
    }, { fill: colour, alpha: 0.18, name: "band" });
    if (at.length === 1) pen.path((c) => c.arc(x(at[0]), y(middle[0]), 3, 0, 2 * Math.PI), { fill: colour, name: "line" });
    else pen.path((c) => at.forEach((epoch, i) => (i ? c.lineTo(x(epoch), y(middle[i])) : c.moveTo(x(epoch), y(middle[i])))), { stroke: colour, width: 2, name: "line" });
  }
}

// The same as an element of the page. Under the pointer, it reads out the values of the nearest epoch.
function drawLines(chart, width) {
  const size = { width, height: 290 }, pen = new SvgPen(size.width, size.height), { series, label, isAccuracy } = chart;
  paintLines(pen, chart, size, { line: "var(--line)", muted: "var(--muted)" });
  const svg = new DOMParser().parseFromString(String(pen), "image/svg+xml").documentElement;
  for (const [name, value] of Object.entries({ class: "chart", role: "img", "aria-label": `${label} by epoch; the values are in the table below` })) svg.setAttribute(name, value);
  svg.removeAttribute("width");
  svg.removeAttribute("height");
  const readout = make("p", { class: "hint readout" }), { x } = lineScales(chart, size), bands = series.map(({ runs }) => band(runs));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = x.invert(((event.clientX - box.left) / box.width) * size.width);
    const texts = bands.map(({ epochs, middle }, n) => {
      if (!epochs.length) return "";
      const k = epochs.reduce((best, epoch, i) => (Math.abs(epoch - at) < Math.abs(epochs[best] - at) ? i : best), 0);
      return `${bands.length > 1 ? `${series[n].label}: ` : ""}epoch ${epochs[k]}, ${isAccuracy ? `${formatPercent(middle[k])} %` : formatValue(middle[k])}`;
    });
    readout.textContent = texts.filter(Boolean).join("; ");
  });
  return [svg, readout];
}

// Differences to the known value before -> values; NaN: no value.
function addUp(differences) {
  let sum = 0;
  return differences.map((difference) => (difference === null ? NaN : (sum += difference)));
}

// Mean, smallest and largest value of the seeds, at each epoch that most of them have.
function band(runs) {
  const by = new Map();
  for (const run of runs) for (const [epoch, value] of run) by.has(epoch) ? by.get(epoch).push(value) : by.set(epoch, [value]);
  const most = Math.max(...[...by.values()].map((values) => values.length));
  const epochs = [...by.keys()].filter((epoch) => by.get(epoch).length === most || runs.length === 1).sort((a, b) => a - b), values = epochs.map((epoch) => by.get(epoch));
  return { epochs, low: values.map((v) => Math.min(...v)), high: values.map((v) => Math.max(...v)), middle: values.map((v) => v.reduce((a, b) => a + b, 0) / v.length) };
}

const legend = (series) => make("ul", { class: "legend" }, series.map(({ label, colour, runs }) =>
  make("li", {}, make("span", { class: "swatch", style: `background:${colour}` }), describeSeries(label, runs))));
const describeSeries = (label, runs) => `${label}${runs.length > 1 ? ` (mean and range of ${runs.length} seeds)` : ""}`;

function curveTable(series, isAccuracy) {
  const bands = series.map(({ runs }) => band(runs)), epochs = [...new Set(bands.flatMap(({ epochs: e }) => e))].sort((a, b) => a - b);
  const picked = epochs.length > 12 ? epochs.filter((_, i) => i % Math.ceil(epochs.length / 12) === 0 || i === epochs.length - 1) : epochs;
  const cell = (b, epoch) => { const i = b.epochs.indexOf(epoch); return i < 0 ? "–" : isAccuracy ? formatPercent(b.middle[i]) : formatValue(b.middle[i]); };
  return make("details", {}, make("summary", {}, "as a table"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "curves as a table" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "epoch"), series.map(({ label }) => make("th", { scope: "col" }, label)))),
    make("tbody", {}, picked.map((epoch) => make("tr", {}, make("th", { scope: "row" }, String(epoch)), bands.map((b) => make("td", { class: "number" }, cell(b, epoch)))))))));
}

function drawHeat({ label, layers, epochs, low, high, cells }, of) {
  const picked = [...new Set(Array.from({ length: 7 }, (_, k) => Math.round((k * (epochs.length - 1)) / 6)))]; // columns of the table
  const bytes = Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0)), canvas = make("canvas", { width: epochs.length, height: layers.length, role: "img", "aria-label": `${label} by layer and epoch; values are in the table below` });
  const context = canvas.getContext("2d"), image = context.createImageData(epochs.length, layers.length);
  bytes.forEach((value, at) => image.data.set(value ? [...viridis((value - 1) / 254), 255] : [128, 128, 128, 60], 4 * at));
  context.putImageData(image, 0, 0);
  const read = (at) => (bytes[at] ? formatValue(10 ** (low + ((bytes[at] - 1) / 254) * (high - low))) : "–");
  const rows = layers.map((layer, r) => make("tr", {}, make("th", { scope: "row" }, layer), picked.map((c) => make("td", { class: "number" }, read(r * epochs.length + c)))));
  const info = make("p", { class: "hint readout" }, `${layers[0]} is at the top, ${layers.at(-1)} at the bottom; epoch ${epochs[0]} to ${epochs.at(-1)}`);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), c = Math.min(epochs.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * epochs.length))), r = Math.min(layers.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * layers.length)));
    info.textContent = `${layers[r]}, epoch ${epochs[c]}: ${read(r * epochs.length + c)}`;
  });
  return make("figure", { class: "heat" }, make("figcaption", {}, `${label}, layer × epoch`, make("span", { class: "of" }, of)), canvas,
    make("p", { class: "scale" }, formatValue(10 ** low), make("span", { class: "ramp" }), formatValue(10 ** high), " (log)"), info,
    make("details", {}, make("summary", {}, "as a table"), make("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `${label} as a table` }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), picked.map((c) => make("th", { scope: "col", class: "number" }, `epoch ${epochs[c]}`)))), make("tbody", {}, rows)))));
}

function drawConfusion({ classes, counts, split }, of) {
  const totals = counts.map((row) => row.reduce((a, b) => a + b, 0));
  const share = (r, c) => (totals[r] ? counts[r][c] / totals[r] : NaN);
  return make("figure", { class: "confusion" }, make("figcaption", {}, `Confusion, % of each true class, ${split === "test" ? "test" : "validation"} images`, make("span", { class: "of" }, of)),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "confusion matrix" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "true \\ said"), classes.map((name) => make("th", { scope: "col", class: "slant" }, make("span", {}, name))))),
      make("tbody", {}, classes.map((name, r) => make("tr", {}, make("th", { scope: "row" }, name), classes.map((_, c) => {
        const value = share(r, c);
        return make("td", { class: r === c ? "number right" : "number", style: `--share:${Math.round(100 * (r === c ? value : Math.min(1, 6 * value)) || 0)}%` }, Number.isFinite(value) ? (100 * value).toFixed(value > 0.0995 || !value ? 0 : 1) : "–");
      })))))));
}

// Accuracy of each class as a bar with its number, and the worst mistakes as pictures.
function drawClasses({ classes, counts }, mistakes, of) {
  const rows = classes.map((name, r) => ({ name, right: counts[r][r], total: counts[r].reduce((a, b) => a + b, 0) })).filter(({ total }) => total);
  const bars = rows.map(({ name, right, total }) => make("li", {}, make("span", {}, name), make("span", { class: "track", "aria-hidden": "true" }, make("span", { class: "share", style: `width:${((100 * right) / total).toFixed(1)}%` })),
    make("span", { class: "value" }, `${formatPercent(right / total, 1)} %`, make("span", { class: "of" }, ` of\u00a0${total}`))));
  const pictures = mistakes?.pixels ? drawMistakes(classes, mistakes) : [];
  return make("figure", { class: "classes" }, make("figcaption", {}, "Accuracy of each class", make("span", { class: "of" }, of)), make("ul", { class: "bars" }, bars), pictures);
}

// The pictures travel side by side in one image.
function drawMistakes(classes, mistakes) {
  const strip = new Image(), canvases = mistakes.true.map(() => make("canvas", { class: "picture", width: 32, height: 32, "aria-hidden": "true" }));
  strip.src = `data:image/webp;base64,${mistakes.pixels}`;
  strip.decode().then(() => canvases.forEach((canvas, n) => canvas.getContext("2d").drawImage(strip, 32 * n, 0, 32, 32, 0, 0, 32, 32))).catch(() => {});
  return [make("figcaption", {}, "Worst mistakes"), make("ul", { class: "mistakes" }, mistakes.true.map((label, n) => make("li", {},
    canvases[n],
    make("span", {}, make("strong", {}, classes[label]), make("span", { class: "of" }, ` taken for ${classes[mistakes.predicted[n]]}, ${formatPercent(mistakes.confidence[n], 0)}\u00a0%`)))))];
}

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
export function viridis(t) {
  const at = Math.min(Math.max(t, 0), 1) * 4, k = Math.min(3, Math.floor(at)), f = at - k;
  return STOPS[k].map((value, i) => Math.round(value + f * (STOPS[k + 1][i] - value)));
}
