"""Compile every Triton kernel that a model launches for GPUs that are not here, and say whether it fits.

    python scripts/check_kernels.py                                       RedNet-50, bf16, sm_80 to sm_120
    python scripts/check_kernels.py --models rednet50 ablation --arch 86 90 --dtype bf16 fp32
    python scripts/check_kernels.py --layers 512x7x7 --only span_forward          one kernel
    python scripts/check_kernels.py --arch 90 --tiles                             its choice beside the other tiles
    python scripts/check_kernels.py --models dense --size 800 1280 --batch 2      detectors and segmentors

A line a kernel: tile (runs x groups x warps; of BatchNorm rows x channels x warps), registers, spilled bytes, shared
memory of what a program may have, programs at once on a multiprocessor, tensor-core instructions, widest load in bits,
seconds to compile, and the least time that its instructions take on an A100 (80), A10 (86), L40S (89), H100 (90), B200
(100), RTX 5090 (120). Exit status 1 if one does not compile, needs more shared memory than there is, or spills (fp32:
over 512 bytes). At the end, for whole RedNets in bf16 on sm_80 or sm_90, the training step that follows beside the
ResNet's (scripts/kernels/prediction.py).
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from kernels.compiled import ARCHITECTURES, Compiled, compile_launch
from kernels.launches import Layer, Norm, launches, layers_of, networks, norms_of
from kernels.prediction import CARDS, Floors, predict

from involution.ops.triton_plans import Launch, in_tile
from involution.ops.triton_tiles import TILES, Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SPILLED = {"fp32": 512, "fp64": 2048}  # bytes a thread that may be; none in 16 bits


class Case(NamedTuple):
    """A kernel to compile. tile: another than the one that the rule chooses."""

    name: str
    layer: Layer | Norm
    dtype: str
    arch: int
    batch: int
    fused: bool | None = None
    tile: Tile | None = None


class Outcome(NamedTuple):
    """A line about a kernel, whether it fits, the seconds that compiling took, and the floor of its time."""

    text: str
    fine: bool
    seconds: float = 0.0
    floor_us: float = 0.0


def main() -> int:
    args = parse()
    cases = list(plan(args))
    if not cases:
        sys.exit("no kernel is of such a layer and name")
    print(f"{len(cases)} kernels", flush=True)
    outcomes: dict[Case, Outcome] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for case, outcome in zip(cases, pool.map(compile_case, cases)):
            outcomes[case] = outcome
            print(f"{case.name:17} {case.layer!s:36} {case.dtype} sm_{case.arch:<3} {outcome.text}", flush=True)
    chosen = {case: outcome for case, outcome in outcomes.items() if case.tile is None}
    fit, seconds = sum(outcome.fine for outcome in chosen.values()), sum(o.seconds for o in outcomes.values())
    print(f"{fit} of {len(chosen)} fit; {seconds:.0f} s of compilation")
    for arch in CARDS.keys() & set(() if args.only or args.layers else args.arch):
        found = {c: o for c, o in chosen.items() if (c.dtype, c.arch, c.fused) == ("bf16", arch, None)}
        floors = {(case.name, case.layer): outcome.floor_us for case, outcome in found.items()}
        for name in (name for name in args.models if name.startswith("rednet") and floors):
            print(step(name, arch, args, floors))
    return 0 if fit == len(chosen) else 1


def step(name: str, arch: int, args: argparse.Namespace, floors: Floors) -> str:
    """The predicted training step of a RedNet beside that of the ResNet of the same depth, torch's and ours."""
    other, rest = name.replace("rednet", "resnet"), (args.batch, arch, floors, tuple(args.size))
    rows = {
        name: predict(name, *rest, joined=True),
        f"{other} of torch's operators": predict(other, *rest),
        f"{other} of ours": predict(other, *rest, joined=True),
    }
    lines = [f"PREDICTED step, bf16, batch {args.batch}, {CARDS[arch].name} (nothing of this is measured):"]
    mine = sum(rows[name].values())
    for model, parts in rows.items():
        kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in sorted(parts.items(), key=lambda part: -part[1]) if ms)
        whole = sum(parts.values())
        ratio = "" if model == name else f" ({name} takes {mine / whole:.2f} of it)"
        lines.append(f"  {model}: {whole:.1f} ms, {1e3 * args.batch / whole:.0f} images/s{ratio}: {kinds}")
    return "\n".join(lines)


def plan(args: argparse.Namespace) -> Iterator[Case]:
    """Every different kernel of the models, once."""
    layers: dict[Layer | Norm, None] = {}
    for _, model in networks(args.models):
        layers |= dict.fromkeys([*layers_of(model, *args.size), *norms_of(model, *args.size)])
    chosen = [layer for layer in layers if not args.layers or str(layer).startswith(tuple(args.layers))]
    for layer, dtype, arch in product(chosen, args.dtype, args.arch):
        for fused in {"as-run": (None,), "both": (True, False)}[args.kernels]:
            if isinstance(layer, Norm):
                if fused or dtype == "fp64":  # it has one form, and leaves float64 to torch
                    continue
            elif layer.reduced is None and fused:
                continue
            for name in launches(layer, DTYPES[dtype], args.batch, fused):
                if not args.only or name in args.only:
                    case = Case(name, layer, dtype, arch, args.batch, fused)
                    yield case
                    if args.tiles and isinstance(layer, Layer):
                        yield from (case._replace(tile=tile) for tile in tiles_beside(case))


def launch_of(case: Case) -> Launch:
    launch = launches(case.layer, DTYPES[case.dtype], case.batch, case.fused)[case.name]
    return in_tile(launch, case.tile) if case.tile else launch


def tiles_beside(case: Case) -> list[Tile]:
    """The candidates that the rule did not choose."""
    chosen = launch_of(case)
    return [tile for tile in TILES if tile != (chosen.arguments["J"], chosen.arguments["GB"], chosen.warps)]


def compile_case(case: Case) -> Outcome:
    launch, dtype, arch = launch_of(case), case.dtype, case.arch
    a = launch.arguments
    tile = f"{a.get('J') or a.get('BR') or a['PP']:>2}x{a.get('GB') or a['BC']}x{launch.warps}"
    try:
        found = compile_launch(launch, arch)
    except Exception as error:  # Triton raises anything
        return Outcome(f"{tile}  DOES NOT COMPILE: {type(error).__name__}: {str(error).strip()[:200]}", False)
    problem = _problem(found, dtype, arch)
    text = (
        f"{tile}  {found.registers:3} registers, {found.spilled:3} spilled, shared {found.shared / 1024:5.1f} of "
        f"{ARCHITECTURES[arch].shared} KiB, {found.programs} at once, {found.tensor_cores:3} mma, loads to "
        f"{max(found.loads, default=0):3} bits, {found.seconds:4.1f} s, >= {found.floor_us:5.0f} us"
    )
    return Outcome(f"{text}  {'not chosen ' if case.tile else ''}{problem}", not problem, found.seconds, found.floor_us)


def _problem(found: Compiled, dtype: str, arch: int) -> str:
    if found.shared > ARCHITECTURES[arch].shared * 1024:
        return "TOO MUCH SHARED MEMORY"
    if found.programs < 1:
        return "TOO MANY REGISTERS"
    return "SPILLS" if found.spilled > SPILLED.get(dtype, 0) else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["rednet50"],
        help='names of models; "ablation" is Table 6, "dense" what is built around RedNet-50',
    )
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--size", nargs=2, type=int, default=[224, 224], metavar=("H", "W"), help="of the images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kernels", choices=("as-run", "both"), default="as-run", help="both: fused and plain")
    parser.add_argument("--only", nargs="+", help="names of kernels, e.g. span_forward")
    parser.add_argument("--tiles", action="store_true", help="each kernel in every tile: whether the rule is right")
    parser.add_argument("--layers", nargs="+", help="those whose size begins so, e.g. 512x7x7")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
