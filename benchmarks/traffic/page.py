"""Output of ``traffic``: tables, docs/traffic.md, whose tables are between two marks, and the predictions that they show."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmae.benchmarks.report import align, markdown
from fastmae.benchmarks.scaling.cluster import explained
from fastmae.benchmarks.traffic.contenders import CONTENDERS
from fastmae.benchmarks.traffic.cost import Rates
from fastmae.benchmarks.traffic.gpus import GPUS
from fastmae.benchmarks.traffic.predict import CHECK, COUNTED_APART, lowered, predict_traffic, row
from fastmae.errors import InputError

BEGIN, END = "<!-- traffic: begin -->", "<!-- traffic: end -->"
GROUPS = ("products", "attention", "norms, forward", "norms, backward", "GELU, forward", "GELU, backward", "bias gradients",
          "concatenation", "casts, activations", "casts, weights", "copies", "fastmae ops", "other", "optimizer")  # fmt: skip
_NAMES = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14", "small": "ViT-S/16", "tiny": "ViT-Ti/16"}
_BATCH = 256
_MODELS, _OTHER_GPUS = ("base", "large", "huge"), ("A100", "H200", "B200")


def show(section: dict) -> None:
    """Print the tables, the notes, and all of it as one JSON document in the last line."""
    for name, rows in tables(section).items():
        print(f"{name}\n\n{align(rows)}\n")
    for r in section["rows"]:
        if "kernels" in r:
            print(f"every kernel of {title(r)}\n\n{align(_kernels(r))}\n")
    for note in section["notes"]:
        print(f"note: {note}")
    print(json.dumps({"traffic": section}))


def write_page(page: Path, predictions: Path, models: Sequence[str] = ()) -> None:
    """Predict all that the page shows, and write its tables and ``predictions``; with ``models`` those alone, and the rows of
    others stay. Raises InputError if the page's marks are not there."""
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise InputError(f"{page}: the marks {BEGIN} and {END} are not there")
    section = predict_traffic(models or _MODELS, _BATCH, ("H100",), ("fp32", "bf16"), CONTENDERS)
    if "base" in (models or _MODELS):
        section["rows"] += predict_traffic(("base",), _BATCH, _OTHER_GPUS, ("fp32",), ("fastmae", "rival"))["rows"]
    known = json.loads(predictions.read_text())["rows"] if models and predictions.exists() else []
    section["rows"] += [r for r in known if r["model"] not in models]
    section["rows"].sort(
        key=lambda r: (r["gpu"] != GPUS["H100"].name, _MODELS.index(r["model"]), r["gpu"])
    )  # else as predicted
    section["check"] = row(CHECK, *lowered([CHECK]))
    section["torch"] = torch.__version__.partition("+")[0]
    predictions.parent.mkdir(exist_ok=True)
    predictions.write_text(json.dumps(section, indent=1) + "\n")
    page.write_text(with_tables(text, section))


def with_tables(text: str, section: dict) -> str:
    """The page's text with the tables of ``section`` between its marks."""
    parts = [f"## {name}\n\n{markdown(rows)}" for name, rows in tables(section).items()]
    parts.append(f"## Assumptions\n\n{markdown(assumptions())}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{rest.split(END)[1]}"


def tables(section: dict) -> dict[str, list[list[str]]]:
    """Every table, by its heading: all rows side by side, then each model's by kind of kernel."""
    found = {"Predicted steps": summary(section["rows"])}
    for model, gpu in dict.fromkeys((r["model"], r["gpu"]) for r in section["rows"]):
        rows = [r for r in section["rows"] if (r["model"], r["gpu"]) == (model, gpu)]
        found[f"{_NAMES.get(model, model)}, batch {rows[0]['batch']}, {gpu}: launches, GB and predicted ms"] = by_group(rows)
    return found


def summary(rows: list[dict]) -> list[list[str]]:
    """Table of predicted images per second, a line for each row."""
    lines = [["model", "GPU", "contender", "residual", "launches", "GB", "predicted ms", "predicted images/s", "predicted MFU",
              "x rival", "x rival, if its attention took as long"]]  # fmt: skip
    rivals = {(r["model"], r["gpu"]): r for r in rows if r["contender"] == "rival"}
    for r in rows:
        total, rival = r["forward_backward"], rivals.get((r["model"], r["gpu"]))
        lines.append([r["model"], r["gpu"].removeprefix("NVIDIA "), r["contender"], r["residual"], str(total["launches"]),
                      f"{total['bytes'] / 1e9:.1f}", f"{r['predicted_milliseconds']:.1f}",
                      f"{r['predicted_images_per_second']:.0f}", f"{r['predicted_mfu']:.1%}",
                      *_times_faster(r, rival)])  # fmt: skip
    return lines


def _times_faster(row: dict, rival: dict | None) -> tuple[str, str]:
    """Than the rival as predicted, and than one whose attention takes as long as the row's."""
    if rival is None:
        return "-", "-"
    time, of_rival = row["predicted_milliseconds"], rival["predicted_milliseconds"]
    attention, of_rivals = (r["groups"]["attention"]["milliseconds"] for r in (row, rival))
    return f"{of_rival / time:.2f}", f"{(of_rival - of_rivals + attention) / time:.2f}"


def by_group(rows: list[dict]) -> list[list[str]]:
    """Table of a model's rows by kind of kernel."""
    lines = [["kind of kernel", *(f"{r['contender']}, {r['residual']}" for r in rows)]]
    for group in [g for g in GROUPS if any(g in r["groups"] for r in rows)]:
        lines.append([group, *(_cell(r["groups"].get(group), group) for r in rows)])
    totals = [r["forward_backward"] for r in rows]
    times = [r["predicted_milliseconds"] for r in rows]
    lines.append(
        ["total", *(f"{t['launches']} / {t['bytes'] / 1e9:.1f} / {ms:.1f}" for t, ms in zip(totals, times, strict=True))]
    )
    return lines


def assumptions() -> list[list[str]]:
    """Table of the model's rates."""
    origins = explained(Rates)
    return [["rate", "value", "what it is"],
            *([f"`{name}`", f"{value:g}", origins[name]] for name, value in dataclasses.asdict(Rates()).items())]  # fmt: skip


def title(row: dict) -> str:
    """A row in words."""
    return f"{row['contender']}, {row['model']}, batch {row['batch']}, residual {row['residual']}, {row['gpu']}"


def _cell(found: dict | None, group: str) -> str:
    if not found:
        return "-"
    size = "" if group in COUNTED_APART else f"{found['bytes'] / 1e9:.2f}"
    return f"{found['launches']} / {size or '-'} / {found['milliseconds']:.2f}"


def _kernels(row: dict) -> list[list[str]]:
    lines = [["times", "pass", "kind", "launches", "MB each", "kernel", "reads and writes"]]
    for k in row["kernels"]:
        lines.append([str(k["times"]), "backward" if k["is_backward"] else "forward", k["group"], str(k["launches"]),
                      f"{k['bytes'] / 1e6:.2f}", "+".join(k["names"])[:100], ", ".join(k["tensors"])[:200]])  # fmt: skip
    return lines
