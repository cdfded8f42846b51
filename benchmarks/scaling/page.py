"""Output of ``scaling``: its tables, its chart, and docs/scaling.md, whose tables are between two marks."""

import hashlib
import json
import math
from pathlib import Path

from fastmae.benchmarks.report import align, markdown
from fastmae.benchmarks.scaling.cluster import Cluster, explained
from fastmae.benchmarks.scaling.collectives import trained_elements
from fastmae.benchmarks.scaling.model import WAYS
from fastmae.benchmarks.scaling.peers import table as peers_table
from fastmae.errors import InputError
from fastmae.model.config import preset
from fastmae.model.flops import training_flops

BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
# (key of a row, how it is shared, label, colour, style)
_LINES = (
    ("gpu_milliseconds", ("ddp", "fp32"), "DDP, fp32", "#c8501e", "-"),
    ("gpu_milliseconds", ("hsdp", "bf16"), "HSDP, bf16", "#1f5fa8", "-"),
    ("work_milliseconds", ("ddp", "fp32"), "the work alone", "#222222", (0, (4, 2))),
    ("cpu_milliseconds", ("ddp", "fp32"), "vote + launches", "#8a8a8a", (0, (1, 1.5))),
)
_NAMES = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14"}
_INK, _GRID = "#333333", "#e6e6e6"
_APART = 1.42  # ratio of two labels' positions on the logarithmic axis, at least


def tables(section: dict) -> dict[str, list[list[str]]]:
    """Every table, by its heading."""
    batch, images = section["effective_batch"], section["micro_batch"]
    found = {
        f"Strong scaling: {batch} images per step": scaling_table(section["strong"]),
        f"Weak scaling: {images} images per GPU": scaling_table(section["weak"]),
        "What is sent in a step, MB": sent_table(section),
        "What a GPU holds": model_table(section),
    }
    if section["loader"]:
        first = section["loader"][0]
        name = f"Loader throughput needed ({first['images_per_second_per_core']:.0f} images/s per core, {first['measured_on']})"
        found[name] = loader_table(section)
    found["What others reached"] = [*peers_table(), _own_share(section["cluster"])]
    found["Parameters"] = parameter_table(section)
    return found


def show(section: dict) -> None:
    """Print the tables, the notes, and all of it as one JSON document in the last line."""
    for name, rows in tables(section).items():
        print(f"{name}\n\n{align(rows)}\n")
    for note in section["notes"]:
        print(f"note: {note}")
    print(json.dumps({"scaling": section}))


def write_page(page: Path, section: dict) -> None:
    """Write the tables between the page's two marks, and the chart beside it. Raises InputError if the marks are not there."""
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise InputError(f"{page}: the marks {BEGIN} and {END} are not there")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{body(section)}\n{END}{rest.split(END)[1]}")
    draw(section, page.with_suffix(".png"))


def body(section: dict) -> str:
    """The text between the marks."""
    parts = [f"## {name}\n\n{markdown(rows)}" for name, rows in tables(section).items()]
    return "\n\n".join(["\n".join(f"- {line}" for line in findings(section)), *parts])


def digest(section: dict) -> str:
    """Of the numbers that are drawn; written into the picture, so that a test recognises an old one."""
    drawn = [[round(_value(r, key), 6) for r in section["strong"] + section["weak"]] for key in sorted({x[0] for x in _LINES})]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def draw(section: dict, path: Path) -> None:
    """Write the chart, a PNG: a panel for each model, strong scaling above, weak below."""
    from matplotlib.figure import Figure  # slow to import

    models = list(dict.fromkeys(r["model"] for r in section["strong"]))
    figure = Figure(figsize=(1.6 + 3.2 * len(models), 6.6), layout="constrained", dpi=130, facecolor="white")
    panels = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row")
    kinds = (("strong", f"{section['effective_batch']} images per step"), ("weak", f"{section['micro_batch']} images per GPU"))
    for (kind, title), row in zip(kinds, panels, strict=True):
        for model, panel in zip(models, row, strict=True):
            _panel(panel, [r for r in section[kind] if r["model"] == model])
            panel.set_title(f"{_NAMES.get(model, model)}, {title}", fontsize=9.5, color=_INK, loc="left")
        row[0].set_ylabel("step, ms", fontsize=9, color=_INK)
    for panel in panels[1]:
        panel.set_xlabel("GPUs", fontsize=9, color=_INK)
    _label(panels[0][-1])
    figure.savefig(path, metadata={"Description": digest(section), "Software": None})


def findings(section: dict) -> list[str]:
    """What the tables show, a line for each model, with DDP and float32 gradients, the default."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in section["strong"]):
        strong, weak = ([r for r in section[kind] if r["model"] == model] for kind in ("strong", "weak"))
        plain = [r for r in strong if (r["parallel"], r["reduce"]) == WAYS[0]]
        fastest = min(plain, key=lambda r: r["milliseconds"])
        half = [str(r["gpus"]) for r in plain if r["efficiency"] < 0.5]
        waits = [str(r["gpus"]) for r in plain if r["gpu_milliseconds"] < r["milliseconds"]]
        least = min(r["efficiency_without_vote"] for r in weak)
        lines.append(
            f"**{model}**: {section['effective_batch']} images per step are fastest on {fastest['gpus']} GPUs"
            + (f" (800 epochs in {fastest['hours_of_800_epochs']:.1f} h)" if "hours_of_800_epochs" in fastest else "")
            + (f"; from {half[0]} GPUs on less than half of a step is work" if half else "")
            + (f"; from {waits[0]} GPUs on they wait for vote and launches" if waits else "")
            + f". With {section['micro_batch']} images per GPU at least {least:.0%} of a step is work, not counting the vote."
        )
    return lines


def scaling_table(rows: list[dict]) -> list[list[str]]:
    """Table of strong or weak scaling: a line for each model and number of GPUs."""
    has_hours = "hours_of_800_epochs" in rows[0]
    lines = [["model", "GPUs", "images per GPU", "work, ms", "CPU, ms", *(f"{how.upper()} {reduce}" for how, reduce in WAYS),
              "efficiency", "without vote", "images/s", *(["800 epochs, h"] if has_hours else [])]]  # fmt: skip
    for model, gpus in dict.fromkeys((r["model"], r["gpus"]) for r in rows):
        ways = [r for r in rows if (r["model"], r["gpus"]) == (model, gpus)]
        first, cpu = ways[0], ways[0]["launches_milliseconds"] + ways[0]["vote_milliseconds"]
        lines.append([first["model"], str(first["gpus"]), str(first["images_per_gpu"]), f"{first['work_milliseconds']:.1f}",
                      f"{cpu:.1f}", *(f"{r['gpu_milliseconds']:.1f}" for r in ways), f"{first['efficiency']:.0%}",
                      f"{first['efficiency_without_vote']:.0%}", f"{first['images_per_second']:.0f}",
                      *([f"{first['hours_of_800_epochs']:.1f}"] if has_hours else [])])  # fmt: skip
    return lines


def sent_table(section: dict) -> list[list[str]]:
    """Table of what is sent, in MB."""
    lines = [["model", "GPUs", "shared by", "collectives", "all-reduced", "gathered", "scattered", "sent by a GPU",
              "by its network card"]]  # fmt: skip
    for r in section["sent"]:
        sizes = ("all_reduce_bytes", "all_gather_bytes", "reduce_scatter_bytes", "sent_bytes", "card_bytes")
        lines.append([r["model"], str(r["gpus"]), f"{r['parallel'].upper()} {r['reduce']}", str(r["collectives"]),
                      *(f"{r[size] / 1e6:.0f}" for size in sizes)])  # fmt: skip
    return lines


def model_table(section: dict) -> list[list[str]]:
    """The models, and the memory that they hold on a GPU of a run on all of them; without activations."""
    lines = [["model", "trained parameters", "GFLOP per image", *(f"held by {how.upper()}, GB" for how in ("ddp", "hsdp"))]]
    for model in dict.fromkeys(r["model"] for r in section["weak"]):
        held = {r["parallel"]: r["held_bytes"] for r in section["weak"] if r["model"] == model and r["reduce"] == "fp32"}
        lines.append([model, f"{trained_elements(preset(model))}", f"{training_flops(preset(model), 0.75) / 1e9:.1f}",
                      f"{held['ddp'] / 1e9:.1f}", f"{held['hsdp'] / 1e9:.1f}"])  # fmt: skip
    return lines


def loader_table(section: dict) -> list[list[str]]:
    """Table of the throughput that the loader needs."""
    lines = [["model", "images/s per machine", "cores at the measured rate", "MB/s read"]]
    for r in section["loader"]:
        lines.append([r["model"], f"{r['images_per_second']:.0f}", f"{r['cores']:.1f}", f"{r['bytes_per_second'] / 1e6:.0f}"])
    return lines


def _own_share(cluster: dict) -> list[str]:
    """The last row of what others reached: what is assumed here."""
    share = cluster["matmul_flops"] * cluster["utilisation"] / cluster["sheet_flops"]
    return ["this page", "any", "as below", "", "", "", f"{share:.0%}", "an assumption"]


def parameter_table(section: dict) -> list[list[str]]:
    """What was assumed, and where each value comes from."""
    origins = explained(Cluster)
    return [["parameter", "value", "unit and origin"],
            *([f"`{name}`", f"{value:g}", origins[name]] for name, value in section["cluster"].items())]  # fmt: skip


def _panel(panel, rows: list[dict]) -> None:
    from matplotlib.ticker import LogLocator

    for key, way, label, color, style in _LINES:
        points = sorted((r["gpus"], _value(r, key)) for r in rows if (r["parallel"], r["reduce"]) == way)
        panel.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.8, label=label)
    gpus = sorted({r["gpus"] for r in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(gpus, [str(g) for g in gpus])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()
    panel.grid(color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    panel.spines[:].set_visible(False)


def _label(panel) -> None:
    """Each line's name behind its end, moved down where two would overlap."""
    above = math.inf
    for line in sorted(panel.get_lines(), key=lambda x: -x.get_ydata()[-1]):
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        above = min(y, above / _APART)
        panel.annotate(line.get_label(), (x, above), (7, 0), textcoords="offset points", color=line.get_color(), va="center",
                       fontsize=9.5, annotation_clip=False)  # fmt: skip


def _value(row: dict, key: str) -> float:
    return row["vote_milliseconds"] + row["launches_milliseconds"] if key == "cpu_milliseconds" else row[key]
