// The table behind the charts: all points that are shown, or the runs that are not compared. Only the rows in sight exist.

import { X_AXES } from "./data.js";
import { keepFocus, make } from "./dom.js";
import { formatPercent, formatSeconds, formatValue, formatX } from "./format.js";

const ROW = 30; // pixels
const PRINTED = 60; // rows on paper
const SPARE = 8; // rows above and below those in sight

export class Table {
  constructor(view, root) {
    this.view = view;
    this.box = root.querySelector(".rows");
    this.count = root.querySelector(".count");
    this.element = make("table", {}, make("thead"), make("tbody"));
    this.box.append(this.element);
    this.box.addEventListener("scroll", () => { this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.fill(); }); });
    this.element.addEventListener("click", (event) => this.click(event));
    this.box.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.fill()).observe(this.box);
  }

  columns() {
    const { view } = this, { table, measured, state } = view, { points, runs } = table;
    if (state.values.list === "apart") return [
      { name: "run", text: (run) => runs.name[run] }, { name: "id", text: (run) => runs.id[run] },
      { name: "state", text: (run) => runs.state[run] }, { name: "why", text: (run) => runs.why[run], wide: true },
      { name: "epoch", number: (run) => runs.epoch[run], text: (run) => `${runs.epoch[run]} of ${runs.epochs[run]}` },
      { name: "val acc %", fact: "val/acc", number: (run) => runs.val[run] ?? NaN, text: (run) => formatPercent(runs.val[run] ?? NaN) },
    ];
    const seconds = (i) => { const known = table.runsOf[i].map((run) => runs.seconds[run]).filter((v) => v !== null); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : NaN; };
    const keys = table.keys.filter(({ name }) => name !== "model" && (!state.values.differing || view.varies(name)));
    const order = new Map(view.front.map((i, n) => [i, n]));
    return [
      { name: "network", text: (i) => points.model[i] },
      { name: `${{ val: "val", test: "test", test_views: "test, all views" }[state.values.y]} acc %`, fact: { test_views: "test/acc, all views" }[state.values.y] ?? `${state.values.y}/acc`, number: (i) => measured.y[i], text: (i) => formatPercent(measured.y[i]) },
      {
        name: "± 95 %", fact: "interval95_half", number: (i) => measured.half[i],
        text: (i) => (measured.values[i].length === 2 ? measured.values[i].map((v) => formatPercent(v)).join(", ") : formatPercent(measured.half[i])),
      },
      { name: "n", number: (i) => measured.values[i].length, text: (i) => (points.lost[i] ? `${measured.values[i].length} of ${measured.values[i].length + points.lost[i]}` : String(measured.values[i].length)) },
      { name: "MMACs", fact: "macs", number: (i) => points.macs[i], text: (i) => formatValue(Number((points.macs[i] / 1e6).toPrecision(4))) },
      { name: "front", value: (i) => String(order.has(i)), number: (i) => (order.has(i) ? 1e6 - order.get(i) : (view.hasChances && points.chance[i]) || 0), text: (i) => (order.has(i) ? "yes" : "") },
      ...(view.hasChances && points.chance.some((c) => c !== null) ? [{ name: "P(front) %", fact: "front_probability", number: (i) => points.chance[i] ?? NaN, text: (i) => (points.chance[i] === null ? "–" : formatPercent(points.chance[i], 0)), title: "probability to be on the front of MACs, given the scatter of the seeds; of all runs, whatever is filtered" }] : []),
      ...keys.map(({ name, number }) => ({
        name, text: (i) => formatValue(points.values[name][i]), ...(number ? { number: (i) => points.values[name][i] ?? NaN } : {}),
      })),
      { name: "params", number: (i) => points.params[i], text: (i) => formatX("params", points.params[i]) },
      { name: "time a run", fact: "seconds", number: seconds, text: (i) => formatSeconds(seconds(i)) },
      ...(table.costs ?? []).map(({ key, label }) => ({ name: label, fact: key, number: (i) => X_AXES[key].read(table, i), text: (i) => formatX(key, X_AXES[key].read(table, i)) })),
      ...(table.tags.length ? [{ name: "tags", text: (i) => [...table.tagsOf[i]].join(", "), wide: true }] : []),
    ];
  }

  draw() {
    const { view } = this, { state, table } = view, columns = this.shownColumns = this.columns();
    const isApart = state.values.list === "apart";
    this.rows = isApart ? [...view.apart] : [...view.shown];
    const sorted = columns.find(({ name }) => name === state.values.sort) ?? (isApart ? null : columns.find(({ name }) => name.endsWith("acc %")));
    if (sorted) {
      const key = sorted.number ?? sorted.text, sign = state.values.descending ? -1 : 1;
      const keys = new Map(this.rows.map((row) => [row, key(row)]));
      this.rows.sort((a, b) => {
        const x = keys.get(a), y = keys.get(b);
        if (typeof x === "string") return sign * x.localeCompare(y);
        return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
      });
    }
    const head = columns.map((column) => make("th", {
      scope: "col", class: column.number && "number", title: column.title,
      "aria-sort": column === sorted ? (state.values.descending ? "descending" : "ascending") : null,
    }, make("button", { type: "button", "data-sort": column.name }, column.name)));
    this.element.tHead.replaceChildren(make("tr", {}, ...(isApart ? [] : [make("th", { scope: "col" }, "pin")]), ...head));
    this.element.setAttribute("aria-rowcount", this.rows.length + 1);
    const all = isApart ? table.apart.length : table.count;
    this.count.textContent = this.rows.length === all ? `${all} ${isApart ? "runs" : "points"}` : `${this.rows.length} of ${all} ${isApart ? "runs" : "points"}`;
    this.fill(true);
  }

  fill() {
    if (!this.rows) return;
    const { view } = this, { state, table } = view, isApart = state.values.list === "apart";
    const { isPaper } = view, first = isPaper ? 0 : Math.max(0, Math.floor(this.box.scrollTop / ROW) - SPARE);
    const last = isPaper ? Math.min(this.rows.length, PRINTED) : Math.min(this.rows.length, first + Math.ceil((this.box.clientHeight || 400) / ROW) + 2 * SPARE);
    const spacer = (count) => (count > 0 ? [make("tr", { "aria-hidden": "true", style: `height:${count * ROW}px` })] : []);
    const body = [];
    for (let at = first; at < last; at++) {
      const row = this.rows[at], isFront = !isApart && view.isFront[row];
      const chosen = isApart ? view.selectedRun === row : view.selected === row;
      const name = isApart ? table.runs.id[row] : table.points.label[row];
      const cells = this.shownColumns.map((column, c) => {
        const text = column.text(row);
        const content = c ? text : make("button", { type: "button", class: "open", "data-row": row }, text);
        return make("td", { class: [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ") || null, title: column.wide ? text : null }, content);
      });
      if (!isApart) cells.unshift(make("td", {}, make("input", { type: "checkbox", "data-pin": row, "aria-label": `pin ${name}`, checked: view.pinned.includes(row) })));
      body.push(make("tr", { class: [isFront && "front", chosen && "chosen"].filter(Boolean).join(" ") || null, "aria-rowindex": at + 2, "data-row": row }, cells));
    }
    if (isPaper && last < this.rows.length) body.push(make("tr", {}, make("td", { colspan: 99 }, `and ${this.rows.length - last} more, which report.csv has`)));
    const rest = isPaper ? [] : spacer(this.rows.length - last);
    keepFocus(this.element, () => this.element.tBodies[0].replaceChildren(...spacer(first), ...body, ...rest));
  }

  click(event) {
    const { state } = this.view, { target } = event;
    if (target.dataset.sort) {
      const name = target.dataset.sort, again = state.values.sort === name;
      state.set({ sort: name, descending: again ? !state.values.descending : this.shownColumns.some((c) => c.name === name && c.number) });
      requestAnimationFrame(() => [...this.element.querySelectorAll("th button")].find((b) => b.dataset.sort === name)?.focus());
    } else if (target.dataset.pin) this.view.togglePin(Number(target.dataset.pin));
    else {
      const row = target.closest("tr[data-row]")?.dataset.row;
      if (row !== undefined) state.values.list === "apart" ? this.view.selectRun(Number(row)) : this.view.select(Number(row));
    }
  }

  // Up and down go from row to row, also to rows that do not exist yet.
  key(event) {
    const row = document.activeElement?.dataset?.row, by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (row === undefined || !by) return;
    event.preventDefault();
    const at = this.rows.indexOf(Number(row)) + by;
    if (at < 0 || at >= this.rows.length) return;
    const top = at * ROW, room = this.box.clientHeight - 2 * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top > this.box.scrollTop + room) this.box.scrollTop = top - room;
    this.fill();
    this.element.querySelector(`button[data-row="${this.rows[at]}"]`)?.focus();
  }

  // Of what is shown: names and units of report.csv, and the runs of each point.
  facts() {
    const { view } = this, { table } = view, columns = [...this.shownColumns];
    if (view.state.values.list !== "apart") columns.push(
      { name: "accuracies", value: (i) => view.measured.values[i].join(" ") },
      { name: "runs", value: (i) => table.runsOf[i].map((run) => table.runs.id[run]).join(" ") });
    return [columns.map(({ name, fact }) => fact ?? name), ...this.rows.map((row) => columns.map(({ value, number, text }) => (value ?? number ?? text)(row)))];
  }
}
