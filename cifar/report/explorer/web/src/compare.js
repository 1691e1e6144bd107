// Two fields in which the reader types what to compare: each sets a pin.

import { normalise } from "./data.js";
import { make } from "./dom.js";

const MAX_OFFERED = 20;

export class Compare {
  constructor(view, root) {
    this.view = view;
    this.inputs = [0, 1].map((slot) => make("input", {
      type: "search", id: `explorer-compare${slot}`, list: `explorer-offers${slot}`, autocomplete: "off", placeholder: "network or setting",
      "aria-label": slot ? "compare with" : "compare", oninput: () => this.offer(slot), onchange: () => this.pin(slot),
    }));
    this.offers = [0, 1].map((slot) => make("datalist", { id: `explorer-offers${slot}` }));
    this.said = make("span", { class: "hint", role: "status" });
    root.append(make("h3", {}, "Compare"), this.inputs[0], " with ", this.inputs[1], ...this.offers, this.said);
  }

  // Points that have all words, the most accurate one first; those that are shown before the others.
  match(text) {
    const { table, measured, isShown } = this.view, words = normalise(text.replaceAll(",", " ")).split(/\s+/).filter(Boolean);
    const found = [];
    for (let i = 0; i < table.count; i++) if (Number.isFinite(measured.y[i]) && words.every((word) => table.texts[i].includes(word))) found.push(i);
    const exact = table.points.label.indexOf(text);
    if (exact >= 0) return [exact];
    const named = found.filter((i) => words.includes(normalise(table.points.model[i]))); // resnet20, not preact_resnet20
    const fitting = named.length ? named : found, shown = fitting.filter((i) => isShown[i]);
    return (shown.length ? shown : fitting).sort((a, b) => measured.y[b] - measured.y[a]);
  }

  offer(slot) {
    const { table } = this.view, text = this.inputs[slot].value;
    if (table.points.label.includes(text)) { this.pin(slot); return; } // one of the list was taken
    this.offers[slot].replaceChildren(...this.match(text).slice(0, MAX_OFFERED).map((i) => make("option", { value: table.points.label[i] })));
  }

  pin(slot) {
    const { view } = this, { state, table } = view, text = this.inputs[slot].value.trim(), pins = view.pinned.map((i) => view.idOf(i));
    const found = text ? this.match(text) : [], at = pins.length > slot ? slot : pins.length;
    if (text && !found.length) { this.said.textContent = `nothing has “${text}”`; return; }
    this.said.textContent = found.length > 1 ? `the most accurate of ${found.length} points that have “${text}”` : "";
    const others = pins.filter((_, n) => n !== at);
    if (!found.length) state.set({ pins: others });
    else if (!others.includes(view.idOf(found[0]))) { others.splice(at, 0, view.idOf(found[0])); state.set({ pins: others.slice(0, 8) }); }
    if (found.length) this.inputs[slot].value = table.points.label[found[0]];
  }

  draw() {
    const { pinned, compared, table } = this.view, shown = compared.length ? compared : pinned;
    this.inputs.forEach((input, slot) => { if (document.activeElement !== input || !input.value) input.value = shown[slot] === undefined ? "" : table.points.label[shown[slot]]; });
  }
}
