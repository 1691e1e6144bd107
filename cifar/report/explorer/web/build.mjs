// Joins the sources and the parts of d3 that they use into ../explorer.js, and the licences into ../LICENSES.txt.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const sources = ["package-lock.json", "build.mjs", ...readdirSync("src").sort().map((name) => `src/${name}`)];
const digest = createHash("sha256");
for (const name of sources) digest.update(readFileSync(name));
const result = await build({
  entryPoints: ["src/main.js"], bundle: true, minify: true, format: "iife", target: "es2022", write: false, metafile: true, legalComments: "none", charset: "ascii",
});
const packages = [...new Set(Object.keys(result.metafile.inputs).map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean))].sort();
const named = packages.map((name) => ({
  name: `${name} ${JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version}`, text: readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim(),
}));
writeFileSync("../LICENSES.txt", named.map(({ name, text }) => `${name}\n\n${text}\n`).join("\n----\n\n"));
// The page carries the licences as well, each text once.
const byText = new Map();
for (const one of named) {
  const text = one.text.replace(/^Copyright.*$/gm, "").trim();
  byText.set(text, [...(byText.get(text) ?? []), one]);
}
const licences = [...byText].map(([text, group]) => [...new Set(group.map(({ name, text: whole }) => `${name}: ${whole.match(/^Copyright.*$/gm)?.join("; ")}`)), "", text].join("\n")).join("\n\n");
const banner = `/* Built by web/build.mjs; sources ${digest.digest("hex")} */\n/* It has parts of these libraries.\n\n${licences.replaceAll("*/", "* /")}\n*/\n`;
writeFileSync("../explorer.js", banner + result.outputFiles[0].text.replaceAll("</script", "<\\/script"));
console.log(packages.join(" "), result.outputFiles[0].contents.length, "bytes");
