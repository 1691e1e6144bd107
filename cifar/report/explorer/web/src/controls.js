// Axes, filters and the budget: everything that the reader can set with a form.

import { make } from "./dom.js";
import { X_AXES, Y_AXES, listX, listY } from "./data.js";
import { formatAccuracy, formatX } from "./format.js";

const SHAPE_SIGNS = ["●", "■", "▲", "◆", "▼", "⬢", "⬟", "✚"];
const STEPS = 400; // of the budget's slider

export class Controls {
  constructor(view, root) {
    this.view = view;
    this.root = root;
    const { table, state } = view;
    const option = (value, text, chosen) => make("option", { value, selected: value === chosen }, text);
    this.x = make("select", { id: "explorer-x", onchange: (e) => state.set({ x: e.target.value, zoom: null, budget: null }) }, listX(table).map((x) => option(x, X_AXES[x].label, state.values.x)));
    this.y = make("select", { id: "explorer-y", onchange: (e) => state.set({ y: e.target.value, zoom: null }) }, listY(table).map((y) => option(y, Y_AXES[y].label, state.values.y)));
    this.log = make("input", { type: "checkbox", id: "explorer-log", onchange: (e) => state.set({ log: e.target.checked, zoom: null }) });
    this.colour = make("select", { id: "explorer-colour", onchange: (e) => state.set({ colour: e.target.value }) },
      [["family", "family"], ["model", "network"], ...table.keys.filter(({ name }) => name !== "model").map(({ name }) => [name, name])].map(([value, text]) => option(value, text, state.values.colour)));
    this.text = make("input", { type: "search", id: "explorer-text", placeholder: "name, setting, run id", oninput: (e) => state.set({ text: e.target.value }) });
    this.budget = make("input", { type: "range", id: "explorer-budget", min: 0, max: STEPS, oninput: (e) => this.setBudget(Number(e.target.value)) });
    this.budgetText = make("output", { for: "explorer-budget" });
    this.families = make("div", { class: "chips", role: "group", "aria-label": "families" });
    this.keys = make("div", { class: "keys" });
    this.reset = make("button", { type: "button", onclick: () => { view.reset(); this.fillKeys(); } }, "reset");
    const row = (label, input) => make("label", { for: input.id, class: "field" }, make("span", {}, label), input);
    const filters = make("details", { class: "filters" }, make("summary", {}, "filter by setting"), this.keys);
    filters.open = Object.keys(state.values.ranges).length + Object.keys(state.values.choices).length > 0;
    root.append(make("div", { class: "fields" }, row("across", this.x), row("up", this.y), row("colour", this.colour),
      make("label", { for: "explorer-log", class: "check" }, this.log, " logarithmic"), row("find", this.text)),
    this.families,
    make("div", { class: "budget" }, make("label", { for: "explorer-budget" }, "budget"), this.budget, this.budgetText), filters, this.reset);
    this.families.addEventListener("click", (event) => { if (event.target.dataset.family) this.toggleFamily(event.target.dataset.family); });
    this.fillKeys();
  }

  range() {
    let low = Infinity, high = -Infinity;
    for (const x of this.view.measured.x) if (x > 0) { low = Math.min(low, x); high = Math.max(high, x); }
    return [Math.log(low), Math.log(high)];
  }

  setBudget(step) {
    const [low, high] = this.range();
    this.view.state.set({ budget: step >= STEPS ? null : Number(Math.exp(low + ((high - low) * step) / STEPS).toPrecision(4)) });
  }

  toggleFamily(family) {
    const { state, table } = this.view, all = table.families, chosen = new Set(state.values.families ?? all);
    if (chosen.size === all.length && all.length > 1) { state.set({ families: [family] }); return; } // the first click: this one alone
    chosen.has(family) ? chosen.delete(family) : chosen.add(family);
    state.set({ families: chosen.size === all.length || !chosen.size ? null : all.filter((name) => chosen.has(name)) });
  }

  fillKeys() {
    const { table, state, view } = { ...this.view, view: this.view }, fields = [];
    const numeric = (id, name, format = String) => {
      const bounds = state.values.ranges[id] ?? [null, null];
      const bound = (side) => make("input", {
        type: "number", step: "any", value: bounds[side] === null ? null : format(bounds[side]), placeholder: side ? "max" : "min", "aria-label": `${name}, ${side ? "largest" : "smallest"}`,
        onchange: (event) => {
          const now = [...(state.values.ranges[id] ?? [null, null])];
          now[side] = event.target.value === "" ? null : Number(event.target.value);
          const { [id]: _, ...others } = state.values.ranges;
          state.set({ ranges: now.every((v) => v === null) ? others : { ...others, [id]: now } });
        },
      });
      return make("fieldset", {}, make("legend", {}, name), bound(0), " – ", bound(1));
    };
    for (const { name, number } of table.keys) {
      if (!view.differs(name)) continue;
      if (number) { fields.push(numeric(name, name)); continue; }
      const words = [...new Set(table.points.values[name].filter((v) => v !== null).map(String))].sort((a, b) => a.localeCompare(b, "en", { numeric: true })).slice(0, 40);
      fields.push(make("fieldset", { class: "words" }, make("legend", {}, name), words.map((word) => make("label", {}, make("input", {
        type: "checkbox", checked: (state.values.choices[name] ?? words).includes(word),
        onchange: (event) => {
          const chosen = new Set(state.values.choices[name] ?? words);
          event.target.checked ? chosen.add(word) : chosen.delete(word);
          const { [name]: _, ...others } = state.values.choices;
          state.set({ choices: chosen.size === words.length ? others : { ...others, [name]: words.filter((w) => chosen.has(w)) } });
        },
      }), ` ${word}`))));
    }
    fields.push(numeric("y:" + state.values.y, "accuracy, as a fraction"));
    this.keys.replaceChildren(...fields);
  }

  draw(changed) {
    const { view } = this, { state, table, measured } = view, values = state.values;
    this.x.value = values.x; this.y.value = values.y; this.colour.value = values.colour; this.log.checked = values.log;
    if (this.text.value !== values.text) this.text.value = values.text;
    if (["ranges", "choices", "y"].some((key) => changed.has(key)) && !this.keys.contains(document.activeElement)) this.fillKeys();
    const legend = view.legend();
    this.families.replaceChildren(...legend.map(({ name, colour, shape, family }) => {
      const isOn = !values.families || values.families.includes(name);
      const sign = make("span", { "aria-hidden": "true", style: `color:${colour}` }, SHAPE_SIGNS[shape] ?? "●");
      return family ? make("button", { type: "button", class: "chip", "aria-pressed": String(isOn), "data-family": name }, sign, ` ${name}`) : make("span", { class: "chip" }, sign, ` ${name}`);
    }));
    this.families.querySelectorAll("span[aria-hidden]").forEach((sign) => { sign.style.pointerEvents = "none"; });
    const [low, high] = this.range();
    this.budget.value = values.budget ? Math.round((STEPS * (Math.log(values.budget) - low)) / (high - low || 1)) : STEPS;
    const fitting = view.front.filter((i) => !values.budget || measured.x[i] <= values.budget), best = fitting.at(-1);
    this.budget.setAttribute("aria-valuetext", values.budget ? formatX(values.x, values.budget) : "none");
    this.budgetText.textContent = `${values.budget ? `at most ${formatX(values.x, values.budget)}` : "any"}: ${best === undefined ? "nothing fits" : `${table.points.label[best]}, ${formatAccuracy(measured, best)} at ${formatX(values.x, measured.x[best])}`}`;
    this.budgetText.classList.toggle("open", best !== undefined);
    this.reset.hidden = !view.isChanged;
  }
}
