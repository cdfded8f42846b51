"""What a package index shows: a page of its own, because README's picture and links mean files of a clone."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / PROJECT["readme"]).read_text()


def test_no_link_on_the_index_needs_a_file_of_a_clone():
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", PAGE) + re.findall(r"^\[[^]]+\]:\s*(\S+)", PAGE, re.M)
    targets += re.findall(r"(?:href|src)=[\"']?([^\"'\s>]+)", PAGE)
    assert targets and all(target.startswith("https://") for target in targets), targets
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())


def test_the_indexs_examples_are_readmes():
    readme = (ROOT / "README.md").read_text().splitlines()
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line and line != "pip install fastmae"]
    assert lines and [line for line in lines if line not in readme] == []


def test_every_extra_on_the_index_exists_and_none_is_forgotten():
    named = set(re.findall(r"^\| `fastmae\[(\w+)\]`", PAGE, re.M))
    assert named == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (ROOT / "fastmae" / "py.typed").is_file()
