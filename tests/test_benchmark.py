"""Every subcommand of scripts/benchmark.py runs, prints its tables and writes them; no speed is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from programs import python


def benchmark(tmp_path: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """Standard output, and the tables by the JSON file."""
    out = tmp_path / "result"
    done = python("scripts/benchmark.py", *arguments, "--quick", "--out", str(out))
    assert done.status == 0, done.stderr
    assert out.with_suffix(".md").read_text().strip() in done.stdout
    content = json.loads(out.with_suffix(".json").read_text())
    assert {"command", "commit", "CPU", "threads", "versions", "allocator"} <= set(content["conditions"])
    return done.stdout, [table for table in content["tables"] if "rows" in table]


def numbers(tables: list[dict[str, Any]]) -> list[float]:
    cells = (cell for table in tables for row in table["rows"] for cell in row.values())
    return [cell["median"] if isinstance(cell, dict) else cell for cell in cells if isinstance(cell, (dict, float))]


def test_op(tmp_path: Path) -> None:
    output, tables = benchmark(tmp_path, "op")
    assert [table["title"].split(",")[0] for table in tables[:3]] == [
        "involution2d",
        "involution2d",
        "The two halves of the backward",
    ]
    assert set(tables[0]["rows"][0]["unfold / cpu"]) == {"median", "low", "high"}
    assert min(numbers(tables[:5])) > 0
    assert "GB/s (stream triad" in output
    layers = next(table["rows"] for table in tables if table["title"].startswith("Attention layers"))
    assert {row["layer"] for row in layers} == {"Stand-Alone", "LR-Net", "SAN pairwise", "SAN patchwise"}
    assert all(row["unfold / ours"]["median"] > 0 for row in layers)
    assert "allocator: keeps freed memory" in output


def test_model(tmp_path: Path) -> None:
    _, tables = benchmark(tmp_path, "model", "--attention", "--allocator", "default")
    titles = [table["title"] for table in tables]
    attention = ("Self-attention, inference", "Self-attention, training")
    for begin in ("Inference", "Where inference", "Training step", "Peak memory", *attention):
        assert any(title.startswith(begin) for title in titles), titles
    row = tables[0]["rows"][0]
    assert row["RedNet folded (ms)"] > 0
    assert row["best ResNet / best RedNet"]["median"] > 0


def test_a_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, tables = benchmark(tmp_path, "model", "--runtime", "onnx")
    row = tables[0]["rows"][0]
    assert min(row["ResNet (ms)"], row["RedNet (ms)"], row["ResNet / RedNet"]["median"]) > 0


def test_table_2_is_the_papers_with_ours_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("scripts")
    from benchmarks.report import Report
    from benchmarks.table2 import table2

    both = {"ResNet eager (ms)": 40.0, "ResNet folded (ms)": 30.0, "RedNet eager (ms)": 20.0}
    measured = [{"depth": 50, "batch": 1, **both}, {"depth": 101, "batch": 1, "ResNet eager (ms)": 70.0}]
    rows = table2(measured, "cpu")
    assert [row["architecture"] for row in rows] == [
        "ResNet-50", "ResNet-101", "SAN19", "Axial ResNet-S", "RedNet-38", "RedNet-50"
    ]  # fmt: skip
    resnet, deep, foreign, _, _, rednet = rows
    assert (rednet["paper GPU (ms)"], rednet["paper CPU (ms)"], rednet["paper top-1 (%)"]) == ("14.3", "211.2", "78.4")
    assert rednet["ResNet-50's / this, ours"] == pytest.approx(1.5)
    assert rednet["ResNet-50's / this, paper's CPU"] == pytest.approx(895.4 / 211.2)
    assert (resnet["our CPU, eager (ms)"], resnet["our CPU, best (ms)"], deep["our CPU, best (ms)"]) == (40, 30, 70)
    assert foreign["our CPU, best (ms)"] is None
    assert foreign["ResNet-50's / this, paper's CPU"] is None
    attention = [{"model": "san19_pairwise", "eager (ms)": 90.0, "folded (ms)": 60.0}]
    assert table2(measured, "cpu", attention)[2]["ResNet-50's / this, ours"] == pytest.approx(0.5)
    assert table2(measured, "cuda")[2]["ResNet-50's / this, paper's GPU"] == pytest.approx(11.4 / 33.2)
    assert table2([{"depth": 26, "batch": 1, **both}], "cpu") == []
    Report("", {}).table("rows of unequal keys", measured)


def test_loop(tmp_path: Path) -> None:
    output, tables = benchmark(tmp_path, "loop")
    assert [row["model"] for row in tables[0]["rows"]] == ["rednet26", "semantic_fpn"]
    assert all(min(row["trainer (ms)"], row["bare loop (ms)"]) > 0 for row in tables[0]["rows"])
    assert "trainer / bare loop: at most" in output
    for peer, name in (("timm", "timm's loop"), ("plain", "plain loop")):
        _, tables = benchmark(tmp_path, "loop", "--peer", peer)
        row = tables[0]["rows"][0]
        assert min(row["trainer (ms)"], row[f"{name} (ms)"], row[f"trainer / {name}"]["median"]) > 0


def test_data(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (80 + i, 60), (20 * i, 90, 200)).save(folder / f"{i}.jpg")
    output, tables = benchmark(tmp_path, "data", str(tmp_path / "images"))
    assert "torchvision DataLoader (peer)" in [row["loader"] for row in tables[0]["rows"]]
    assert output.count("is the bottleneck") == len(tables[1]["rows"])
    assert all(row["after epoch 1 (MiB)"] > 10 for row in tables[2]["rows"])


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    done = python("scripts/benchmark.py", "modle")
    assert done.status == 2
    assert (
        "op, model, detection, loop, data" in done.stderr or "'op', 'model', 'detection', 'loop', 'data'" in done.stderr
    )
