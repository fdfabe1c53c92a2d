"""Networks to be measured: their images, weights that make an evaluation meaningful, a training step."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from involution import create_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], Any]


def images(batch: int, side: int, device: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def fit_statistics(model: nn.Module, x: Tensor) -> None:
    """Show images to every BatchNorm; with statistics that are not its own a fresh RedNet overflows in evaluation."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()  # also in a backbone that keeps its statistics
        norm.momentum = None  # the plain average
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1


def trained(name: str, side: int, device: str) -> nn.Module:
    """A model whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = create_model(name).to(device).to(memory_format=torch.channels_last)
    fit_statistics(model, images(4, side, device, torch.float32))
    return model.eval()


def rounds(args: argparse.Namespace) -> int:
    """How often training steps are measured: they take longest."""
    return max(1, args.repeats - 2)


def training_step(
    name: str, batch: int, args: argparse.Namespace, compiled: bool = False, theirs: bool = False
) -> Call:
    """`theirs`: torchvision's network of this name."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name) if theirs else create_model(name)
    model = model.to(args.device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    x = images(batch, args.side, args.device, torch.float32)
    y = torch.randint(1000, (batch,), device=args.device)
    network = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = F.cross_entropy(network(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
