"""The table of results: the JSONs of all benchmarks -> markdown.

    python -m benchmarks.table [--results DIR] [--into README.md]

`--into` replaces what stands between the lines `<!-- benchmarks -->` and `<!-- /benchmarks -->` of a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, number

HEAD = "| row | what | ours | beside it | ratio (95 % interval) | wanted |\n|---|---|---|---|---|---|"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of the rows."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((result for result in found if "claims" in result), key=lambda r: (_order(r["row"]), r["name"]))


def _order(row: str) -> tuple[int, str]:
    return (int(row), "") if row.isdigit() else (99, row)


def ratio_text(claim: dict[str, Any]) -> str:
    if "ratio" not in claim:
        return ""
    interval = claim["interval"]
    return number(claim["ratio"]) + (f" ({number(interval[0])}–{number(interval[1])})" if interval else "")


def wanted_text(claim: dict[str, Any]) -> str:
    return f"{claim['wanted']}{'' if claim['met'] else ' (**not met**)'}" if "wanted" in claim else ""


def claim_lines(result: dict[str, Any]) -> list[str]:
    """A line a claim, then one a thing that was skipped, for a terminal."""
    lines = []
    for claim in result["claims"]:
        beside = f" | {claim['peer']}" if claim["peer"] else ""
        ratio = f" | ratio {ratio_text(claim)}" if "ratio" in claim else ""
        wanted = f" | wanted {claim['wanted']}: {'met' if claim['met'] else 'NOT met'}" if "wanted" in claim else ""
        lines.append(f"{result['row']:>3}  {claim['what']}: {claim['ours']}{beside}{ratio}{wanted}")
    return [*lines, *(f"{result['row']:>3}  skipped: {each['who']} ({each['why']})" for each in result["skipped"])]


def ran_on(result: dict[str, Any]) -> str:
    versions = result["versions"]
    data = "official CIFAR-10" if result["official"] else "stand-in images"
    smoke = "; toy sizes, the figures mean nothing" if result["smoke"] else ""
    return f"{result['device']}, {result['cores']} cores, torch {versions['torch']}, {data}, {result['date']}{smoke}"


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """One table a machine, data set and day, then what was skipped, then the commands."""
    places: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        places.setdefault(ran_on(result), []).append(result)
    parts = []
    for place, rows in places.items():
        lines = [f"{place}:", "", HEAD]
        for result in rows:
            for claim in result["claims"]:
                cells = [result["row"], claim["what"], claim["ours"], claim["peer"], ratio_text(claim), wanted_text(claim)]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        skipped = [f"{each['who']} (row {r['row']}: {each['why']})" for r in rows for each in r["skipped"]]
        lines += ["", f"Skipped: {'; '.join(skipped)}."] if skipped else []
        commands = [f"`{result['command']}`" for result in rows if result["claims"]]
        lines += ["", f"Made by {', '.join(commands)}."] if commands else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    text = markdown(read(options.results))
    if not options.into:
        print(text)
        return 0
    whole = options.into.read_text()
    if BEGIN not in whole or END not in whole:
        print(f"error: {options.into} lacks the lines {BEGIN} and {END}; add them where the table goes", file=sys.stderr)
        return 2
    before, after = whole.partition(BEGIN)[0], whole.partition(END)[2]
    options.into.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
