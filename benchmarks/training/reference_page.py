"""Output of ``reference-run --docs``: the committed result, and docs/reference.md, its table between two marks, its picture."""

import hashlib
import json
from pathlib import Path

from fastmae.benchmarks.report import markdown
from fastmae.benchmarks.training.reference_run import deviations, table
from fastmae.errors import InputError
from fastmae.optional import require

NAME = "reference run"
BEGIN, END = "<!-- reference run: begin -->", "<!-- reference run: end -->"
_COLORS = {"float64": "#1f5fa8", "float32": "#c8501e", "bf16 autocast": "#6a8a2c"}
_INK, _GRID, _PALE = "#333333", "#e6e6e6", "#f2b98f"


def write_page(page: Path, result: Path, section: dict) -> None:
    """Write ``section``, with its environment, to ``result``, the text between the page's two marks, and the picture beside it.

    Raises InputError, before anything is written, if the marks or matplotlib are missing.
    """
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise InputError(f"{page}: the marks {BEGIN} and {END} are not there")
    draw(section, page.with_suffix(".png"))
    result.write_text(to_json(section))
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{body(section)}\n{END}{rest.split(END)[1]}")


def to_json(section: dict) -> str:
    """The result file: a line for each key, so that curves do not fill a thousand lines."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
    return f"{{{json.dumps(NAME)}: {{\n{lines}\n}}}}\n"


def body(section: dict) -> str:
    """The text between the marks."""
    rows = {r["precision"]: r for r in section["rows"]}
    exact, single = rows["float64"], rows["float32"]
    environment = section["environment"]
    model = section["model"]
    widths = ", decoder ".join(f"{model[f'{part}depth']} x {model[f'{part}embed_dim']}" for part in ("", "decoder_"))
    made_on = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "commit", "date"))
    return "\n\n".join([
        f"- float64: the largest deviation of a loss is {exact['largest']:.1e}, over {section['steps']} updates; allowed is "
        f"{section['limit']:.0e}.\n"
        f"- float32: it is {single['largest']:.1e}. The reference's own losses are up to {single['reference_error']:.1e} from "
        f"those it has in float64 (below: its error), fastmae's up to {single['fastmae_error']:.1e}.",
        markdown(table(section)),
        f"{section['notes'][0]}, {model['img_size'][0]} pixels wide, in patches of {model['patch_size']}. Encoder {widths}; "
        f"learning rate {section['peak']:g} after a warm-up of {section['warmup']:.0%}, {section['minimum']:g} at the end. "
        f"`{environment['command']}` on {environment['device']} ({made_on}).",
    ])  # fmt: skip


def digest(section: dict) -> str:
    """Of the curves that are drawn; written into the picture, so that a test recognises an old one."""
    return hashlib.sha256(json.dumps([r["losses"] for r in section["rows"]]).encode()).hexdigest()[:16]


def draw(section: dict, path: Path) -> None:
    """Write the picture, a PNG: both curves over each other, and their deviation. Raises InputError without matplotlib."""
    figure = require("matplotlib.figure", "a plot").Figure(figsize=(10, 3.6), layout="constrained", dpi=85, facecolor="white")
    left, right = figure.subplots(1, 2)
    exact = next(r for r in section["rows"] if r["precision"] == "float64")["losses"]
    left.plot(exact["reference"], color=_PALE, linewidth=5, label=section["against"])
    left.plot(exact["fastmae"], color=_COLORS["float64"], linewidth=1.2, label="fastmae")
    left.set_ylabel("loss, float64", color=_INK)
    left.legend(frameon=False, labelcolor=_INK)
    for row in section["rows"]:
        apart = deviations(row["losses"]["fastmae"], row["losses"]["reference"])
        points = [(t, d) for t, d in enumerate(apart) if d > 0]  # the others are equal to the last bit
        equal = f" ({len(apart) - len(points)} of {len(apart)} equal)" if len(points) < len(apart) else ""
        x, y = zip(*points, strict=True) if points else ((), ())
        right.plot(x, y, ".", markersize=3, color=_COLORS[row["precision"]], label=f"{row['precision']}{equal}")
    right.axhline(section["limit"], color=_INK, linewidth=0.8, linestyle=(0, (4, 2)), label="allowed in float64")
    right.set_yscale("log")
    right.set_ylim(1e-17, 1)
    right.set_ylabel("relative deviation of the loss", color=_INK)
    right.legend(frameon=False, labelcolor=_INK, loc="upper right", ncols=2, fontsize=8.5)
    for panel in (left, right):
        panel.set_xlabel("update", color=_INK)
        panel.grid(color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(length=0, labelcolor=_INK)
        panel.spines[:].set_visible(False)
    figure.savefig(path, metadata={"Description": digest(section), "Software": None})
