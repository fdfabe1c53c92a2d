"""Which device a rank takes, and what it says when that is not the GPU that the machine has."""

import logging
import os
import platform
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_folders import write
from programs import python

import data
from data.folder import list_folder
from data.policies import TrivialAugment
from data.torch_loader import TorchBackend
from involution.engine import build, device, rendezvous
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


def test_a_machine_without_a_gpu_trains_on_the_cpu_unless_slurm_gave_it_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "DRIVER", ())
    gpus(0, monkeypatch)
    assert device.choose_device("auto", 1, 2) == torch.device("cpu")
    assert not caplog.text
    with pytest.raises(UserError, match="sees none"):
        device.choose_device("cuda", 0, 1)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    with pytest.raises(UserError, match="a container without --nv"):
        device.choose_device("auto", 1, 2)


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1, monkeypatch)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        device.choose_device("auto", 3, 4)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert device.choose_device("auto", 3, 4) == torch.device("cuda", 0)
    gpus(4, monkeypatch)
    assert device.choose_device("auto", 3, 4) == torch.device("cuda", 3)


CORES = """
import os
if not os.environ["OMP_NUM_THREADS"]:
    del os.environ["OMP_NUM_THREADS"]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["BOUND"])])
import torch
from data.torch_loader import at_most_cores
from involution.engine.distributed import init_world
init_world("cpu")
print(torch.get_num_threads(), at_most_cores(999))
"""


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="there is one core")
@pytest.mark.parametrize(
    ("variables", "threads", "workers"),
    [
        ({}, "2", "2"),
        ({"BOUND": "1"}, "1", "1"),  # as srun binds a task to its cores
        ({"SLURM_CPUS_PER_TASK": "1"}, "1", "1"),  # where it binds none
        ({"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "2"}, "2", "1"),
    ],
)
def test_threads_and_workers_are_as_many_as_the_task_has_cores(
    variables: dict[str, str], threads: str, workers: str
) -> None:
    assert python("-c", CORES, **{"BOUND": "2", "OMP_NUM_THREADS": ""} | variables).stdout.split() == [threads, workers]


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


@pytest.mark.parametrize(
    ("kind", "ranks", "changed", "sizes_vary", "message"),
    [
        ("cuda", 1, {"sync_batchnorm": "auto", "train_size": {1: 128, 5: 224}}, False, None),
        ("cuda", 2, {}, False, None),
        ("cpu", 1, {}, False, "this run is on the CPU"),
        ("cuda", 1, {}, True, "one size of pictures"),
        ("cuda", 1, {"compile": True}, False, "train.compile=true makes programs of its own"),
        ("cuda", 2, {"sync_batchnorm": "auto"}, False, "train.sync_batchnorm=false goes with them"),
        ("cuda", 2, {"train_size": {1: 128, 5: 224}}, False, "data.train_size has to be one size"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(
    kind: str, ranks: int, changed: dict[str, Any], sizes_vary: bool, message: str | None
) -> None:
    values = {"cuda_graphs": True, "compile": False, "sync_batchnorm": False, "train_size": 224} | changed
    data = SimpleNamespace(train_size=values.pop("train_size"))
    config: Any = SimpleNamespace(train=SimpleNamespace(**values), data=data)
    world = World(0, ranks, torch.device(kind))
    if message is None:
        build._check_graphs(config, world, sizes_vary)
    else:
        with pytest.raises(UserError, match=f"train.cuda_graphs=true: .*{message}"):
            build._check_graphs(config, world, sizes_vary)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-007,012],other", "gpu003"), ("a1", "a1"), ("node-3,node-4", "node-3"), ("x[1,3]y,z", "x1y")],
)
def test_the_first_of_slurms_hosts_without_scontrol(nodes, first):
    assert rendezvous._first_host(nodes) == first


def test_hosts_that_are_written_otherwise_are_to_be_told():
    with pytest.raises(UserError, match=r"set MASTER_ADDR to the first of these hosts"):
        rendezvous._first_host("rack[0-3]node[1-2]")


@pytest.mark.skipif(platform.system() != "Linux", reason="asks Linux for its network's interfaces")
def test_gloo_listens_where_other_nodes_can_reach_it(monkeypatch):
    """Where the host's name is the loopback's, as on many images; a name that is not is left alone."""
    monkeypatch.delenv("SLURM_STEP_NUM_NODES", raising=False)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
    except OSError:
        pytest.skip("this machine has no route to anywhere")
    own = socket.gethostbyname("localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        reachable = probe.getsockname()[0]

    def resolve(host):
        if host not in addresses:
            raise OSError("no address")
        return addresses[host]

    assert rendezvous._interface(reachable) in {name for _, name in socket.if_nameindex()}
    addresses = {"here": own, "well-kept": reachable, "rank0": "192.0.2.1"}
    for host, nodes, expected in (
        ("here", 2, "eth7"), ("here", 1, None), ("well-kept", 2, None), ("nameless", 2, "eth7"),
    ):  # fmt: skip
        monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        monkeypatch.setenv("MASTER_ADDR", "rank0")
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(socket, "gethostbyname", resolve)
        monkeypatch.setattr(rendezvous, "_interface", lambda address: "eth7")
        rendezvous.choose_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


@pytest.mark.parametrize(
    ("driver", "capability", "built", "reason"),
    [
        (13, (9, 0), 13, None),
        (12, (8, 0), 12, None),
        (12, (8, 0), 13, "made for CUDA 13, the driver for 12: pip install nvidia-dali-cuda120"),
        (13, (7, 0), 13, "needs a GPU of compute capability 7.5"),
    ],
)
def test_dali_is_taken_only_where_its_cuda_runs(driver, capability, built, reason):
    dali = pytest.importorskip("data.dali", reason="NVIDIA DALI is not installed")
    assert dali.BUILT in (11, 12, 13)
    found = dali.unfit(driver, capability, built)
    assert found is None if reason is None else reason in found


def test_policies_on_a_gpu_are_the_work_of_processes(tmp_path):
    images = list_folder(write(tmp_path) / "train")
    options = {"batch_size": 2, "global_batch_size": 2, "seed": 0, "workers": 1, "device": "cuda"}
    loader = data.train_loader(images, policies=[TrivialAugment()], **options)
    assert isinstance(loader.backend, TorchBackend)
