"""timm's training loop, from the components that it publishes: what its train.py does with the same settings.

An update of train.py's `train_one_epoch` on one device without mixed precision: loader without prefetcher, loss,
backward, update, meters, and the schedule's step; its options channels-last, opt momentum, smoothing 0.1, bilinear
interpolation, and neither color jitter nor warm-up, as ours.
"""

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn


def loop(
    model: nn.Module, root: str, *, side: int, batch_size: int, lr: float, smoothing: float, updates: int, device: str
) -> Callable[[], None]:
    """One update a call, on random crops of root/train/<class>/, loaded in this process."""
    from timm.data import create_dataset, create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    loader = create_loader(
        create_dataset("", root=root, split="train", is_training=True, batch_size=batch_size),
        input_size=(3, side, side), batch_size=batch_size, is_training=True, color_jitter=0.0, num_workers=0,
        device=torch.device(device), use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    optimizer = create_optimizer_v2(
        model, opt="momentum", lr=lr, weight_decay=1e-4, momentum=0.9, filter_bias_and_bn=False
    )
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=updates
    )
    loss_fn = LabelSmoothingCrossEntropy(smoothing)
    losses, update_time, data_time = AverageMeter(), AverageMeter(), AverageMeter()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    stream, numbers = batches(), itertools.count(1)

    def update() -> None:
        begin = time.time()
        images, targets = next(stream)
        images, targets = images.to(device), targets.to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        data_time.update(time.time() - begin)
        loss = loss_fn(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        update_time.update(time.time() - begin)
        schedule.step_update(num_updates=next(numbers), metric=losses.avg)

    return update
