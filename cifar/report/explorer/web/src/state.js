// What the reader has chosen. It lives in the address, so that a view can be sent.

export const DEFAULTS = {
  x: "macs", y: "val", log: true, colour: "family", text: "", families: null, tags: [], ranges: {}, choices: {}, budget: null,
  selected: null, pins: [], zoom: null, sort: "front", descending: true, differing: true, list: "points", curve: "val/acc",
};

const isEqual = (a, b) => JSON.stringify(a) === JSON.stringify(b);

export class State {
  // isAllowed(key, value): whether the page has such a thing; an address may name anything.
  constructor(defaults, isAllowed) {
    this.defaults = { ...DEFAULTS, ...defaults };
    this.isAllowed = isAllowed;
    this.values = { ...this.defaults };
    this.listeners = [];
    this.changed = new Set();
    this.frame = 0;
    this.readAddress();
    addEventListener("hashchange", () => {
      if (location.hash === this.hash) return;
      this.readAddress();
      this.hash = location.hash;
      this.notify(Object.keys(DEFAULTS));
    });
  }

  readAddress() {
    this.values = { ...this.defaults };
    try {
      const given = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
      for (const [key, value] of Object.entries(given))
        if (Object.hasOwn(DEFAULTS, key) && isOfKind(value, this.defaults[key], key) && this.isAllowed(key, value)) this.values[key] = value;
    } catch { /* an address that somebody has cut: the view as it is at first */ }
  }

  set(patch) {
    const keys = Object.keys(patch).filter((key) => !isEqual(this.values[key], patch[key]));
    if (!keys.length) return;
    Object.assign(this.values, patch);
    const chosen = Object.fromEntries(Object.entries(this.values).filter(([key, value]) => !isEqual(value, this.defaults[key])));
    this.hash = Object.keys(chosen).length ? `#${encodeURIComponent(JSON.stringify(chosen))}` : "";
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.writeAddress(), 120);
    this.notify(keys);
  }

  writeAddress() { if (this.hash !== undefined) history.replaceState(null, "", this.hash || location.pathname + location.search); }

  notify(keys) {
    keys.forEach((key) => this.changed.add(key));
    this.frame ||= requestAnimationFrame(() => {
      const changed = this.changed;
      this.changed = new Set();
      this.frame = 0;
      this.listeners.forEach((listener) => listener(changed));
    });
  }

  onChange(listener) { this.listeners.push(listener); }
}

function isOfKind(value, example, key) {
  const isPlain = (v) => v !== null && typeof v === "object" && !Array.isArray(v);
  if (key === "families") return value === null || (Array.isArray(value) && value.every((v) => typeof v === "string"));
  if (key === "tags") return Array.isArray(value) && value.every((v) => typeof v === "string");
  if (key === "pins") return Array.isArray(value) && value.every((v) => typeof v === "string") && value.length <= 12;
  if (key === "selected") return value === null || typeof value === "string";
  if (key === "budget") return value === null || Number.isFinite(value);
  if (key === "zoom") return value === null || (Array.isArray(value) && value.length === 4 && value.every(Number.isFinite));
  if (key === "ranges") return isPlain(value) && Object.values(value).every((v) => Array.isArray(v) && v.length === 2 && v.every((b) => b === null || Number.isFinite(b)));
  if (key === "choices") return isPlain(value) && Object.values(value).every((v) => Array.isArray(v) && v.every((word) => typeof word === "string"));
  return typeof value === typeof example;
}
