// The explorer of the report page. One state, one set of shown points; each part draws itself from these.

import { X_AXES, Y_AXES, findFront, listX, listY, loadCurves, loadDetails, loadTable, measure, normalise, readAccuracy, watchServer } from "./data.js";
import { Compare } from "./compare.js";
import { Controls } from "./controls.js";
import { Detail, describeTests, viridis } from "./detail.js";
import { copyText, csvCell, download, keepFocus, make, own, rasterise } from "./dom.js";
import { Effect, measureEffect } from "./effect.js";
import { formatValue } from "./format.js";
import { Parallel } from "./parallel.js";
import { COLOURS, LIGHT_COLOURS } from "./pen.js";
import { Scatter, describePoint } from "./scatter.js";
import { DEFAULTS, State } from "./state.js";
import { meanDifference, paired, spearman, tQuantile, tTail, welch } from "./stats.js";
import { Table } from "./table.js";

const VIEW_KEYS = ["selected", "pins", "sort", "descending", "differing", "list", "curve", "zoom", "colour"]; // these filter nothing

class View {
  constructor(table) {
    this.table = table;
    const xs = listX(table), ys = listY(table);
    const y = ys.includes(table.split) ? table.split : ys[0] ?? "val";
    this.state = new State({ x: xs.includes(table.x) ? table.x : xs[0] ?? "macs", y, budget: table.budget ?? null }, (key, value) => ({
      x: () => xs.includes(value), y: () => ys.includes(value), list: () => ["points", "apart"].includes(value), curve: () => table.curves.metrics.includes(value),
      colour: () => ["family", "model"].includes(value) || table.keys.some(({ name }) => name === value),
    })[key]?.() ?? true);
    this.byRun = new Map();
    table.runsOf.forEach((runs, i) => runs.forEach((run) => this.byRun.set(table.runs.id[run], i)));
    this.runNumber = new Map(table.runs.id.map((id, run) => [id, run]));
    this.dragFilters = false;
    this.isPaper = false;
    this.quantiles = new Map();
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.updateAll();
  }

  // -- what follows from the state --

  updateAll() { this.updateMeasures(); this.updateShown(); this.updateChosen(); this.updateColours(); }

  updateMeasures() {
    const { x, y } = this.state.values;
    const quantile = (confidence, df) => { if (!this.quantiles.has(df)) this.quantiles.set(df, tQuantile(confidence, df)); return this.quantiles.get(df); };
    this.measured = measure(this.table, x, y, quantile);
  }

  updateShown() {
    const { table, measured } = this, { points } = table, { text, families, tags, ranges, choices, log } = this.state.values;
    const words = normalise(text).split(/\s+/).filter(Boolean), allowed = families && new Set(families), wanted = tags.filter((tag) => table.tags.includes(tag));
    const tests = [];
    for (const [key, [low, high]] of Object.entries(ranges)) {
      const values = this.valuesOf(key);
      if (values) tests.push((i) => values[i] !== null && (low === null || values[i] >= low) && (high === null || values[i] <= high));
    }
    for (const [key, list] of Object.entries(choices)) {
      const values = own(points.values, key), set = new Set(list.map(String));
      if (values) tests.push((i) => values[i] !== null && set.has(String(values[i])));
    }
    if (allowed) tests.push((i) => allowed.has(points.family[i]));
    if (wanted.length) tests.push((i) => wanted.some((tag) => table.tagsOf[i].has(tag)));
    if (words.length) tests.push((i) => words.every((word) => table.texts[i].includes(word)));
    this.isShown = new Uint8Array(table.count);
    this.shown = [];
    this.numUnplaced = 0; // points that no filter hides, without a place on these axes
    for (let i = 0; i < table.count; i++) {
      if (!tests.every((test) => test(i))) continue;
      const hasPlace = Number.isFinite(measured.y[i]) && (log ? measured.x[i] > 0 : Number.isFinite(measured.x[i]));
      if (!hasPlace) { this.numUnplaced++; continue; }
      this.isShown[i] = 1;
      this.shown.push(i);
    }
    this.apart = table.apart.filter((run) => words.every((word) => table.apartTexts.get(run).includes(word)) && (!wanted.length || wanted.some((tag) => table.runs.tags[run].includes(table.tags.indexOf(tag)))));
    this.front = findFront(measured, this.isShown);
    this.isFront = new Uint8Array(table.count);
    this.front.forEach((i) => { this.isFront[i] = 1; });
    this.isFiltered = tests.length > 0;
    this.varying = null;
  }

  // The values of what a range is of: an axis ("x:macs", "y:val"), whichever is drawn, or a setting.
  valuesOf(key) {
    const { table } = this, axis = key.slice(2);
    if (key.startsWith("x:") && own(X_AXES, axis)) return Array.from({ length: table.count }, (_, i) => X_AXES[axis].read(table, i));
    if (key.startsWith("y:") && own(Y_AXES, axis)) return Array.from({ length: table.count }, (_, i) => readAccuracy(table, axis, i));
    return own(table.points.values, key);
  }

  updateChosen() {
    const { selected, pins } = this.state.values;
    this.selected = this.byRun.get(selected) ?? -1;
    this.selectedRun = this.selected < 0 ? this.runNumber.get(selected) ?? -1 : -1;
    this.pinned = [...new Set(pins.map((id) => this.byRun.get(id)).filter((i) => i !== undefined))];
    const alone = this.pinned.length === 1 && this.selected >= 0 && this.selected !== this.pinned[0];
    this.compared = alone ? [...this.pinned, this.selected] : this.pinned.length > 1 ? this.pinned : [];
  }

  updateColours() {
    const { table } = this, { colour } = this.state.values, palette = this.dark.matches && !this.isPaper ? LIGHT_COLOURS : COLOURS;
    const key = table.keys.find(({ name }) => name === colour && name !== "model");
    const families = new Map(table.families.map((name, n) => [name, n]));
    this.shapes = table.points.family.map((name) => (families.get(name) < 7 ? families.get(name) : 7));
    if (key?.number) {
      const values = table.points.values[colour], known = values.filter((v) => v !== null && (!key.log || v > 0)).map((v) => (key.log ? Math.log(v) : v));
      const low = Math.min(...known), high = Math.max(...known);
      this.colours = values.map((v) => (v === null ? "#808890" : `rgb(${viridis(0.92 * (((key.log ? Math.log(v) : v) - low) / (high - low || 1))).join(",")})`));
      const distinct = [...new Set(values.filter((v) => v !== null && (!key.log || v > 0)))].sort((a, b) => a - b);
      const stops = distinct.length <= 8 ? distinct : [low, (low + high) / 2, high].map((v) => Number((key.log ? Math.exp(v) : v).toPrecision(2)));
      const place = (v) => ((key.log ? Math.log(v) : v) - low) / (high - low || 1);
      this.entries = stops.map((v) => ({ name: `${colour} ${formatValue(v)}`, colour: `rgb(${viridis(0.92 * place(v)).join(",")})`, shape: 0 }));
      return;
    }
    const column = colour === "family" ? table.points.family : (colour === "model" ? table.points.model : table.points.values[colour]).map((v) => (v === null ? "–" : String(v)));
    const names = [...new Set(column)], number = new Map(names.map((name, n) => [name, n]));
    this.colours = column.map((name) => palette[Math.min(number.get(name), palette.length - 1)]);
    const shown = names.slice(0, 12).map((name, n) => ({ name, colour: palette[Math.min(n, palette.length - 1)], shape: colour === "family" ? Math.min(n, 7) : 0, family: colour === "family" && names.length > 1 }));
    if (colour === "family") shown.push(...names.slice(12).map((name) => ({ name, colour: palette.at(-1), shape: 7, family: true })));
    else if (names.length > 12) shown.push({ name: `${names.length - 12} more`, colour: palette.at(-1), shape: 0 });
    this.entries = shown;
  }

  colourOf(i) { return this.colours[i]; }
  shapeOf(i) { return this.shapes[i]; }
  legend() { return this.entries; }

  // Whether a key has several values: among all points, or among those that are shown.
  differs(name) { const values = this.table.points.values[name]; return values.some((value) => value !== values[0]); }
  varies(name) {
    this.varying ??= new Map();
    if (!this.varying.has(name)) { const values = this.table.points.values[name], first = values[this.shown[0]]; this.varying.set(name, this.shown.some((i) => values[i] !== first)); }
    return this.varying.get(name);
  }

  // The setting that the plot is about: that of the axis, or else that of the colours.
  settingInView() {
    const { x, colour } = this.state.values, name = x.startsWith("setting:") ? x.slice(8) : colour;
    return this.table.keys.some((key) => key.name === name && name !== "model") ? name : null;
  }

  // The probability of a point to be on the front was computed for MACs and the report's split.
  get hasChances() { const { x, y } = this.state.values; return ["macs", "flops"].includes(x) && y === this.table.split; }

  get isChanged() { return JSON.stringify(this.state.values) !== JSON.stringify(this.state.defaults); }

  // -- what the reader does --

  idOf(i) { return this.table.runs.id[this.table.runsOf[i][0]]; }
  select(i) { this.state.set({ selected: this.idOf(i) }); }
  selectRun(run) { this.state.set({ selected: this.table.runs.id[run] }); }
  togglePin(i) {
    const id = this.idOf(i), { pins } = this.state.values;
    this.state.set({ pins: this.pinned.includes(i) ? pins.filter((pin) => this.byRun.get(pin) !== i) : [...pins, id].slice(-8) });
  }
  // Rows of a file, the heading first, with a column that names the data.
  nameDataset([head, ...rows]) {
    const name = this.table.banner || "CIFAR-10";
    return [[...head, "dataset"], ...rows.map((row) => [...row, name])];
  }

  // What of the view is filtered, in words.
  describeFilters() {
    const { text, families, tags, ranges, choices } = this.state.values;
    const names = [text && `“${text}”`, families && "family", tags.some((tag) => this.table.tags.includes(tag)) && "tag", ...Object.keys(ranges).map((key) => ({ x: X_AXES[key.slice(2)]?.name, y: "accuracy" })[key[1] === ":" ? key[0] : ""] ?? key), ...Object.keys(choices)];
    return names.filter(Boolean).join(", ");
  }

  reset() { this.state.set({ ...this.state.defaults }); }
}

async function start() {
  const root = document.getElementById("explorer");
  if (!root || !document.getElementById("explorer-table")) return;
  const view = new View(await loadTable());
  root.hidden = false;
  document.documentElement.classList.add("explored"); // hides the figures that stand here without scripts
  const controls = new Controls(view, root.querySelector(".controls"));
  const scatter = new Scatter(view, root.querySelector(".scatter"));
  const parallel = new Parallel(view, root.querySelector(".parallel"));
  const table = new Table(view, root.querySelector(".table"));
  const detail = new Detail(view, root.querySelector(".detail"));
  const effect = new Effect(view, root.querySelector(".effect"));
  const compare = new Compare(view, root.querySelector(".compare-bar"));
  const importance = root.querySelector(".importance");
  const parts = { controls, scatter, parallel, table, detail, effect, compare };
  const has = (changed, ...keys) => keys.some((key) => changed.has(key));

  const update = (changed) => keepFocus(root, () => redraw(changed));

  function redraw(changed) {
    if (has(changed, "x", "y")) view.updateMeasures();
    if (has(changed, "x", "y", "log", "text", "families", "tags", "ranges", "choices")) view.updateShown();
    if (has(changed, "selected", "pins")) view.updateChosen();
    if (has(changed, "colour")) view.updateColours();
    const isFilter = [...changed].some((key) => !VIEW_KEYS.includes(key));
    if (isFilter || has(changed, "zoom", "log", "colour", "selected", "pins")) scatter.draw();
    if (isFilter || has(changed, "colour", "selected", "pins")) parallel.draw();
    if (isFilter || has(changed, "sort", "descending", "differing", "list", "selected", "pins")) table.draw();
    if (has(changed, "selected", "pins", "curve", "x", "y")) detail.draw();
    if (isFilter || has(changed, "colour", "log")) effect.draw();
    if (has(changed, "pins", "selected")) compare.draw();
    controls.draw(changed);
    if (importance) importance.querySelector(".of").textContent = view.isFiltered ? "of all runs, whatever is filtered" : "of all runs";
    root.querySelectorAll("[data-list]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.list === view.state.values.list)));
    root.querySelector("[data-unzoom]").hidden = !view.state.values.zoom;
    root.querySelector(".differing").checked = view.state.values.differing;
  }

  view.state.onChange(update);
  // The pages of a print are counted before the styles of paper are those of the page: the rows are there by then.
  const paper = matchMedia("print"), printRows = (isPaper) => { view.isPaper = isPaper; table.draw(); };
  addEventListener("beforeprint", () => printRows(true));
  addEventListener("afterprint", () => printRows(false));
  for (const medium of [view.dark, paper]) medium.addEventListener("change", () => { view.isPaper = paper.matches; view.updateColours(); update(new Set(["colour", "sort"])); });
  root.addEventListener("click", async (event) => {
    const { list, save } = event.target.dataset;
    if (event.target.dataset.unzoom !== undefined) view.state.set({ zoom: null });
    if (list) view.state.set({ list, sort: list === "apart" ? "state" : "front", descending: list !== "apart" });
    if (save === "csv") download("runs.csv", new Blob([view.nameDataset(table.facts()).map((row) => row.map(csvCell).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    if (save === "svg" || save === "png") {
      const [name, draw] = { parallel: ["parallel", () => parallel.toSvg()], curves: ["curves", () => detail.toSvg()] }[event.target.dataset.figure] ?? ["accuracy", () => scatter.toSvg()];
      const svg = draw();
      download(`${name}.${save}`, save === "svg" ? new Blob([svg], { type: "image/svg+xml" }) : await rasterise(svg));
    }
    if (save === "link") {
      view.state.set({});
      const isCopied = await copyText(location.href.split("#")[0] + (view.state.hash ?? location.hash));
      const isFile = location.protocol === "file:";
      root.querySelector(".sent").textContent = !isCopied ? "This browser does not copy here: the address bar has the link." : isFile ? "copied. Send this file with it: opened with what follows the #, it shows the same." : "copied";
    }
  });
  root.querySelector(".differing").addEventListener("change", (event) => view.state.set({ differing: event.target.checked }));
  root.querySelectorAll("input[name=drag]").forEach((input) => input.addEventListener("change", () => { view.dragFilters = input.value === "filter"; }));
  update(new Set(Object.keys(DEFAULTS)));
  watchServer(() => { view.state.writeAddress(); location.reload(); }); // the address keeps what is chosen, the browser keeps the place
  globalThis.explorer = { view, parts, load: { curves: loadCurves, details: loadDetails }, stats: { welch, paired, tQuantile, tTail, spearman, meanDifference }, measureEffect: (key) => measureEffect(view, key), describeTests, describePoint }; // for tests, and for the curious
  document.documentElement.dataset.explorer = "ready";
}

start().catch((error) => {
  const problem = make("p", { class: "hint", role: "alert" }, `The explorer cannot start in this browser (${error.message}); the figures and the table below have the results.`);
  document.getElementById("explorer")?.before(problem);
  document.documentElement.classList.remove("explored");
  console.warn(error);
});
