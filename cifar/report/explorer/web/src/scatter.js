// Accuracy against a cost: the canvas with all points, hover and keyboard, zoom and brush.

import { scaleLinear, scaleLog } from "d3-scale";
import { quadtree } from "d3-quadtree";
import { CanvasPen, SHAPES, SvgPen, paintBanner, readTheme } from "./pen.js";
import { X_AXES, Y_AXES } from "./data.js";
import { formatAccuracy, formatPercent, formatSeconds, formatValue, formatX } from "./format.js";

const MARGIN = { left: 62, right: 22, top: 18, bottom: 46 };
const MANY = 1500; // more points than this are counted in cells, so that a pile shows as a strong place
const CELL = 4; // pixels
const REACH = 22; // pixels from the pointer to the point that it means

export class Scatter {
  constructor(view, root) {
    this.view = view;
    this.root = root;
    this.canvas = root.querySelector("canvas.marks");
    this.overlay = root.querySelector("canvas.overlay");
    this.tip = document.getElementById("explorer-tip");
    this.spoken = document.getElementById("explorer-spoken");
    this.hovered = -1;
    const box = root.querySelector(".plot");
    box.addEventListener("pointermove", (event) => this.move(event));
    box.addEventListener("pointerleave", (event) => { if (!this.drag && event.pointerType !== "touch") this.hover(-1); });
    box.addEventListener("pointerdown", (event) => this.press(event));
    box.addEventListener("pointerup", (event) => this.release(event));
    box.addEventListener("pointercancel", () => { this.drag = null; this.drawOverlay(); });
    box.addEventListener("dblclick", () => view.state.set({ zoom: null }));
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("focus", () => { if (this.hovered < 0 && box.matches(":focus-visible")) this.step(0); });
    box.addEventListener("blur", () => this.hover(-1));
    this.plot = box;
    new ResizeObserver(() => this.draw()).observe(box);
  }

  get size() { return { width: this.plot.clientWidth, height: this.plot.clientHeight }; }

  // The extent of what is shown, with a little room; a zoom has its own.
  scales({ width, height }) {
    const { measured, shown, state } = this.view, { zoom, log } = state.values;
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    const members = shown.length ? shown : Array.from(measured.x.keys());
    for (const i of members) {
      const x = measured.x[i], y = measured.y[i];
      if (!(log ? x > 0 : Number.isFinite(x)) || !Number.isFinite(y)) continue;
      x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
    }
    if (x0 > x1) [x0, x1, y0, y1] = [1, 10, 0, 1];
    if (zoom) [x0, x1, y0, y1] = zoom;
    else {
      const reach = Math.max(0.25 * (y1 - y0), 0.03), [bottom, top] = [y0 - reach, y1 + reach]; // intervals and seeds may widen it so far
      for (const i of this.view.front) {
        const half = measured.half[i], ends = half > 0 ? [measured.y[i] - half, measured.y[i] + half] : measured.values[i];
        y0 = Math.max(bottom, Math.min(y0, ...ends)); y1 = Math.min(top, Math.max(y1, ...ends));
      }
      const pad = Math.max((y1 - y0) * 0.07, 0.004);
      [y0, y1] = [Math.max(0, y0 - pad), Math.min(1, y1 + pad)];
      [x0, x1] = log ? [x0 / 1.15, x1 * 1.15] : [x0 < 0 ? x0 - 0.05 * (x1 - x0) : Math.max(0, x0 - 0.05 * (x1 - x0)), x1 + 0.05 * (x1 - x0) || 1];
    }
    const x = (log ? scaleLog() : scaleLinear()).domain([x0, x1]).range([MARGIN.left, width - MARGIN.right]);
    const y = scaleLinear().domain([y0, y1]).range([height - MARGIN.bottom, MARGIN.top]);
    return { x, y };
  }

  draw() {
    const size = this.size;
    if (!size.width) return;
    const pen = new CanvasPen(this.canvas, size.width, size.height);
    this.current = this.scales(size);
    this.paint(pen, size, this.current);
    this.index();
    if (this.hovered >= 0 && !this.view.isShown[this.hovered]) this.hover(-1);
    this.drawOverlay();
  }

  index() {
    const { measured, shown } = this.view, { x, y } = this.current;
    const [[left, right], [bottom, top]] = [x.range(), y.range()];
    this.places = [];
    for (const i of shown) {
      const px = x(measured.x[i]), py = y(measured.y[i]);
      if (px >= left - 1 && px <= right + 1 && py <= bottom + 1 && py >= top - 1) this.places.push([px, py, i]);
    }
    this.tree = quadtree().x((p) => p[0]).y((p) => p[1]).addAll(this.places);
    this.order = null;
  }

  paint(pen, { width, height }, { x, y }) {
    const { view } = this, { measured, shown, state } = view, theme = readTheme(), { x: axis, budget } = state.values;
    paintAxes(pen, { width, height }, { x, y }, axis, state.values.y, state.values.log, theme);
    const inner = [MARGIN.left, MARGIN.top, width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    pen.clip(...inner, () => {
      const behind = shown.filter((i) => !view.isFront[i] && Number.isFinite(measured.y[i]));
      if (behind.length > MANY) paintDensity(pen, view, { x, y }, behind);
      else for (const i of behind) { // one by one: where marks lie on one another, the place is darker
        const colour = view.colourOf(i), style = measured.values[i].length < 2 ? { stroke: colour, width: 1.3 } : { fill: colour };
        pen.path((c) => SHAPES[view.shapeOf(i)](c, x(measured.x[i]), y(measured.y[i]), 3.6), { ...style, alpha: behind.length > 300 ? 0.38 : 0.5 });
      }
      paintFront(pen, view, { x, y }, theme);
      nameFront(pen, view, { x, y }, theme);
      if (!shown.length) pen.text(width / 2, height / 2, "no point fits the filters", { fill: theme.muted, size: 14, anchor: "middle" });
      for (const i of new Set([...view.pinned, view.selected])) {
        if (i < 0 || !Number.isFinite(measured.y[i])) continue;
        paintMark(pen, view, { x, y }, i, 6, theme);
        pen.path((c) => { c.moveTo(x(measured.x[i]) + 11, y(measured.y[i])); c.arc(x(measured.x[i]), y(measured.y[i]), 11, 0, 2 * Math.PI); }, { stroke: theme.accent, width: 2.2 });
      }
      if (budget && !X_AXES[axis].isSetting) {
        const at = x(budget);
        pen.path((c) => { c.moveTo(at, 0); c.lineTo(at, height); }, { stroke: theme.accent, width: 1.5, dash: [5, 4] });
      }
    });
  }

  drawOverlay() {
    const size = this.size;
    if (!size.width || !this.current) return;
    const pen = new CanvasPen(this.overlay, size.width, size.height), theme = readTheme();
    if (this.drag?.to) {
      const [a, b] = [this.drag.from, this.drag.to];
      pen.rect(Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.abs(a[0] - b[0]), Math.abs(a[1] - b[1]), { fill: theme.accent, alpha: 0.18 });
    }
    if (this.hovered >= 0) paintMark(pen, this.view, this.current, this.hovered, 7, theme);
  }

  // -- pointer --

  position(event) {
    const box = this.plot.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  move(event) {
    const at = this.position(event);
    if (this.drag) {
      if (this.drag.to || Math.hypot(at[0] - this.drag.from[0], at[1] - this.drag.from[1]) > 5) { this.drag.to = at; this.hover(-1); this.drawOverlay(); }
      return;
    }
    const found = this.tree?.find(at[0], at[1], REACH);
    this.hover(found ? found[2] : -1);
  }

  press(event) {
    if (event.button !== 0) return;
    this.move(event); // a finger gives no move before it touches
    this.drag = { from: this.position(event), to: null };
    if (event.pointerType !== "touch") this.plot.setPointerCapture(event.pointerId);
  }

  release() {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    const { state } = this.view;
    if (!drag.to) {
      if (this.hovered >= 0) this.view.select(this.hovered);
      return;
    }
    const { x, y } = this.current, [a, b] = [drag.from, drag.to];
    if (Math.abs(a[0] - b[0]) < 5) { a[0] = x.range()[0]; b[0] = x.range()[1]; } // a line along one axis says nothing of the other
    if (Math.abs(a[1] - b[1]) < 5) { a[1] = y.range()[0]; b[1] = y.range()[1]; }
    const xs = [a[0], b[0]].map((v) => x.invert(Math.min(Math.max(v, x.range()[0]), x.range()[1]))).sort((p, q) => p - q);
    const ys = [a[1], b[1]].map((v) => y.invert(Math.min(Math.max(v, y.range()[1]), y.range()[0]))).sort((p, q) => p - q);
    if (this.view.dragFilters) state.set({ ranges: { ...state.values.ranges, [`x:${state.values.x}`]: xs, [`y:${state.values.y}`]: ys } });
    else state.set({ zoom: [...xs, ...ys] });
    this.drawOverlay();
  }

  hover(i, speak = false) {
    if (i === this.hovered && !speak) return;
    this.hovered = i;
    this.drawOverlay();
    if (i < 0) { this.tip.hidden = true; return; }
    const text = describePoint(this.view, i);
    this.tip.textContent = text;
    this.tip.hidden = false;
    const box = this.plot.getBoundingClientRect(), { x, y } = this.current, { measured } = this.view;
    // On the side of the point that has more room: to measure the text would lay out the whole page.
    const left = box.left + x(measured.x[i]), top = box.top + y(measured.y[i]), { style } = this.tip;
    const [isRight, isLow] = [left > innerWidth / 2, top > innerHeight / 2];
    style.left = isRight ? "auto" : `${Math.max(8, left + 14)}px`;
    style.right = isRight ? `${Math.max(8, document.documentElement.clientWidth - left + 14)}px` : "auto";
    style.top = isLow ? "auto" : `${Math.max(8, top + 14)}px`;
    style.bottom = isLow ? `${Math.max(8, innerHeight - top + 14)}px` : "auto";
    if (speak) this.spoken.textContent = text.replaceAll("\n", ", ");
  }

  // -- keyboard: left and right go from point to point along the x axis, up and down along the front --

  step(by) {
    this.order ??= [...this.places].sort((a, b) => a[0] - b[0] || b[1] - a[1]).map((place) => place[2]);
    if (!this.order.length) return;
    const at = this.order.indexOf(this.hovered >= 0 ? this.hovered : this.view.selected);
    const next = at < 0 ? (by < 0 ? this.order.length - 1 : 0) : Math.min(Math.max(at + by, 0), this.order.length - 1);
    this.hover(this.order[next], true);
  }

  key(event) {
    const { front, state } = this.view, last = this.places?.length ?? 0;
    const along = (by) => {
      const at = front.indexOf(this.hovered);
      if (front.length) this.hover(front[at < 0 ? (by > 0 ? 0 : front.length - 1) : Math.min(Math.max(at + by, 0), front.length - 1)], true);
    };
    const actions = {
      ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1), PageDown: () => this.step(10), PageUp: () => this.step(-10),
      Home: () => this.step(-last), End: () => this.step(last), ArrowUp: () => along(1), ArrowDown: () => along(-1),
      Enter: () => this.hovered >= 0 && this.view.select(this.hovered), " ": () => this.hovered >= 0 && this.view.select(this.hovered),
      p: () => this.hovered >= 0 && this.view.togglePin(this.hovered), 0: () => state.set({ zoom: null }),
      Escape: () => (state.values.zoom ? state.set({ zoom: null }) : this.hover(-1)),
      "+": () => this.zoomBy(0.6), "-": () => this.zoomBy(1 / 0.6),
    };
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  }

  // Around the point that is focused, else around the middle.
  zoomBy(factor) {
    const { x, y } = this.current, { measured, state } = this.view, i = this.hovered;
    const middle = (scale) => (scale.range()[0] + scale.range()[1]) / 2;
    const at = i >= 0 ? [x(measured.x[i]), y(measured.y[i])] : [middle(x), middle(y)];
    const around = (scale, centre) => scale.range().map((edge) => scale.invert(centre + (edge - centre) * factor));
    state.set({ zoom: [...around(x, at[0]), ...around(y, at[1])] });
  }

  toSvg() {
    const size = { width: 960, height: 560 }, pen = new SvgPen(size.width, size.height);
    pen.rect(0, 0, size.width, size.height, { fill: readTheme().paper });
    this.paint(pen, size, this.scales(size));
    paintBanner(pen, this.view.table.banner);
    return String(pen);
  }
}

// Points counted in small cells: the colour is the mean of those in it, and its strength grows with their number.
function paintDensity(pen, view, { x, y }, members) {
  const { measured } = view, cells = new Map(), paints = new Map();
  const paintOf = (colour) => { if (!paints.has(colour)) paints.set(colour, readColour(colour)); return paints.get(colour); };
  let most = 1;
  for (const i of members) {
    const column = Math.floor(x(measured.x[i]) / CELL), row = Math.floor(y(measured.y[i]) / CELL), key = column * 65536 + row;
    let cell = cells.get(key);
    if (!cell) cells.set(key, (cell = { column, row, count: 0, paint: [0, 0, 0] }));
    cell.count += 1;
    paintOf(view.colourOf(i)).forEach((value, c) => { cell.paint[c] += value; });
    most = Math.max(most, cell.count);
  }
  for (const { column, row, count, paint } of cells.values()) {
    const fill = `rgb(${paint.map((value) => Math.round(value / count)).join(",")})`;
    pen.rect(column * CELL, row * CELL, CELL, CELL, { fill, alpha: 0.4 + (0.55 * Math.log(count)) / Math.log(most + 1) });
  }
}

const readColour = (text) => (text[0] === "#" ? [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)) : text.match(/[\d.]+/g).slice(0, 3).map(Number));

export function paintAxes(pen, { width, height }, { x, y }, xAxis, yAxis, isLog, theme) {
  const bottom = height - MARGIN.bottom;
  const room = Math.max(2, Math.floor((width - MARGIN.left) / 78));
  let ticks = x.ticks(room);
  if (isLog) {
    const [low, high] = x.domain(), decades = Math.log10(high / low);
    const steps = decades < 1.3 ? [1, 2, 3, 5, 7] : decades < 3 ? [1, 2, 5] : [1];
    ticks = ticks.filter((tick) => steps.some((step) => Math.abs(tick / 10 ** Math.floor(Math.log10(tick * 1.0000001)) - step) < 1e-6));
    while (ticks.length > room) ticks = ticks.filter((_, i) => i % 2 === 0);
    if (ticks.length < 2) ticks = scaleLinear().domain([low, high]).ticks(Math.min(room, 5));
  }
  for (const tick of ticks) {
    pen.path((c) => { c.moveTo(x(tick), MARGIN.top); c.lineTo(x(tick), bottom); }, { stroke: theme.line });
    pen.text(x(tick), bottom + 16, formatX(xAxis, tick), { fill: theme.muted, size: 11, anchor: "middle" });
  }
  const [low, high] = y.domain(), digits = high - low < 0.02 ? 2 : high - low < 0.2 ? 1 : 0;
  for (const tick of y.ticks(Math.max(3, Math.floor(height / 60)))) {
    pen.path((c) => { c.moveTo(MARGIN.left, y(tick)); c.lineTo(width - MARGIN.right, y(tick)); }, { stroke: theme.line });
    pen.text(MARGIN.left - 8, y(tick), formatPercent(tick, digits), { fill: theme.muted, size: 11, anchor: "end", baseline: "middle" });
  }
  pen.text((MARGIN.left + width - MARGIN.right) / 2, height - 8, X_AXES[xAxis].label + (isLog ? " (log)" : ""), { fill: theme.muted, size: 12, anchor: "middle" });
  pen.text(14, (MARGIN.top + bottom) / 2, `${Y_AXES[yAxis].label}, %`, { fill: theme.muted, size: 12, anchor: "middle", rotate: -90 });
}

function paintFront(pen, view, { x, y }, theme) {
  const { front, measured } = view;
  if (!X_AXES[view.state.values.x].isSetting) pen.path((c) => front.forEach((i, n) => {
    if (!n) c.moveTo(x(measured.x[i]), y(measured.y[i]));
    else { c.lineTo(x(measured.x[i]), y(measured.y[front[n - 1]])); c.lineTo(x(measured.x[i]), y(measured.y[i])); }
  }), { stroke: theme.ink, width: 1.6, alpha: 0.75 });
  front.forEach((i) => paintMark(pen, view, { x, y }, i, 5, theme));
}

// The names of the front's points, where there is room: above the line and to the left of the point nothing lies.
function nameFront(pen, view, { x, y }, theme) {
  const { front, measured, table: { points } } = view, [left, right] = x.range(), [bottom, top] = y.range(), taken = [];
  if (X_AXES[view.state.values.x].isSetting) return;
  const isFew = front.length <= 8, isAlone = points.model.every((model) => model === points.model[0]), count = new Map();
  for (const i of front) count.set(points.model[i], (count.get(points.model[i]) ?? 0) + 1);
  const named = isFew ? front : front.filter((i, n) => points.model[front[n + 1]] !== points.model[i]); // the best one of each network
  for (const i of [...named].reverse()) {
    const text = isFew && (count.get(points.model[i]) > 1 || isAlone) ? points.label[i] : points.model[i], short = text.length > 44 ? `${text.slice(0, 43)}…` : text;
    const px = x(measured.x[i]), py = y(measured.y[i]), width = 6.2 * short.length;
    if (px < left || px > right || py < top || py > bottom) continue;
    const anchor = px - 9 - width > left ? "end" : "start", start = anchor === "end" ? px - 9 - width : px + 9;
    const at = anchor === "end" ? Math.max(py - 6, top + 8) : Math.max(py - 9, top + 8), box = [start, at - 11, start + width, at + 3];
    if (box[2] > right + 14 || taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
    if (anchor === "start" && front.some((j) => measured.y[j] > measured.y[i] && x(measured.x[j]) < box[2])) continue;
    if (anchor === "start" && front.some((j) => j !== i && x(measured.x[j]) < box[2] && x(measured.x[j]) > box[0] && y(measured.y[j]) > box[1] - 6 && y(measured.y[j]) < box[3] + 6)) continue;
    taken.push(box);
    pen.text(anchor === "end" ? px - 9 : px + 9, at, short, { fill: theme.ink, size: 11, anchor });
  }
}

// A mark at full strength: with the interval of three and more seeds, or with a dot for each of two.
function paintMark(pen, view, { x, y }, i, radius, theme) {
  const { measured } = view, px = x(measured.x[i]), py = y(measured.y[i]), colour = view.colourOf(i), values = measured.values[i];
  const half = measured.half[i];
  if (Number.isFinite(half)) {
    const ends = [Math.max(0, measured.y[i] - half), Math.min(1, measured.y[i] + half)].map(y);
    pen.path((c) => { c.moveTo(px, ends[0]); c.lineTo(px, ends[1]); for (const end of ends) { c.moveTo(px - 4, end); c.lineTo(px + 4, end); } }, { stroke: theme.ink, width: 1.2 });
  } else if (values.length === 2) {
    for (const value of values) pen.path((c) => { c.moveTo(px + 2, y(value)); c.arc(px, y(value), 2, 0, 2 * Math.PI); }, { fill: theme.ink });
  }
  const isHollow = values.length < 2;
  pen.path((c) => SHAPES[view.shapeOf(i)](c, px, py, radius), { fill: isHollow ? theme.paper : colour, stroke: isHollow ? colour : theme.paper, width: isHollow ? 2 : 1.2 });
}

// What hover, focus and tap say of a point: network, settings, accuracy, seeds, cost, seconds, front.
export function describePoint(view, i) {
  const { table, measured, state } = view, { points, runs } = table, { x, y } = state.values;
  const seeds = measured.seeds[i].filter((seed) => seed !== null), inLabel = points.label[i];
  const known = table.runsOf[i].map((run) => runs.seconds[run]).filter((value) => value !== null);
  const settings = table.keys.filter(({ name }) => name !== "model" && points.values[name][i] !== null && !inLabel.includes(`${name}=`)).map(({ name }) => `${name}=${formatValue(points.values[name][i])}`);
  const chance = view.hasChances && !view.isFiltered ? points.chance[i] : null;
  const costs = [formatX("macs", points.macs[i]), `${formatX("params", points.params[i])} parameters`];
  if (!["macs", "params", "seconds"].includes(x) && !X_AXES[x].isSetting) costs.push(`${X_AXES[x].name} ${formatX(x, measured.x[i])}`);
  return [
    inLabel, settings.slice(0, 10).join(", "),
    `${{ val: "validation", test: "test", test_views: "test, all views" }[y]} ${formatAccuracy(measured, i)}`,
    seeds.length ? `${seeds.length > 1 ? "seeds" : "seed"} ${seeds.length > 6 ? `${seeds.slice(0, 6).join(", ")} and ${seeds.length - 6} more` : seeds.join(", ")}${points.lost[i] ? `; ${points.lost[i]} more did not finish` : ""}` : "",
    costs.join(", "),
    known.length ? `${formatSeconds(known.reduce((a, b) => a + b, 0) / known.length)} a run` : "",
    view.isFront[i] ? `on the front${chance !== null ? `, with probability ${formatPercent(chance, 0)} %` : ""}` : chance > 0.005 ? `on the front with probability ${formatPercent(chance, 0)} %` : "",
    table.tagsOf[i].size ? `tags: ${[...table.tagsOf[i]].slice(0, 6).join(", ")}` : "",
  ].filter(Boolean).join("\n");
}
