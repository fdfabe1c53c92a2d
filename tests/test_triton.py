"""The Triton backend without a GPU: results (interpreter), arguments (launcher), resources (compiler)."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_driver
import pytest
import torch
from forked import Forked
from programs import python

from involution import create_model
from scripts import check_kernels
from scripts.check_kernels import Layer, Norm, launches, layers_of, norms_of
from scripts.kernels import prediction

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from involution.ops import triton_plans  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.parametrize(("file", "interpreted"), [("triton_interpreted.py", "1"), ("triton_launched.py", "0")])
def test_results_through_the_interpreter_and_launches_through_the_launcher(file: str, interpreted: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": interpreted}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


#: what failed or nearly failed: too much shared memory on small GPUs, spills, minutes of compilation
HARD = [
    ("span_forward", Layer((512, 7, 7), 32, 7, 1, 1, 128), "bf16", 86),
    ("span_grad_input", Layer((128, 28, 28), 8, 7, 1, 1, 32), "bf16", 86),
    ("grad_kernel", Layer((512, 7, 7), 1, 7, 1, 1, 128), "bf16", 90),
    ("grad_kernel", Layer((64, 56, 56), 4, 7, 1, 1, None), "bf16", 90),
    ("norm_grad_sums", Norm((256, 56, 56), True), "bf16", 86),
    # which the compiler would let spill for a program more at once, had it no bound
    ("span_forward", Layer((64, 56, 56), 4, 3, 1, 1, 16), "bf16", 86),
    ("grad_input", Layer((256, 28, 28), 1, 7, 2, 1, None), "bf16", 120),
    ("span_grad_input", Layer((256, 14, 14), 16, 7, 1, 1, 64), "bf16", 86),  # with half of a thread's usual share
    ("norm_sums", Norm((64, 112, 112), False), "bf16", 100),
    ("span_forward", Layer((512, 7, 7), 32, 9, 1, 1, 128), "bf16", 80),  # in the tile of 7 x 7 taps
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("case", HARD, ids=lambda case: f"{case[0]}-{case[1]}-{case[3]}")
def test_compiles_for_gpus_that_are_not_here(case: tuple[str, Layer | Norm, str, int]) -> None:
    """All of RedNet-50 and of Table 6, on all architectures: scripts/check_kernels.py --models rednet50 ablation."""
    name, layer, dtype, arch = case
    text, fine, *_ = check_kernels.compile_case(check_kernels.Case(name, layer, dtype, arch, 128))
    assert fine, text
    if name.startswith("span"):
        assert " 0 mma" not in text, text  # not on the ordinary cores
    if name != "grad_kernel":
        assert "loads to 128 bits" in text or "loads to  64 bits" in text, text


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize(
    ("dtype", "layer", "status", "says"),
    [
        ("fp32", "32x112x112", 0, ["fp32 sm_86  16x2x2 ", "\n1 of 1 fit; "]),
        ("fp64", "512x7x7", 1, ["fp64 sm_86 ", "SPILLS\n0 of 1 fit; "]),
        ("fp32", "512x8x8", 1, ["no kernel is of such a layer"]),
    ],
)
def test_the_exit_status_says_whether_all_kernels_fit(dtype: str, layer: str, status: int, says: list[str]) -> None:
    """A fused kernel in float64 would spill kilobytes a thread, for which it runs unfused."""
    only = ["--kernels", "both", "--only", "span_forward", "--arch", "86", "--jobs", "1"]
    done = python("scripts/check_kernels.py", "--dtype", dtype, "--layers", layer, *only)
    assert done.status == status, done.stderr
    assert all(text in done.stdout + done.stderr for text in says), done.stdout + done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
def test_a_kernel_beside_what_the_rule_did_not_choose() -> None:
    options = ["--arch", "90", "--layers", "32x112x112", "--only", "grad_kernel", "--jobs", "1", "--tiles"]
    done = python("scripts/check_kernels.py", *options)
    assert done.status == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("grad_kernel")]
    assert ["not chosen" in line for line in lines] == [False] + 9 * [True]
    found = {re.search(r"(\d+x\d+x\d+)  ", line)[1]: float(line.partition(">=")[2].split()[0]) for line in lines}
    assert len(found) == 10  # each another tile
    assert next(iter(found.values())) <= 1.04 * min(found.values()), done.stdout
    assert "\n1 of 1 fit" in done.stdout


def test_the_layers_of_a_model_are_found_with_their_sizes() -> None:
    with torch.device("meta"):
        layers = layers_of(create_model("rednet26"))
    assert layers[0] == Layer((32, 112, 112), 2, 3, 1, 1, 8)
    assert layers[-1] == Layer((512, 14, 14), 32, 7, 2, 1, 128)
    assert len(layers) == 7  # stem, stage 1, then the first block of a stage with its stride, and the others
    with torch.device("meta"):
        norms = norms_of(create_model("rednet26"))
    assert norms[0] == Norm((32, 112, 112), False)
    assert [norm for norm in norms if norm.skip] == [Norm((256 << i, 56 >> i, 56 >> i), True) for i in range(4)]


def test_a_tile_depends_on_the_shape_alone() -> None:
    layer = Layer((256, 14, 14), 16, 7, 1, 1, 64)
    tiles = {
        batch: [
            (name, launch.arguments["J"], launch.arguments["GB"], launch.warps)
            for name, launch in launches(layer, torch.bfloat16, batch).items()
        ]
        for batch in (1, 256)
    }
    assert tiles[1] == tiles[256]


@pytest.mark.parametrize(
    ("hidden", "dtype", "fused"),
    [
        (512, torch.float32, False),  # 128 KiB of shared memory, which only the largest GPUs have
        (300, torch.float32, False), (256, torch.float32, True), (512, torch.bfloat16, True),
        (1024, torch.bfloat16, False), (64, torch.float64, False),
    ],
)  # fmt: skip
def test_what_does_not_fit_shared_memory_runs_unfused(hidden: int, dtype: torch.dtype, fused: bool) -> None:
    """Table 6c's linear map makes kernels of all 512 channels of the last stage."""
    assert ("span_forward" in launches(Layer((512, 7, 7), 32, 7, 1, 1, hidden), dtype, 1)) == fused


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("layer", [Layer((64, 56, 56), 4, 7, 1, 1, 16), Layer((64, 56, 56), 4, 7, 2, 1, None)])
def test_one_compilation_serves_images_of_all_sizes(layer: Layer) -> None:
    """Detectors meet other sizes at every step, and ranks others than their neighbours."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = []
    for size in ((64, 56, 56), (64, 57, 112), (64, 25, 31)):
        signatures = {}
        for name, launch in launches(layer._replace(size=size), torch.bfloat16, 3).items():
            function = launch.kernel
            bind = create_function_from_signature(function.signature, function.params, backend)
            _, specialization, _ = bind(**launch.arguments, num_warps=launch.warps)
            kinds = zip(function.params, specialization, strict=True)
            signatures[name] = [kind for p, kind in kinds if type(launch.arguments[p.name]) is int]
        found.append(signatures)
    assert found[0] == found[1] == found[2]


def test_the_newer_and_the_older_name_of_tf32_agree() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for name, wanted in (("ieee", False), ("tf32", True)):
            torch.backends.cudnn.conv.fp32_precision = name
            assert triton_plans._convolutions_use_tf32() == wanted
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_says_why_it_cannot_run_on_a_cpu() -> None:
    from involution.ops import triton_backend

    reason = triton_backend.unsupported(torch.zeros(1, 4, 5, 5), torch.zeros(1, 1, 3, 3, 5, 5))
    assert reason is not None
    assert "CUDA" in reason


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs triton_asked.py where Triton has a driver, and nothing in its cache; returns the lines of its output."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    fake_driver.build(tmp_path)
    machine = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    machine |= {"TRITON_INTERPRET": "0", "LOCAL_RANK": "0"}

    def run(take_away: str = "", **environment: str) -> list[str]:
        program = Forked(tmp_path / "log", "tests/triton_asked.py", take_away, **machine | environment)
        status, said = program.finish(), (tmp_path / "log").read_text()
        assert status == 0, said
        return said.splitlines()

    return run


def test_a_gpu_with_all_that_triton_takes_gets_it(asked: Callable[..., list[str]]) -> None:
    assert asked() == ["triton_backend"]


@pytest.mark.parametrize(
    ("take_away", "reason"),
    [
        ("os.environ['PATH'] = ''", r"\(Failed to find C compiler.* C compiler \(gcc, or the one CC names\), Python's"),
        ("os.environ['CC'] = 'false'", r"Triton cannot start \(false failed\); it takes .* C compiler"),
        ("sys.modules['triton'] = None", "it cannot be imported .*; a new installation of torch brings the Triton"),
        ("import triton; del triton.knobs", "cannot be imported .*'knobs'.*; a new installation of torch brings"),
        ("torch.cuda.get_device_capability = lambda _: (7, 5)", "the GPU is older than compute capability 8.0"),
        ("torch.version.hip = '6.4'", "never compiled for AMD's"),
    ],
)
def test_a_gpu_without_says_so_once_and_computes_the_same(
    asked: Callable[..., list[str]], take_away: str, reason: str
) -> None:
    said, chosen = asked(take_away)
    assert re.match(f"backend shifted: several times slower, for triton cannot run: .*{reason}", said)
    assert chosen == "shifted"


def test_of_a_machines_ranks_the_first_says_so(asked: Callable[..., list[str]]) -> None:
    assert asked("os.environ['CC'] = 'false'", LOCAL_RANK="1") == ["shifted"]


def test_a_predicted_step_follows_from_the_kernels() -> None:
    names = ("span_forward", "span_grad_input", "grad_input", "grad_kernel")
    with torch.device("meta"):
        layers, layers_50 = layers_of(create_model("rednet26"), 64, 64), layers_of(create_model("rednet50"))
    one, two = (
        sum(prediction.predict("rednet26", 2, 90, {(n, x): us for n in names for x in layers}, (64, 64)).values())
        for us in (1000, 2000)
    )
    assert two - one == pytest.approx(prediction.SLACK * 3 * 9)  # ms of three kernels in the stem and eight blocks
    free = {(n, x): 0.0 for n in names for x in layers_50}
    apart, joined = (sum(prediction.predict("rednet50", 128, 90, free, joined=it).values()) for it in (False, True))
    assert 0.8 < joined / apart < 0.9  # BatchNorm, residual and ReLU in 8 and 11 passes instead of 13 and 16
    a100 = sum(prediction.predict("resnet50", 128, 80, {}).values())
    assert 128e3 / a100 == pytest.approx(2470, rel=0.15)  # images/s, NVIDIA's DeepLearningExamples
