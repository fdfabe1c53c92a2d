"""Write S, r and the predictions that follow from them into docs/cluster.md, whose formula this computes.

    python scripts/cluster_table.py

S is counted. r is what docs/benchmarks/gpu.json, which scripts/gpu_session.sh makes, has measured of RedNet-50 at each
micro-batch, with train.cuda_graphs=true if that was measured; where there is no such measurement, ASSUMED.
"""

import argparse
import json
from pathlib import Path

from gpu import page
from model_table import measure

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/cluster_table.py -->\n\n", "\n<!-- until here -->\n"
#: GPUs, images at once on each, times forward and backward a step, GB/s of the link
SETUPS: tuple[tuple[int, int, int, float], ...] = (
    (8, 32, 8, 450), (8, 32, 8, 32), (16, 32, 4, 50), (64, 32, 1, 50), (64, 32, 1, 12.5), (128, 16, 1, 50),
    (256, 8, 1, 50), (256, 32, 1, 50), (256, 32, 1, 12.5), (1024, 32, 1, 50), (1024, 32, 1, 12.5),
)  # fmt: skip
PHOTO = 110e3  # bytes
ASSUMED = 1000  # images/s
WHY = (
    f"{ASSUMED} images/s a GPU (an H100 makes [2654 to 3951](benchmarks/gpu.md)); put your own: "
    "`python scripts/benchmark.py model --only training` | a"
)
TEXT = """\
| made by `python scripts/cluster_table.py` | value | |
|---|---|---|
| S, RedNet-50 | {parameters:,} parameters x 4 bytes = {rednet:.1f} MB (ResNet-50: {resnet:.1f} MB) | m |
| r, training at 224 px | {origin} |

C at n = 64: {at_64} ms at 100, 200, 400 Gb/s; at n = 8: {nvlink} ms by NVLink, {pcie} ms by PCIe. Latency is left out:
NCCL's trees keep it near 0.1 ms (a), a plain ring of 1024 would not.

| GPUs | global batch = n x b x k | link, GB/s | compute, ms | C, ms | shown, ms | images/s | of ideal | \
130 epochs, h | read in all, GB/s |
|---|---|---|---|---|---|---|---|---|---|
{rows}
{left_out}
The work is {images:.1f} M images: at r = {rate:.0f} 8 GPUs need {hours:.1f} h; at r = {half:.0f}, {twice:.1f} h.
"""


def speed(gpu: Path) -> tuple[dict[int, float], bool, str]:
    """r in images/s by micro-batch as far as `gpu`, the JSON of gpu/page.py, has it, whether with CUDA graphs, and the
    end of its row: where it comes from | m or a."""
    batches = sorted({images for _, images, _, _ in SETUPS}, reverse=True)
    report = json.loads(gpu.read_text()) if gpu.exists() else {"tables": []}
    tables = {table["title"]: table["rows"] for table in report["tables"] if "rows" in table}
    graphs = page.step_title("bf16", cuda_graphs=True) in tables
    if (steps := tables.get(page.step_title("bf16", cuda_graphs=graphs))) is None:
        return dict.fromkeys(batches, ASSUMED), False, WHY
    rates = {row["batch"]: row["images/s"] for row in steps if row["model"] == "rednet50" and row["batch"] in batches}
    name = "step-graphs" if graphs else "step"
    commit = next(row["commit"] for row in tables["Steps"] if row["step"] == name)
    found = ", ".join(f"{rates[batch]:,.0f} at b = {batch}" for batch in batches if batch in rates)
    how = "bf16, `train.cuda_graphs=true`" if graphs else "bf16"
    origin = f"{report['conditions']['GPU']}, commit {commit}, [gpu.md](benchmarks/gpu.md)"
    return rates, graphs, f"{found} images/s a GPU in {how} ({origin}) | m"


def all_reduce(gpus: int, size: float, link: float) -> float:
    """C in ms, of `size` bytes over a link of `link` GB/s."""
    return 1e3 * 2 * (gpus - 1) / gpus * size / (0.8e9 * link)


def prediction(gpus: int, images: int, times: int, link: float, size: float, rate: float, graphs: bool) -> str:
    """A row of the table, for `size` bytes of gradients and `rate` images/s a GPU.

    A captured backward hands all gradients over at its end: nothing of the all-reduce is beside it.
    """
    batch = gpus * images * times
    compute, c = 1e3 * times * images / rate, all_reduce(gpus, size, link)
    shown = c if graphs else max(0.2 * c, c - 2 / 3 * 1e3 * images / rate)
    total = 1e3 * batch / (compute + shown)
    cells = (
        f"{gpus}", f"{batch:,} = {gpus} x {images} x {times}", f"{link:g}", f"{compute:.3g}", f"{c:.1f}",
        f"{shown:.1f}", f"{round(total, -2):,.0f}", f"{100 * total / (gpus * rate):.0f} %",
        f"{page.IMAGES / total / 3600:.2f}", f"{total * PHOTO / 1e9:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def block(gpu: Path) -> str:
    """What stands between the markers."""
    parameters = measure("rednet50").params
    size = 4 * parameters
    rates, graphs, origin = speed(gpu)
    if 32 not in rates:
        raise ValueError(f"{gpu} has no training step of rednet50 at batch 32: scripts/gpu_session.sh measures it")
    # fewer than 16 images take train.sync_batchnorm, which does not go with graphs on several GPUs
    setups = [setup for setup in SETUPS if setup[1] >= 16 or not graphs]
    missing = [f"b = {images}" for images in sorted({s[1] for s in setups} - rates.keys(), reverse=True)]
    hours = page.IMAGES / (8 * rates[32]) / 3600
    return TEXT.format(
        parameters=parameters, rednet=size / 1e6, resnet=4 * measure("resnet50").params / 1e6, origin=origin,
        at_64=", ".join(f"{all_reduce(64, size, link):.1f}" for link in (12.5, 25, 50)),
        nvlink=f"{all_reduce(8, size, 450):.1f}", pcie=f"{all_reduce(8, size, 32):.1f}",
        rows="\n".join(prediction(*s, size, rates[s[1]], graphs) for s in setups if s[1] in rates),
        left_out=f"\nNot measured yet: {', '.join(missing)}.\n" if missing else "", images=page.IMAGES / 1e6,
        rate=rates[32], half=rates[32] / 2, hours=hours, twice=2 * hours,
    )  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = DOCS / "cluster.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + block(DOCS / "benchmarks/gpu.json") + END + rest.partition(END)[2])
    print(path)


if __name__ == "__main__":
    main()
