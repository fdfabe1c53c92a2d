"""The Triton backend without a GPU: results through the interpreter, resources through the compiler."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
OTHERS = ["forward", "grad_input", "grad_kernel", "span_grad_input", "span_grad_reduced", "span_grad_weight"]
OTHERS += ["span_grad_reduced_of_one_group"]


def test_results_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def launches(dtype: torch.dtype, batch: int = 128) -> dict[str, Any]:
    """What the backend would launch for the first stage of RedNet-50, on tensors without memory."""
    from involution.ops import triton_backend as backend

    def empty(channels: int) -> torch.Tensor:
        value = torch.empty(batch, channels, 56, 56, dtype=dtype, device="meta")
        return value.to(memory_format=torch.channels_last)

    x, grad, reduced, kernel = empty(64), empty(64), empty(16), empty(196).view(batch, 4, 7, 7, 56, 56)
    weight, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((196, 16), (196,)))
    plain = backend.common_arguments(x, 7, 4, None, 1, 3, 1)
    fused = backend.common_arguments(x, 7, 4, reduced, 1, 3, 1)
    return {
        "forward": backend.plan_forward(x, kernel, None, None, None, grad, plain),
        "grad_input": backend.plan_grad_input(grad, kernel, None, None, None, x, plain),
        "grad_kernel": backend.plan_grad_kernel(grad, x, kernel, plain),
        "span_forward": backend.plan_forward(x, None, reduced, weight, bias, grad, fused),
        "span_grad_input": backend.plan_grad_input(grad, None, reduced, weight, bias, x, fused),
        "span_grad_reduced": backend.plan_grad_reduced(grad, x, weight, reduced, fused),
        "span_grad_reduced_of_one_group": backend.plan_grad_reduced(
            grad, x, weight[:49], reduced, backend.common_arguments(x, 7, 1, reduced, 1, 3, 1)
        ),
        "span_grad_weight": backend.plan_grad_weight(grad, x, reduced, True, fused)[0],
    }


def compiled(launch: Any) -> Any:
    """The launch's kernel in its first configuration, compiled for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    tuner, target = launch.kernel, GPUTarget("cuda", 90, 32)
    function, backend = tuner.fn, make_backend(target)
    config = tuner.early_config_prune(tuner.configs, launch.arguments)[0]
    arguments = launch.arguments | config.kwargs | {"num_warps": config.num_warps}
    arguments |= {"num_stages": config.num_stages, "enable_fp_fusion": True}
    bind = create_function_from_signature(function.signature, function.params, backend)
    options, signature, constants, attributes = function._pack_args(backend, arguments, *bind(**arguments))
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(binary: Any) -> dict[str, int]:
    """What the assembler says of a compiled kernel: REG, STACK (spilled bytes), SHARED and so on."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr)
    return {name: int(value) for name, value in found}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("name", ["span_forward", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_compiles_for_a_gpu_without_spilling(name: str) -> None:
    binary = compiled(launches(torch.bfloat16)[name])
    used = resources(binary)
    assert used["STACK"] == 0, used
    assert used["LOCAL"] == 0, used
    assert binary.metadata.shared <= 113 * 1024  # two programs a multiprocessor


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_says_why_it_cannot_run_on_a_cpu() -> None:
    from involution.ops import triton_backend

    reason = triton_backend.unsupported(torch.zeros(1, 4, 5, 5), torch.zeros(1, 1, 3, 3, 5, 5))
    assert reason is not None
    assert "CUDA" in reason
