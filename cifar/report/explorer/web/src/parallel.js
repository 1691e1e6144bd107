// Parallel coordinates: a line for each point, an axis for each key, and a brush on each axis that filters everything.

import { scaleLinear, scaleLog, scalePoint } from "d3-scale";
import { brushY } from "d3-brush";
import { select } from "d3-selection";
import { X_AXES } from "./data.js";
import { own } from "./dom.js";
import { CanvasPen, SvgPen, paintBanner, readTheme } from "./pen.js";
import { formatPercent, formatValue, formatX } from "./format.js";

const MARGIN = { left: 70, right: 90, top: 44, bottom: 34 };
const MAX_AXES = 14;

export class Parallel {
  constructor(view, root) {
    this.view = view;
    this.plot = root.querySelector(".plot");
    this.canvas = root.querySelector("canvas");
    this.svg = select(root.querySelector("svg"));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  // The axes: keys that differ, the cost, the accuracy. A key that a network does not have ends at the axis' foot.
  axes(height) {
    const { table, measured, state } = this.view, { x, y } = state.values, room = [height - MARGIN.bottom, MARGIN.top];
    const keys = table.keys.filter(({ name }) => this.view.differs(name)).slice(0, MAX_AXES - 2).map(({ name, number, log }) => {
      const values = table.points.values[name];
      if (number) return { id: name, name, number, scale: numberScale(values, log, room), read: (i) => values[i], format: formatValue };
      const words = [...new Set(values.filter((value) => value !== null).map(String))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      return { id: name, name, words, scale: scalePoint().domain(words).range(room).padding(0.3), read: (i) => (values[i] === null ? null : String(values[i])), format: String };
    });
    const costs = Array.from(measured.x), accuracies = Array.from(measured.y), { isSetting, name: costName } = X_AXES[x];
    return [
      ...keys,
      ...(isSetting ? [] : [{ id: `x:${x}`, name: costName, number: true, scale: numberScale(costs, true, room), read: (i) => costs[i], format: (v) => formatX(x, v) }]),
      { id: `y:${y}`, name: `${y === "val" ? "validation" : "test"} acc`, number: true, scale: numberScale(accuracies, false, room), read: (i) => accuracies[i], format: (v) => formatPercent(v, 1) },
    ];
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width) return;
    const axes = this.current = this.axes(height);
    const at = scalePoint().domain(axes.map(({ id }) => id)).range([MARGIN.left, width - MARGIN.right]);
    this.paint(new CanvasPen(this.canvas, width, height), height, axes, at);
    this.drawAxes(width, height, axes, at);
  }

  toSvg() {
    const width = Math.max(960, 110 * this.current.length), height = 360, axes = this.axes(height), theme = readTheme(), pen = new SvgPen(width, height);
    const at = scalePoint().domain(axes.map(({ id }) => id)).range([MARGIN.left, width - MARGIN.right]);
    pen.rect(0, 0, width, height, { fill: theme.paper });
    this.paint(pen, height, axes, at);
    for (const axis of axes) {
      const x = at(axis.id);
      pen.path((c) => { c.moveTo(x, MARGIN.top); c.lineTo(x, height - MARGIN.bottom); }, { stroke: theme.muted });
      pen.text(x, 30, axis.name, { fill: theme.ink, size: 11, anchor: "middle", weight: "bold" });
      for (const { y, text } of this.ticks(axis, height)) pen.text(x + 6, y, text, { fill: theme.ink, size: 11, baseline: "middle" });
    }
    paintBanner(pen, this.view.table.banner);
    return String(pen);
  }

  ticks(axis, height) {
    const found = axis.words ? (axis.words.length > 14 ? axis.words.filter((_, n) => n % Math.ceil(axis.words.length / 14) === 0) : axis.words) : spreadTicks(axis.scale);
    const rows = found.map((value) => ({ y: axis.scale(value), text: axis.format(value) }));
    if (own(this.view.table.points.values, axis.id)?.some((value) => value === null)) rows.push({ y: height - MARGIN.bottom + 14, text: "–" });
    return rows;
  }

  paint(pen, height, axes, at) {
    const { view } = this, { table } = view, theme = readTheme();
    const foot = height - MARGIN.bottom + 14, xs = axes.map(({ id }) => at(id));
    const heights = axes.map(({ scale, read }) => {
      const line = new Float32Array(table.count);
      for (let i = 0; i < table.count; i++) {
        const value = read(i), place = value === null || Number.isNaN(value) ? undefined : scale(value);
        line[i] = Number.isFinite(place) ? place : foot;
      }
      return line;
    });
    const trace = (c, i) => heights.forEach((line, a) => (a ? c.lineTo(xs[a], line[i]) : c.moveTo(xs[a], line[i])));
    const strokeAll = (members, colour, alpha, size) => {
      for (let start = 0; start < members.length; start += 400)
        pen.path((c) => { for (let n = start; n < Math.min(start + 400, members.length); n++) trace(c, members[n]); }, { stroke: colour, alpha, width: size });
    };
    const hidden = [];
    for (let i = 0; i < table.count; i++) if (!view.isShown[i]) hidden.push(i);
    if (table.count <= 3000) strokeAll(hidden, theme.line, 0.5, 1);
    const groups = new Map();
    for (const i of view.shown) { const colour = view.colourOf(i); groups.has(colour) ? groups.get(colour).push(i) : groups.set(colour, [i]); }
    const alpha = Math.max(0.025, Math.min(0.65, 90 / view.shown.length));
    for (const [colour, members] of groups) strokeAll(members, colour, alpha, 1);
    strokeAll(view.front, theme.ink, view.front.length > 10 ? 0.5 : 0.85, view.front.length > 10 ? 1.1 : 1.6);
    for (const i of new Set([...view.pinned, view.selected])) if (i >= 0) strokeAll([i], theme.accent, 1, 2.6);
  }

  drawAxes(width, height, axes, at) {
    const { state } = this.view, self = this;
    this.svg.attr("width", width).attr("height", height).attr("viewBox", `0 0 ${width} ${height}`);
    const groups = this.svg.selectAll("g.axis").data(axes, ({ id }) => id).join((enter) => {
      const group = enter.append("g").attr("class", "axis");
      group.append("line").attr("class", "spine");
      group.append("text").attr("class", "name");
      group.append("g").attr("class", "ticks");
      group.append("g").attr("class", "brush");
      return group;
    });
    groups.attr("transform", ({ id }) => `translate(${at(id)} 0)`);
    groups.select("line.spine").attr("y1", MARGIN.top).attr("y2", height - MARGIN.bottom);
    const gap = axes.length > 1 ? (width - MARGIN.left - MARGIN.right) / (axes.length - 1) : width;
    const letters = Math.max(6, Math.floor(gap / 6.6));
    groups.select("text.name").attr("y", (_, n) => (gap < 70 && n % 2 ? 12 : 26)).text(({ name }) => (name.length > letters ? `${name.slice(0, letters - 1)}…` : name));
    groups.select("g.ticks").each(function ticks(axis) {
      const rows = self.ticks(axis, height);
      select(this).selectAll("text").data(rows).join("text").attr("x", 6).attr("dy", "0.32em").attr("y", ({ y }) => y)
        .text(({ text }) => (text.length > letters ? `${text.slice(0, letters - 1)}…` : text));
    });
    groups.select("g.brush").each(function brushes(axis) {
      const brush = brushY().extent([[-12, MARGIN.top - 8], [12, height - MARGIN.bottom + 8]]).on("end", (event) => { if (event.sourceEvent) self.filter(axis, event.selection); });
      const group = select(this).call(brush);
      const range = axis.number && own(state.values.ranges, axis.id), chosen = axis.words && own(state.values.choices, axis.id);
      let extent = null;
      if (range) extent = [range[1] === null ? 0 : axis.scale(range[1]), range[0] === null ? height : axis.scale(range[0])];
      if (chosen?.length) { const ys = chosen.map((word) => axis.scale(word)).filter(Number.isFinite); if (ys.length) extent = [Math.min(...ys) - 8, Math.max(...ys) + 8]; }
      if (extent) extent = extent.map((v) => Math.min(Math.max(v, MARGIN.top - 8), height - MARGIN.bottom + 8));
      group.call(brush.move, extent && extent[1] > extent[0] ? extent : null);
    });
  }

  filter(axis, selection) {
    const { state } = this.view;
    if (axis.words) {
      const { [axis.id]: _, ...others } = state.values.choices;
      state.set({ choices: selection ? { ...others, [axis.id]: axis.words.filter((word) => axis.scale(word) >= selection[0] && axis.scale(word) <= selection[1]) } : others });
    } else {
      const { [axis.id]: _, ...others } = state.values.ranges;
      state.set({ ranges: selection ? { ...others, [axis.id]: [axis.scale.invert(selection[1]), axis.scale.invert(selection[0])] } : others });
    }
  }
}

// Ticks that do not overlap: a logarithmic scale offers many.
function spreadTicks(scale) {
  if (scale.only !== undefined) return [scale.only];
  const kept = [];
  for (const tick of scale.ticks(4)) if (!kept.length || Math.abs(scale(tick) - scale(kept.at(-1))) >= 16) kept.push(tick);
  return kept;
}

function numberScale(values, log, range) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (Number.isFinite(value) && (!log || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) [low, high] = [1, 2];
  const only = low === high ? low : undefined;
  if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - 0.5, high + 0.5];
  return Object.assign((log ? scaleLog() : scaleLinear()).domain([low, high]).range(range), { only });
}
