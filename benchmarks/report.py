"""Results: tables on the console, one JSON document, result files, plots and README's table.

A result file is ``<device>-<date>.json``: the environment of each section beside its numbers. The same day's sections of one
device are in one file, so that long benchmarks can be run one by one.
"""

import json
import re
from pathlib import Path

from fastmae.errors import InputError
from fastmae.optional import require

README_BEGIN, README_END = "<!-- results: begin -->", "<!-- results: end -->"
_COLORS = {"reference": "tab:gray", "rival": "tab:orange", "fastmae": "tab:blue", "hf": "tab:olive", "lightly": "tab:green",
           "crossmae": "tab:purple"}  # fmt: skip


def align(rows: list[list[str]]) -> str:
    """Rows of cells as aligned columns, the first row the header; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_number = [all(re.fullmatch(r"[-+]?[\d.]+%?|-|", row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, is_number, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table."""
    head, *body = [[cell or " " for cell in row] for row in rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)])


def save(folder: Path, name: str, section: dict, rows: list[list[str]]) -> tuple[list[Path], str]:
    """Add the section ``name`` to the day's file in ``folder``; write JSON, Markdown and, for a step or a waterfall, a plot.

    ``rows`` is its table. Returns the paths written, and a message if matplotlib is missing. Raises InputError if the day's
    file exists and is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = section["environment"]
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = folder / f"{slug}-{environment['date'][:10]}.json"
    try:
        document = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: damaged, {error}; move or delete it") from error
    document[name] = {**section, "table": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    page, written, missing = path.with_suffix(".md"), [path, path.with_suffix(".md")], ""
    draw = {"step": _draw_steps, "waterfall": _draw_waterfall}.get(name.split()[0])
    if draw:
        picture = folder / f"{path.stem}-{name.replace(' ', '-')}.png"
        try:
            draw(section, picture)
            written.append(picture)
        except InputError as error:  # no matplotlib where `make gpu` installs nothing: the numbers matter more
            missing = f"; {error}"
    page.write_text(_page(document, path.stem, folder))
    return written, missing


def readme_table(folder: Path) -> str:
    """README's tables: of every committed result the step, each contender at the batch where it is fastest, and the loader."""
    rows = [["device", "model", "fastmae, images/s", "x rival", "x reference", "peak memory, x reference"]]
    for path in sorted(folder.glob("*.json")):
        steps = [section for name, section in json.loads(path.read_text()).items() if name.split()[0] == "step"]
        if steps:
            rows += _best_rows([row for section in steps for row in section["rows"]], steps[0]["environment"]["device"], path)
    if len(rows) == 1:
        return "No result has been committed."
    loader = _loader_rows(folder)
    return markdown(rows) + (f"\n\n{markdown(loader)}" if len(loader) > 1 else "")


def _loader_rows(folder: Path) -> list[list[str]]:
    rows = [["device", "from shards to batches", "images/s per core", "x reference", "of the same work bare"]]
    for path in sorted(folder.glob("*.json")):
        section = json.loads(path.read_text()).get("loader")
        for row in section["rows"] if section else ():
            if "per_core_over_reference" in row:
                device = f"[{section['environment']['device']}](benchmarks/results/{path.with_suffix('.md').name})"
                share = f"{row['efficiency']:.2f}" if "efficiency" in row else "-"
                speeds = f"{row['images_per_second_per_core']:.0f}", f"{row['per_core_over_reference']:.2f}"
                rows.append([device, row["pipeline"], *speeds, share])
    return rows


def _best_rows(rows: list[dict], device: str, path: Path) -> list[list[str]]:
    found = []
    device = f"[{device}](benchmarks/results/{path.with_suffix('.md').name})"
    for model in dict.fromkeys(r["model"] for r in rows):
        best = {}
        for row in (r for r in rows if r["model"] == model):
            best[row["contender"]] = max(best.get(row["contender"], row), row, key=lambda r: r["images_per_second"])
        if "fastmae" in best:
            ours = best["fastmae"]
            speeds = [_ratio(ours, best.get(other), other) for other in ("rival", "reference")]
            memory = f"{ours['memory_over_reference']:.2f}" if "memory_over_reference" in ours else "-"
            found.append([device, f"{model}, batch {ours['batch']}", f"{ours['images_per_second']:.2f}", *speeds, memory])
    return found


def _ratio(ours: dict, other: dict | None, name: str) -> str:
    """Best over best: the ratio within rounds if the batch is the same, else of the two medians."""
    if other is None:
        return "-"
    if other["batch"] == ours["batch"] and f"speed_over_{name}" in ours:
        return f"{ours[f'speed_over_{name}']:.2f}"
    return f"{ours['images_per_second'] / other['images_per_second']:.2f}"


def update_readme(readme: Path, folder: Path) -> None:
    """Write ``readme_table`` between README's two marks. Raises InputError if these are missing."""
    text = readme.read_text()
    if README_BEGIN not in text or README_END not in text:
        raise InputError(f"{readme}: the marks {README_BEGIN} and {README_END} are missing")
    head, rest = text.split(README_BEGIN)
    readme.write_text(f"{head}{README_BEGIN}\n{readme_table(folder)}\n{README_END}{rest.split(README_END)[1]}")


def _page(document: dict, stem: str, folder: Path) -> str:
    first = next(iter(document.values()))["environment"]
    parts = [f"# {first['device']}, {first['date'][:10]}"]
    for name, section in document.items():
        environment = ", ".join(f"{k} {v}" for k, v in section["environment"].items() if v is not None and k != "command")
        parts += [f"## {name}", f"`{section['environment']['command']}`", environment, markdown(section["table"])]
        parts += ["\n".join(f"- {note}" for note in section["notes"])] if section["notes"] else []
        picture = f"{stem}-{name.replace(' ', '-')}.png"
        parts += [f"![{name}]({picture})"] if (folder / picture).exists() else []
    return "\n\n".join(parts) + "\n"


def _figure(width: float, height: float, columns: int = 1):
    figure = require("matplotlib.figure", "a plot").Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _draw_steps(section: dict, path: Path) -> None:
    """Images per second and peak memory against the batch; bars where only one batch was measured."""
    rows, device = section["rows"], section["environment"]["device"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = _figure(9, 3.6, 2)
    only_one = len({r["batch"] for r in rows}) == 1
    for axis, key, scale, label in (
        (axes[0], "images_per_second", 1, "images/s"),
        (axes[1], "peak_memory", 2**-30, "peak memory, GiB"),
    ):
        if only_one:
            bars = [(f"{r['contender']}\n{r['model']}", r[key] * scale, _COLORS[r["contender"]]) for r in rows]
            drawn = axis.bar([b[0] for b in bars], [b[1] for b in bars], color=[b[2] for b in bars])
            axis.bar_label(drawn, fmt="%.2f")
        else:
            for model, style in zip(models, ("-o", "--s", ":^", "-.d", "-x"), strict=False):
                for who, color in _COLORS.items():
                    points = sorted((r["batch"], r[key] * scale) for r in rows if r["model"] == model and r["contender"] == who)
                    if points:
                        axis.plot(*zip(*points, strict=True), style, color=color, label=f"{who}, {model}")
            axis.set_xscale("log", base=2)
            batches = sorted({r["batch"] for r in rows})
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.set_xlabel("images per step")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    if not only_one:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    batch = f", batch {rows[0]['batch']}" if only_one else ""
    figure.suptitle(f"A training step on {device}{batch}", fontsize="medium")
    figure.savefig(path)


def _draw_waterfall(section: dict, path: Path) -> None:
    """Speed with each switch alone, relative to fastmae unchanged."""
    rows = section["rows"][1:]
    figure, (axis,) = _figure(8, 0.6 + 0.4 * len(rows))
    names = [("+ " if r["adds"] else "") + r["switch"] for r in rows]
    colors = ["tab:blue" if r["adds"] else "tab:orange" for r in rows]
    drawn = axis.barh(names[::-1], [r["speed"] for r in rows][::-1], color=colors[::-1])
    axis.bar_label(drawn, fmt="%.3f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.15 * max(1, *(r["speed"] for r in rows)))
    axis.set_xlabel("speed relative to fastmae")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{section['model']}, batch {section['batch']}, {section['environment']['device']}", fontsize="medium")
    figure.savefig(path)
