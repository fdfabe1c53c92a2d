"""The documentation's commands do what the pages say.

Every ```bash and ```python block of README.md and docs/*.md has a comment line above it: `<!-- run -->` blocks are run
here, in the order of the page, `<!-- needs: a GPU, ... -->` blocks are not. They run in a folder that holds what a
reader has: the programs, the run of `make demo`, a photo.jpg, photos/{train,val}/<class>/, objects/ in COCO's format,
and street/{train,val}/{images,masks}/. To be quick, `train.py` gets QUICK at the end of its command, nothing else is
changed.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from image_folders import write_squares
from programs import ROOT
from reliability import write_images, write_masks
from test_config import config

from involution.engine.build import check_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = "train.max_steps=2"
FENCE = re.compile(r"^(?P<above>[^\n]*)\n```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- (run|needs: .+) -->")


class Block(NamedTuple):
    """A fenced block, at which line of its page it begins, and what the comment above it says."""

    page: Path
    line: int
    language: str
    code: str
    marker: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, found = "\n" + page.read_text(), []
    for match in FENCE.finditer(text):
        marker = MARKER.fullmatch(match["above"])
        line = text.count("\n", 0, match.start("language"))
        found.append(Block(page, line, match["language"], match["code"], marker and marker[1]))
    return found


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.marker == "run"]


def as_run(block: Block) -> list[str]:
    """The command that runs a block."""
    if block.language == "python":
        return [sys.executable, "-c", block.code]
    lines = block.code.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^python ", f"'{sys.executable}' ", line) for line in lines]
    lines = [f"{line.partition(' #')[0]} {QUICK}" if " train.py " in line else line for line in lines]
    return ["bash", "-euc", "\n".join(lines)]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a reader has after `make demo`, with pictures of their own."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("train.py", "eval.py", "scripts"):
        (here / name).symlink_to(ROOT / name)
    write_images(here / "photos")
    write_masks(here / "street")
    write_squares(here / "objects", (("train", 4), ("val", 2)))
    (here / "photo.jpg").write_bytes((here / "photos" / "val" / "a" / "0.jpg").read_bytes())
    finished = run([sys.executable, "train.py", "recipe=demo", QUICK], here)
    assert finished.returncode == 0, finished.stderr
    return here


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_whether_it_is_run(page):
    unmarked = [str(block) for block in blocks_of(page) if block.marker is None]
    assert not unmarked, "put <!-- run --> or <!-- needs: WHAT --> on the line above these blocks"
    fences = re.findall(r"^```(\S*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0, f"{page.name}: a block without an end"
    assert sum(map(bool, fences)) == len(blocks_of(page)), f"{page.name}: leave a line between two blocks"
    assert set(fences[::2]) <= {"", "bash", "python"}, f"{page.name}: write bash, python, or nothing for output"


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The blocks that have run: what two pages have in common runs once."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_blocks_run(page, folder, done):
    for block in runnable(page):
        if block.code in done:
            continue
        finished = run(as_run(block), folder)
        assert finished.returncode == 0, f"{block}\n{block.code}\n{finished.stderr}"
        done.add(block.code)
    if page.name == "use.md":
        for made in ("sheet.png", "predictions.csv", "runs/photos/summary.json"):
            assert (folder / made).stat().st_size > 0, made


def programs_of(block: Block) -> list[list[str]]:
    """The words behind train.py or eval.py of each such line, with the first value of what is swept."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for program in ("train.py", "eval.py"):
            if program in words:
                behind = words[words.index(program) + 1 :]
                swept = "-m" in behind
                options = [word for word in behind if "=" in word and not word.startswith("hydra")]
                firsts = (word if re.search(r"[\[{]", word) else word.split(",")[0] for word in options)
                found.append([program.removesuffix(".py"), *(firsts if swept else options)])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_cannot_be_run_here_compose(page):
    for block in blocks_of(page):
        for program, *words in programs_of(block) if block.marker and block.marker.startswith("needs") else ():
            configured = config(*words, program=program)
            if program == "train":
                check_model(configured.model)


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
