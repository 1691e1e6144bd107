// Elements from text. Texts are never markup: a name of a run may be anything.

export function make(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// What a change does away with and makes again keeps the focus of the keyboard.
export function keepFocus(root, change) {
  const active = document.activeElement, name = root.contains(active) && active.tagName + Object.entries(active.dataset).map(([key, value]) => `[data-${key}="${CSS.escape(value)}"]`).join("");
  change();
  if (name && name.includes("[") && !active.isConnected) root.querySelector(name)?.focus({ preventScroll: true });
}

// Of what a reader or an address may name: nothing that every object has.
export const own = (object, key) => (Object.hasOwn(object, key) ? object[key] : undefined);

export function download(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 5000);
}

// Whether the text is in the clipboard now. A page on plain http has none.
export const copyText = (text) => (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => true, () => false);

// A cell that no spreadsheet takes for a formula, quoted where it has to be.
export function csvCell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  if (typeof value === "number") return String(value);
  const text = /^\s*[=+\-@\t\r\n＝＋－＠]/.test(value) && !Number.isFinite(Number(value)) ? `'${value}` : value;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// A picture of an SVG of our own, twice as large: as PNG.
export async function rasterise(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const canvas = make("canvas", { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}
