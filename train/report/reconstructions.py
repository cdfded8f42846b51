"""A run's reconstruction pictures for its page: a few, evenly over the run, scaled down, as data URIs."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastmae.errors import InputError
from fastmae.train.report.history import History

_COUNT = 6
_SIZE = (720, 1800)  # pixels, width and height at most
_MAX_BYTES, _MAX_PIXELS = 64 << 20, 64 << 20  # a larger picture is not decoded


class Reconstruction(NamedTuple):
    """The picture drawn at ``step``."""

    step: int
    uri: str
    """A data URI; empty where the picture cannot be shown."""
    problem: str
    """Why it cannot be shown."""


def reconstructions(run: Path, history: History) -> tuple[list[Reconstruction], int]:
    """Those that the page shows, and how many the run in the folder ``run`` logged."""
    by_step = {e["step"]: e.get("file") for e in history.events.get("reconstruction", ()) if e["step"] is not None}
    steps = sorted(by_step)
    count = min(_COUNT, len(steps))
    found = []
    for step in (steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)):
        try:
            found.append(Reconstruction(step, _data_uri(run, by_step[step]), ""))
        except InputError as error:
            found.append(Reconstruction(step, "", str(error)))
    return found, len(steps)


def _data_uri(run: Path, file: object) -> str:
    """A PNG of the run as a JPEG's data URI. Raises InputError that says why it cannot be shown."""
    if not isinstance(file, str):
        raise InputError("the log names no file")
    try:
        path = (run / file).resolve()
        if not path.is_relative_to(run.resolve()):
            raise InputError(f"{file}: lies outside the run's folder and is not shown")
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{file}: {'too large' if path.is_file() else 'missing'}")
        with Image.open(path, formats=("PNG",)) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise InputError(f"{file}: too large")
            picture = opened.convert("RGB")
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read as a PNG") from error
    picture.thumbnail(_SIZE)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
