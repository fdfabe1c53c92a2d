"""The cache folder: the chosen one, the user's, or where there is neither a temporary one that is cleaned up."""

import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

CODE = """
import os, pathlib
os.getuid = lambda: 54321  # nobody's
from involution.cache import cache_dir, writable_cache_dir
for _ in range(2):
    print(cache_dir())
    folder = writable_cache_dir()
    (folder / "kept").touch()
    print(folder)
"""


def places(**environment: str) -> tuple[list[Path], str]:
    words = [sys.executable, "-c", CODE]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": "/usr/bin"} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()], done.stderr


@pytest.mark.parametrize("home", [{}, {"HOME": "/"}])
def test_the_chosen_folder_comes_before_any_question_about_home(home, tmp_path):
    found, told = places(INVOLUTION_CACHE=str(tmp_path / "chosen"), **home)
    assert set(found) == {tmp_path / "chosen"}
    assert told == ""


@pytest.mark.parametrize("home", [{}, {"HOME": "/proc"}])
def test_without_a_place_a_temporary_folder_serves_warns_once_and_is_removed(home, tmp_path):
    found, told = places(TMPDIR=str(tmp_path), **home)
    assert found[1] == found[3]
    assert found[1].parent == tmp_path
    assert told.count("no cache folder") == told.count("set INVOLUTION_CACHE") == 1
    assert list(tmp_path.iterdir()) == []
