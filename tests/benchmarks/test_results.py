"""Results for people: files, pages, plots and README's table hold what was measured."""

from pathlib import Path

from fastmae.benchmarks.cli import RESULTS
from fastmae.benchmarks.report import README_BEGIN, README_END, align, readme_table, save

ROOT = Path(__file__).parents[2]


def section(device="A Device, 2 cores", rows=None, **more):
    environment = {"device": device, "date": "2026-01-02 03:04 UTC", "command": "python -m fastmae.benchmarks", "commit": None}
    return {"environment": environment, "rows": rows or [], "notes": [], **more}


def step_row(contender, batch, rate, **more):
    return {"model": "base", "batch": batch, "contender": contender, "images_per_second": rate, "peak_memory": 2**30, **more}


def test_sections_of_a_day_share_a_file(tmp_path):
    rows = [step_row("reference", 8, 10.0), step_row("fastmae", 8, 30.0, speed_over_reference=3.0)]
    save(tmp_path, "step base", section(rows=rows), [["who", "images/s"], ["fastmae", "30"]])
    written, missing = save(tmp_path, "kernels", section(), [["op", "us"], ["gather_patches", "4.2"]])
    assert not missing and {p.name for p in written} == {"a-device-2-cores-2026-01-02.json", "a-device-2-cores-2026-01-02.md"}
    page = written[1].read_text()
    assert "## step base" in page and "| gather_patches | 4.2 |" in page
    assert "![step base](a-device-2-cores-2026-01-02-step-base.png)" in page
    assert (tmp_path / "a-device-2-cores-2026-01-02-step-base.png").stat().st_size > 5000


def test_a_sweep_is_drawn_as_lines(tmp_path):
    rows = [step_row(who, batch, batch * speed) for who, speed in (("rival", 1.0), ("fastmae", 2.0)) for batch in (8, 16)]
    written, _ = save(tmp_path, "step base", section(rows=rows), [["a"], ["b"]])
    one_batch, _ = save(tmp_path, "step large", section(rows=rows[::2]), [["a"], ["b"]])
    assert written[2].read_bytes() != one_batch[2].read_bytes()


def test_readmes_table_shows_the_best_batch_of_each_model(tmp_path):
    rows = [step_row("fastmae", 8, 10.0), step_row("fastmae", 16, 30.0, speed_over_reference=3.0, memory_over_reference=0.5),
            step_row("reference", 16, 9.0), step_row("rival", 8, 15.0), step_row("rival", 16, 5.0)]  # fmt: skip
    save(tmp_path, "step base", section(rows=rows), [["a"], ["b"]])
    line = readme_table(tmp_path).splitlines()[-1]
    assert line.endswith("| base, batch 16 | 30.00 | 2.00 | 3.00 | 0.50 |")
    assert readme_table(tmp_path / "empty") == "No result has been committed."


def test_readmes_table_takes_a_gpus_results_the_moment_they_are_there(tmp_path):
    small = [step_row("rival", 256, 4000.0), step_row("fastmae", 256, 5000.0, speed_over_rival=1.25),
             step_row("reference", 256, 2000.0)]  # fmt: skip
    large = [step_row("rival", 1024, 4100.0), step_row("fastmae", 1024, 5500.0, speed_over_rival=1.34)]
    gpu = "NVIDIA H200"
    save(tmp_path, "step base batch 256", section(gpu, small), [["a"], ["b"]])
    save(tmp_path, "profile base batch 256", section(gpu, [{"contender": "fastmae"}]), [["a"], ["b"]])
    save(tmp_path, "step base batch 1024", section(gpu, large), [["a"], ["b"]])
    (line,) = readme_table(tmp_path).splitlines()[2:]
    assert line == (
        "| [NVIDIA H200](benchmarks/results/nvidia-h200-2026-01-02.md) | base, batch 1024 | 5500.00 | 1.34 | 2.75 | - |"
    )


def test_readmes_second_table_is_of_the_loader(tmp_path):
    save(tmp_path, "step base", section(rows=[step_row("fastmae", 8, 10.0)]), [["a"], ["b"]])
    ours = {"images_per_second_per_core": 2901.4, "per_core_over_reference": 7.0, "efficiency": 0.861}
    rows = [{"pipeline": "bare decode", "images_per_second_per_core": 3000.0}, {"pipeline": "ours", **ours}]
    save(tmp_path, "loader", section(rows=rows), [["a"], ["b"]])
    assert readme_table(tmp_path).splitlines()[-1].endswith("| ours | 2901 | 7.00 | 0.86 |")
    assert "bare decode" not in readme_table(tmp_path)


def test_readmes_table_is_that_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert text.split(README_BEGIN)[1].split(README_END)[0].strip() == readme_table(RESULTS)


def test_columns_are_aligned_numbers_to_the_right():
    lines = align([["name", "us"], ["a", "10.5"], ["long name", "3"]]).splitlines()
    assert lines == ["name         us", "---------  ----", "a          10.5", "long name     3"]
