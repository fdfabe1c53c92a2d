"""Networks outside Python's torch: in onnxruntime, or as an AOTInductor package, as `scripts/export.py` writes them."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.networks import images, trained
from benchmarks.report import Row
from involution import export, fold

Network = Callable[[Tensor], Tensor]


def _in_onnxruntime(model: torch.nn.Module, folder: Path, threads: int) -> Network:
    import onnxruntime

    export.export_onnx(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow what comes next
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _as_package(model: torch.nn.Module, folder: Path, threads: int) -> Network:
    export.export_aoti(model, folder / "model.pt2")
    return torch._inductor.aoti_load_package(str(folder / "model.pt2"))


RUNTIMES = {"onnx": _in_onnxruntime, "aoti": _as_package}


def rows(args: argparse.Namespace) -> list[Row]:
    """RedNets against ResNets in a runtime; packages also against Python with the folded RedNet."""
    result: list[Row] = []
    for depth in args.depth:
        networks: dict[str, Network] = {}
        for kind in ("ResNet", "RedNet"):
            model = trained(f"{kind}{depth}".lower(), args.side, "cpu")
            with tempfile.TemporaryDirectory() as folder:
                networks[kind] = RUNTIMES[args.runtime](model, Path(folder), args.threads)
        if args.runtime == "aoti":  # onnxruntime's threads and torch's, side by side, would disturb each other
            networks["Python"] = fold(model)
        result += [{"depth": depth} | _row(networks, batch, args) for batch in args.batch]
    return result


def _row(networks: dict[str, Network], batch: int, args: argparse.Namespace) -> Row:
    x = images(batch, args.side, "cpu", torch.float32)
    inputs = {name: x if name == "Python" else x.contiguous() for name in networks}
    with torch.inference_mode():
        samples = timing.interleave({name: partial(networks[name], inputs[name]) for name in networks}, args.repeats)
    row: Row = {"batch": batch}
    row |= {f"{name} (ms)": timing.ms(samples, name) for name in samples}
    row["ResNet / RedNet"] = timing.ratio(samples, "ResNet", "RedNet")
    if "Python" in networks:
        row["Python / RedNet"] = timing.ratio(samples, "Python", "RedNet")
    return row


NOTE = "As scripts/export.py writes them, for images of any size. Python: the folded RedNet in torch, not compiled."
