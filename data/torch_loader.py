"""The torchvision-style loader: Pillow in the worker processes of a torch DataLoader.

Shapes: b images a batch, S pixels a side.
"""

import gc
import logging
import signal
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data.decode import BadImageError
from data.loader import Loaded, Settings, arrange
from data.sampling import MicroBatch
from data.transforms import cut
from involution.cores import cores

log = logging.getLogger("involution.data")
PREFETCH = 4  # batches a worker keeps ready


class Pictures(Dataset[Loaded]):
    """Map-style data set whose items are whole micro-batches."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __getitem__(self, request: MicroBatch) -> Loaded:
        images, transform = self.settings.images, self.settings.transform
        size = transform.size_at(request.epoch)
        draws = transform.draws(request).tolist()
        rows = [self._row(int(i), draw, size) for i, draw in zip(request.indices, draws, strict=True)]
        bad = [row for row in rows[: request.valid] if isinstance(row, BadImageError)]
        good, places, valid = arrange(rows, np.arange(len(rows)), request.valid, self.settings.blank(size))
        request = request.take(places, valid)
        targets = torch.from_numpy(images.targets[request.indices].astype(np.int64))
        # in 8 bits and, in a worker, in shared memory: a quarter of the bytes between the processes, and to a GPU
        return Loaded(default_collate(good), targets, bad, request)

    def _row(self, index: int, draw: list[float], size: int) -> torch.Tensor | BadImageError:
        images, transform = self.settings.images, self.settings.transform
        try:
            picture = self.settings.picture(images.read(index), index)
        except BadImageError as error:
            return error  # not raised here: a DataLoader would wrap the message in a traceback of its worker
        picture = transform.finish(cut(picture, transform, draw), draw, size)
        transform.augment(picture, draw)
        return picture


class _Requests(Sampler[MicroBatch]):
    def __init__(self) -> None:
        self.requests: Iterable[MicroBatch] = ()

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.requests)


def _outlive_signals(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach the workers too, but the trainer still needs them to finish its step.

    The alarm ends a worker that nobody collects, long after any step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(3600))


@cache
def at_most_cores(workers: int) -> int:
    """`workers`, but no more than this process has cores, which it says once: more would only take turns."""
    if workers > cores():
        log.info("data.workers=%d: %d, as many as there are cores", workers, cores())
    return min(workers, cores())


class TorchBackend:
    """See data.loader.Backend.

    Args:
        pictures: maps a MicroBatch to what the worker processes hand out.
        workers: processes, or as many as there are cores.
    """

    def __init__(self, pictures: Dataset[Any], workers: int, device: torch.device) -> None:
        workers = at_most_cores(workers)
        self._requests = _Requests()
        self._device = device
        self._loader = DataLoader(
            pictures,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # so that starting an epoch leaves the global random state alone
        )

    def stream(self, requests: Iterable[MicroBatch]) -> Iterator[Any]:
        self._requests.requests = requests
        if self._loader._iterator is not None or not self._loader.num_workers:
            return self._on_device(iter(self._loader))
        gc.collect()
        gc.freeze()  # a forked worker must not collect the parent's objects: a DALI pipeline's destructor crashes there
        try:
            return self._on_device(iter(self._loader))
        finally:
            gc.unfreeze()

    def _on_device(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch.to(self._device)

    def close(self) -> None:
        iterator, self._loader._iterator = self._loader._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
