// Axes, filters and the budget: everything that the reader can set with a form.

import { make, own } from "./dom.js";
import { X_AXES, Y_AXES, listX, listY } from "./data.js";
import { formatAccuracy, formatAmount, formatX, parseAmount } from "./format.js";

const SHAPE_SIGNS = ["●", "■", "▲", "◆", "▼", "⬢", "⬟", "✚"];
const STEPS = 400; // of the budget's slider
const MAX_WORDS = 40; // of a setting, that have a box each

export class Controls {
  constructor(view, root) {
    this.view = view;
    this.root = root;
    const { table, state } = view;
    const option = (value, text, chosen) => make("option", { value, selected: value === chosen }, text);
    this.x = make("select", { id: "explorer-x", onchange: (e) => this.setX(e.target.value) });
    const xs = listX(table), settings = xs.filter((x) => X_AXES[x].isSetting);
    this.x.append(...xs.filter((x) => !X_AXES[x].isSetting).map((x) => option(x, X_AXES[x].label, state.values.x)));
    if (settings.length) this.x.append(make("optgroup", { label: "settings" }, settings.map((x) => option(x, X_AXES[x].label, state.values.x))));
    this.y = make("select", { id: "explorer-y", onchange: (e) => state.set({ y: e.target.value, zoom: null }) }, listY(table).map((y) => option(y, Y_AXES[y].label, state.values.y)));
    this.log = make("input", { type: "checkbox", id: "explorer-log", onchange: (e) => state.set({ log: e.target.checked, zoom: null }) });
    this.colour = make("select", { id: "explorer-colour", onchange: (e) => state.set({ colour: e.target.value }) },
      [["family", "family"], ["model", "network"], ...table.keys.filter(({ name }) => name !== "model").map(({ name }) => [name, name])].map(([value, text]) => option(value, text, state.values.colour)));
    this.text = make("input", { type: "search", id: "explorer-text", placeholder: "name, setting, run id", oninput: (e) => state.set({ text: e.target.value }) });
    this.budget = make("input", { type: "range", id: "explorer-budget", min: 0, max: STEPS, oninput: (e) => this.setBudget(Number(e.target.value)) });
    this.limit = make("input", { type: "text", id: "explorer-limit", placeholder: "such as 20M", autocomplete: "off", oninput: (e) => this.setLimit(e.target.value) });
    this.budgetText = make("output", { for: "explorer-budget explorer-limit", class: "best" });
    this.families = make("div", { class: "chips", role: "group", "aria-label": "families" });
    this.tags = make("div", { class: "chips tags", role: "group", "aria-label": "tags" });
    this.shown = make("span", { class: "shown", role: "status" });
    this.keys = make("div", { class: "keys" });
    this.reset = make("button", { type: "button", onclick: () => { view.reset(); this.fillKeys(); } }, "reset");
    const row = (label, input) => make("label", { for: input.id, class: "field" }, make("span", {}, label), input);
    const filters = make("details", { class: "filters" }, make("summary", {}, "filter by setting"), this.keys);
    filters.open = Object.keys(state.values.ranges).length + Object.keys(state.values.choices).length > 0;
    this.budgetRow = make("div", { class: "budget" }, make("label", { for: "explorer-limit" }, "best within"), this.limit, make("label", { for: "explorer-budget", class: "unseen" }, "budget"), this.budget, this.budgetText);
    root.append(make("div", { class: "fields" }, make("span", { class: "group" }, row("across", this.x), make("label", { for: "explorer-log", class: "check" }, this.log, " log")), row("up", this.y), row("colour", this.colour), row("find", this.text)),
      this.families, this.tags, this.budgetRow, make("div", { class: "filtering" }, filters, this.shown, this.reset));
    this.tags.addEventListener("click", (event) => {
      const { tag } = event.target.dataset, chosen = state.values.tags;
      if (tag) state.set({ tags: chosen.includes(tag) ? chosen.filter((other) => other !== tag) : [...chosen, tag] });
    });
    this.families.addEventListener("click", (event) => { if (event.target.dataset.family) this.toggleFamily(event.target.dataset.family); });
    this.fillKeys();
  }

  range() {
    let low = Infinity, high = -Infinity;
    for (const x of this.view.measured.cost) if (x > 0) { low = Math.min(low, x); high = Math.max(high, x); }
    return [Math.log(low), Math.log(high)];
  }

  setBudget(step) {
    const [low, high] = this.range();
    this.view.state.set({ budget: step >= STEPS ? null : Number(Math.exp(low + ((high - low) * step) / STEPS).toPrecision(4)) });
  }

  setLimit(text) {
    const budget = parseAmount(text);
    this.limit.setAttribute("aria-invalid", String(Boolean(text.trim()) && !(budget > 0)));
    if (budget > 0 || !text.trim()) this.view.state.set({ budget: budget > 0 ? budget : null });
  }

  setX(x) {
    const { values } = this.view.state, { isSetting, isLog } = X_AXES[x], was = X_AXES[values.x].isSetting;
    this.view.state.set({ x, zoom: null, budget: null, log: isSetting ? isLog : was || values.log });
  }

  toggleFamily(family) {
    const { state, table } = this.view, all = table.families, chosen = new Set(state.values.families ?? all);
    if (chosen.size === all.length && all.length > 1) { state.set({ families: [family] }); return; } // the first click: this one alone
    chosen.has(family) ? chosen.delete(family) : chosen.add(family);
    state.set({ families: chosen.size === all.length || !chosen.size ? null : all.filter((name) => chosen.has(name)) });
  }

  fillKeys() {
    const { table, state, view } = { ...this.view, view: this.view }, fields = [];
    // format and read: between a number and what stands in its field
    const numeric = (id, name, { type = "number", format = String, read = Number } = {}) => {
      const bounds = own(state.values.ranges, id) ?? [null, null];
      const bound = (side) => make("input", {
        type, step: "any", value: bounds[side] === null ? null : format(bounds[side]), placeholder: side ? "max" : "min", "aria-label": `${name}, ${side ? "largest" : "smallest"}`,
        onchange: (event) => {
          const now = [...(own(state.values.ranges, id) ?? [null, null])], value = read(event.target.value);
          now[side] = event.target.value.trim() && Number.isFinite(value) ? value : null;
          const { [id]: _, ...others } = state.values.ranges;
          state.set({ ranges: now.every((v) => v === null) ? others : { ...others, [id]: now } });
        },
      });
      return make("fieldset", {}, make("legend", {}, name), bound(0), " – ", bound(1));
    };
    for (const { name, number } of table.keys) {
      if (!view.differs(name)) continue;
      if (number) { fields.push(numeric(name, name)); continue; }
      const words = [...new Set(table.points.values[name].filter((v) => v !== null).map(String))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const more = words.length > MAX_WORDS ? make("span", { class: "hint" }, `${words.length - MAX_WORDS} more: find them by text`) : null;
      fields.push(make("fieldset", { class: "words" }, make("legend", {}, name), words.slice(0, MAX_WORDS).map((word) => make("label", {}, make("input", {
        type: "checkbox", checked: (own(state.values.choices, name) ?? words).includes(word),
        onchange: (event) => {
          const chosen = new Set(own(state.values.choices, name) ?? words);
          event.target.checked ? chosen.add(word) : chosen.delete(word);
          const { [name]: _, ...others } = state.values.choices;
          state.set({ choices: chosen.size === words.length ? others : { ...others, [name]: words.filter((w) => chosen.has(w)) } });
        },
      }), ` ${word}`)), more));
    }
    if (!X_AXES[state.values.x].isSetting) fields.push(numeric(`x:${state.values.x}`, X_AXES[state.values.x].name, { type: "text", format: (v) => formatAmount(Number(v.toPrecision(4))), read: parseAmount }));
    fields.push(numeric(`y:${state.values.y}`, "accuracy %", { format: (v) => Number((100 * v).toFixed(3)), read: (text) => Number(text) / 100 }));
    this.keys.replaceChildren(...fields);
  }

  draw(changed) {
    const { view } = this, { state, table, measured } = view, values = state.values;
    this.x.value = values.x; this.y.value = values.y; this.colour.value = values.colour; this.log.checked = values.log;
    if (this.text.value !== values.text) this.text.value = values.text;
    if (["ranges", "choices", "x", "y"].some((key) => changed.has(key)) && !this.keys.contains(document.activeElement)) this.fillKeys();
    const legend = view.legend();
    this.families.replaceChildren(...legend.map(({ name, colour, shape, family }) => {
      const isOn = !values.families || values.families.includes(name);
      const sign = make("span", { "aria-hidden": "true", style: `color:${colour}` }, SHAPE_SIGNS[shape] ?? "●");
      return family ? make("button", { type: "button", class: "chip", "aria-pressed": String(isOn), "data-family": name }, sign, ` ${name}`) : make("span", { class: "chip" }, sign, ` ${name}`);
    }));
    this.families.querySelectorAll("span[aria-hidden]").forEach((sign) => { sign.style.pointerEvents = "none"; });
    this.tags.hidden = !table.tags.length;
    this.tags.replaceChildren(make("span", { class: "label" }, "tags"), ...table.tags.map((tag) => make("button", { type: "button", class: "chip", "aria-pressed": String(values.tags.includes(tag)), "data-tag": tag }, tag)));
    const filters = view.describeFilters();
    const number = view.numUnplaced, unplaced = number ? `${number} ${number === 1 ? "point has" : "points have"} no place on these axes` : "";
    this.shown.textContent = [filters && `${view.shown.length} of ${table.count} points are shown (filtered: ${filters})`, unplaced].filter(Boolean).join("; ");
    this.drawBudget();
    this.reset.hidden = !view.isChanged;
  }

  // The most accurate point of the front within the budget.
  drawBudget() {
    const { view } = this, { table, measured, state: { values } } = view, [low, high] = this.range();
    this.budgetRow.hidden = Boolean(X_AXES[values.x].isSetting) || !(low < high);
    this.budget.value = values.budget ? Math.round((STEPS * (Math.log(values.budget) - low)) / (high - low || 1)) : STEPS;
    this.budget.setAttribute("aria-valuetext", values.budget ? formatX(values.x, values.budget) : "none");
    if (document.activeElement !== this.limit) { this.limit.value = values.budget ? formatAmount(values.budget) : ""; this.limit.removeAttribute("aria-invalid"); }
    const best = view.front.filter((i) => !values.budget || measured.x[i] <= values.budget).at(-1);
    const found = best === undefined ? ["nothing fits"] : [make("button", { type: "button", class: "open", "data-best": "", onclick: () => view.select(best) }, table.points.label[best]), ` ${formatAccuracy(measured, best)} at ${formatX(values.x, measured.x[best])}`];
    this.budgetText.replaceChildren(values.budget ? `within ${formatX(values.x, values.budget)}: ` : "no limit: ", ...found);
  }
}
