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
const banner = `/* Built by web/build.mjs; licences in LICENSES.txt; sources ${digest.digest("hex")} */\n`;
writeFileSync("../explorer.js", banner + result.outputFiles[0].text.replaceAll("</script", "<\\/script"));
const packages = [...new Set(Object.keys(result.metafile.inputs).map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean))].sort();
writeFileSync("../LICENSES.txt", packages.map((name) => {
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  return `${name} ${version}\n\n${readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim()}\n`;
}).join("\n----\n\n"));
console.log(packages.join(" "), result.outputFiles[0].contents.length, "bytes");
