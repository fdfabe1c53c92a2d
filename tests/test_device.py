"""Which device a rank takes, and what it says when that is not the GPU that the machine has."""

import logging
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import python

from involution.engine import build, device
from involution.engine.distributed import World
from involution.engine.errors import UserError


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA's driver, where torch finds no GPU."""
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(device, "DRIVER", (str(tmp_path / "version"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(
    driver: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "involution"):
        assert device.choose_device("auto", 0, 1) == torch.device("cpu")
    assert "NVIDIA" in caplog.text
    with pytest.raises(UserError, match="device=cpu"):
        device.choose_device("auto", 0, 2)
    assert device.choose_device("cpu", 1, 2) == torch.device("cpu")


def test_a_machine_without_a_gpu_trains_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "DRIVER", ())
    gpus(0, monkeypatch)
    assert device.choose_device("auto", 1, 2) == torch.device("cpu")
    assert not caplog.text
    with pytest.raises(UserError, match="sees none"):
        device.choose_device("cuda", 0, 1)


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1, monkeypatch)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        device.choose_device("auto", 3, 4)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert device.choose_device("auto", 3, 4) == torch.device("cuda", 0)
    gpus(4, monkeypatch)
    assert device.choose_device("auto", 3, 4) == torch.device("cuda", 3)


FAULTS = """
import resource, torch
from involution.engine.device import keep_freed_memory
kept = keep_freed_memory()
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large, larger = torch.ones(1 << 22), torch.ones(1 << 24)
    del large, larger
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, faults = python("-c", FAULTS).stdout.split()
    assert kept == "True"
    assert int(faults) < 100_000  # 80 MiB ten times have 204800 pages; a heap that grows once more faults them in once
    kept, faults = python("-c", FAULTS, MALLOC_ARENA_MAX="2").stdout.split()
    assert kept == "False"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "rednet50", "global_pool": "avg"}, None),
        ({"name": "resnet50", "global_pool": "max"}, "model.global_pool=max; avg can be"),
        ({"name": "semantic_fpn"}, None),
        ({"name": "upernet"}, "model=upernet"),
        ({"name": "faster_rcnn", "roi_samples": 2}, None),
        ({"name": "faster_rcnn", "roi_samples": 0}, "model.roi_samples=0"),
        ({"name": "retinanet", "plugin": "dcn"}, "model.plugin=dcn"),
    ],
)
def test_what_a_gpu_cannot_repeat_is_refused_with_its_key(model: dict[str, Any], message: str | None) -> None:
    for deterministic, kind in ((True, "cpu"), (False, "cuda"), (True, "cuda")):
        config: Any = SimpleNamespace(model=model, deterministic=deterministic)
        world = World(0, 1, torch.device(kind))
        if message is None or not deterministic or kind == "cpu":
            build._check_deterministic(config, world)
        else:
            with pytest.raises(UserError, match=f"deterministic=true: on a GPU .*{message}"):
                build._check_deterministic(config, world)
