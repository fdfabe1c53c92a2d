"""What the compiler makes of a launch: registers, spills, shared memory, instructions, and a floor of its time."""

import math
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from involution.ops.triton_plans import Launch


class Architecture(NamedTuple):
    """A GPU to compile for (CUDA programming guide, table of compute capabilities).

    Args:
        shared: KiB that a program may have.
        shared_in_all: KiB of a multiprocessor.
        warps: of a multiprocessor.
        multiprocessors, gigahertz: of the card whose time is predicted (A100, A10, H100, B200).
    """

    shared: int
    shared_in_all: int
    warps: int
    multiprocessors: int
    gigahertz: float


ARCHITECTURES = {
    80: Architecture(163, 164, 64, 108, 1.41),
    86: Architecture(99, 100, 48, 72, 1.695),
    89: Architecture(99, 100, 48, 142, 2.49),
    90: Architecture(227, 228, 64, 132, 1.755),
    100: Architecture(227, 228, 64, 148, 1.85),
    120: Architecture(99, 100, 48, 170, 2.41),
}


class Compiled(NamedTuple):
    """A kernel's resources. spilled: bytes a thread; loads: widths in bits; floor_us: at the least, see `_floor`."""

    registers: int
    spilled: int
    shared: int
    programs: int  # at once on a multiprocessor
    tensor_cores: int  # instructions of the matrix units
    loads: dict[int, int]
    seconds: float  # to compile
    floor_us: float


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a launch for compute capability `arch` / 10; a GPU is not needed.

    Raises:
        Exception: whatever the compiler does not like.
    """
    target = GPUTarget("cuda", arch, 32)
    function, backend = launch.kernel, make_backend(target)
    arguments = launch.arguments | launch.options
    bind = create_function_from_signature(function.signature, function.params, backend)
    options, signature, constants, attributes = function._pack_args(backend, arguments, *bind(**arguments))
    begin = time.perf_counter()
    source = ASTSource(function, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=options.__dict__)
    seconds = time.perf_counter() - begin
    used, listing = _disassemble(binary.asm["cubin"])
    gpu, shared = ARCHITECTURES[arch], binary.metadata.shared
    registers = max(8, -(-used["REG"] // 8) * 8)
    at_once = min(65536 // (registers * 32 * launch.warps), gpu.shared_in_all * 1024 // (shared + 1024))
    ptx = binary.asm["ptx"]
    widths = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", ptx)
    return Compiled(
        registers=used["REG"],
        spilled=used.get("STACK", 0) + used.get("LOCAL", 0),
        shared=shared,
        programs=min(at_once, gpu.warps // launch.warps, 32),
        tensor_cores=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        loads=dict(Counter(int(n or 1) * int(bits) for n, bits in widths)),
        seconds=seconds,
        floor_us=_floor(listing, launch, gpu),
    )


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        used = subprocess.run([tools.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True)
        listing = subprocess.run([tools.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True).stdout
    return {n: int(v) for n, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", used.stdout + used.stderr)}, listing


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?\s*([A-Z][A-Z0-9_.]*)\s*(.*)")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL")


def _floor(listing: str, launch: Launch, gpu: Architecture) -> float:
    """Microseconds to issue the instructions of all programs, or to pass them through the memory pipe.

    Loops count as often as they run (the compiler unrolls all others). One instruction a clock and quarter of a
    multiprocessor; memory instructions take the multiprocessor's one pipe, 128 bits for four clocks. Waiting and bytes
    come on top.
    """
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    loops = []
    for i, (name, rest) in enumerate(instructions):
        target = re.search(r"\.(L_x_\d+)", rest) if name.startswith("BRA") else None
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    weights = [1.0] * len(instructions)
    for (start, end), times in zip(sorted(loops, key=lambda loop: loop[0] - loop[1]), _trips(launch)):
        for i in range(start, end + 1):
            weights[i] *= times
    issue, memory = 0.0, 0.0
    for (name, _), weight in zip(instructions, weights, strict=True):
        issue += weight
        if name.split(".")[0] in _MEMORY:
            wide = re.search(r"\.(128|64|x?[24])$", name)
            memory += weight * {"128": 4, "64": 2, "4": 4, "2": 2}.get(wide[1].lstrip("x") if wide else "", 1)
    clocks = launch.warps * -(-launch.programs // gpu.multiprocessors) * max(issue / 4, memory)
    return clocks / gpu.gigahertz / 1e3


def _trips(launch: Launch) -> list[float]:
    """How often the loops run that the compiler leaves, the outermost first."""
    a: dict[str, Any] = launch.arguments
    name = launch.kernel.__name__
    if "GC" not in a:  # BatchNorm: those that sum go through their rows
        return [math.ceil(a["per"] / a["BR"])] if {"per", "BR"} <= a.keys() else []
    chunks = math.ceil(a["GC"] / a["BC"])
    chunked = [chunks] if chunks > 1 and name not in ("forward_kernel", "grad_input_kernel") else []
    rows = a["K"] if a["D"] > 1 or name != "grad_input_kernel" else math.ceil(a["K"] / a["S"])
    return [rows, *chunked]
