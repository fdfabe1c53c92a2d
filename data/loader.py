"""What both loaders have in common: batches, positions, and rows that could not be read.

Shapes: b images a batch, C channels (as many as mean and std have values), S pixels a side.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from data import sampling
from data.bands import BY_PILLOW, decode_channels
from data.decode import MAX_PIXELS, BadImageError, LostDataError
from data.erasing import Erasing
from data.image_list import ImageList
from data.mixing import Mixing
from data.orders import repeat
from data.sampling import MicroBatch, Plan
from data.transforms import Transform, normalise

log = logging.getLogger("involution.data")

IN_ROW = 16  # files that are not there, none between them that is: then it is not the files
Row = TypeVar("Row")


class Batch(NamedTuple):
    """images (b, C, S, S) normalised, channels_last; targets (b,) int64; only the first `valid` rows count.

    Where pictures were mixed, each is a `share` of its own and, for the rest, of a partner of the class in `partners`.
    """

    images: torch.Tensor
    targets: torch.Tensor
    valid: int
    partners: torch.Tensor | None = None  # (valid,) int64
    share: float = 1.0

    def to(self, device: torch.device, *, channels_last: bool) -> "Batch":
        """The batch on the device, copied beside the computation when it lies in pinned memory."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        partners = None if self.partners is None else self.partners.to(device, non_blocking=True)
        return self._replace(images=images, targets=self.targets.to(device, non_blocking=True), partners=partners)


class Loaded(NamedTuple):
    """A batch: pictures (b, S, S, 3) in 8 bits, or (b, S, S, C) of many bands, on the device, targets (b,), bad files.

    `request` is what the rows are in the end.
    """

    pictures: torch.Tensor
    targets: torch.Tensor
    bad: list[BadImageError]
    request: MicroBatch

    def to(self, device: torch.device) -> "Loaded":
        return self._replace(pictures=self.pictures.to(device, non_blocking=True))


@dataclass(frozen=True)
class Settings:
    """How pictures become batches. mean and std are in units of [0, 1]; `workers` processes or threads decode."""

    images: ImageList
    transform: Transform
    mean: tuple[float, ...]  # a value a channel
    std: tuple[float, ...]
    device: torch.device
    workers: int
    decoder: str = "cpu"
    max_pixels: int = MAX_PIXELS
    erasing: Erasing | None = None
    mixing: Mixing | None = None

    @property
    def bands(self) -> int | None:
        """The channels of pictures that are not read in colours and, at most, made gray."""
        return None if len(self.mean) in BY_PILLOW else len(self.mean)

    def blank(self, size: int) -> torch.Tensor:
        """What stands for a picture where none can be read."""
        return torch.zeros(size, size, self.bands or 3, dtype=torch.float32 if self.bands else torch.uint8)

    def picture(self, data: bytes, index: int) -> Image.Image | torch.Tensor:
        """The picture at `index` from the bytes of its file; of many bands as `data.bands` has it.

        Raises:
            BadImageError: it cannot be read.
        """
        return decode_channels(data, self.images.paths[index], len(self.mean), self.max_pixels)


class Backend(Protocol):
    """Turns requests into batches, in order, reading ahead."""

    def stream(self, requests: Iterable[MicroBatch]) -> Iterator[Loaded]: ...

    def close(self) -> None: ...


def arrange(
    rows: list[Row | BadImageError], targets: np.ndarray, valid: int, blank: Row
) -> tuple[list[Row], np.ndarray, int]:
    """Puts the readable rows that count first and fills up with the others, so that the shape stays.

    Returns the rows, their targets and how many count. Without a readable row all are `blank`, and none counts.
    """
    good = [i for i, row in enumerate(rows) if not isinstance(row, BadImageError)]
    if len(good) == len(rows):
        return rows, targets, valid  # type: ignore[return-value]
    if not good:
        return [blank] * len(rows), np.zeros_like(targets), 0
    order = (good * len(rows))[: len(rows)]
    return [rows[i] for i in order], targets[order], sum(i < valid for i in good)  # type: ignore[misc]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations in this thread alone: OpenMP's threads would go on spinning on the cores that decode.

    Measured with 2 cores and 2 decoding threads: 847 images/s against 604.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Loader:
    backend: Backend
    settings: Any  # `images` are in it; here Settings
    on_error: str
    skipped: dict[str, str] = field(default_factory=dict)
    _lost: int = 0

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {self.on_error!r}, expected 'stop' or 'skip'")

    @property
    def dataset(self) -> Any:
        return self.settings.images

    def _take(self, stream: Iterator[Any]) -> Any:
        """The stream's next batch, normalised."""
        with _one_thread():
            return self._accept(next(stream))

    def _accept(self, loaded: Any) -> Any:
        self._note(loaded.bad, loaded.request.valid)
        s = self.settings
        batch = Batch(normalise(loaded.pictures, s.mean, s.std), loaded.targets, loaded.request.valid)
        if s.erasing is not None:
            s.erasing.apply(batch.images, loaded.request)
        if s.mixing is None:
            return batch
        mix = s.mixing.draw(loaded.request, *batch.images.shape[2:])
        mix.apply(batch.images[: batch.valid])
        return batch._replace(partners=loaded.targets[: batch.valid].flip(0), share=mix.share)

    def _note(self, bad: list[BadImageError], valid: int) -> None:
        """Raise bad files (on_error="stop") or note them in `skipped` {path: reason}; `valid` others were read.

        Raises:
            LostDataError: so many that this is no matter of single files.
        """
        for error in bad:
            if self.on_error == "stop":
                raise error
            if error.path not in self.skipped:
                self.skipped[error.path] = error.reason
                log.warning("left out %r: %s (%d files so far)", error.path, error.reason, len(self.skipped))
        lost = [error for error in bad if error.lost]
        self._lost = self._lost_so_far(len(lost), valid)
        if lost and self._lost >= self._limit():
            raise LostDataError(lost[-1])

    def _lost_so_far(self, now: int, valid: int) -> int:
        """Files that are not there, with those of a batch of which `valid` others were read."""
        return self._lost + now

    def _limit(self) -> int:
        """So many are too many."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops workers and threads. The loader must not be used afterwards."""
        self.backend.close()


class TrainLoader(_Loader):
    """An endless stream of this rank's training batches that can start at any position.

    It is its own iterator: going on after an evaluation or an epoch keeps what was prefetched.
    """

    def __init__(self, backend: Backend, settings: Any, plan: Plan, seed: int, on_error: str) -> None:
        super().__init__(backend, settings, on_error)
        self.plan, self.seed = plan, seed
        self.epoch = self.batch = 0
        self._stream: Iterator[Loaded] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def samples(self, step: int) -> int:
        """Number of samples of global step `step`, counted from the start of training, over all ranks."""
        return self.plan.samples(step)

    def micro_batches(self, step: int) -> int:
        """Number of batches this rank gets in that step."""
        return self.plan.micro_batches(step)

    def seek(self, step: int) -> None:
        """Makes the first batch of global step `step` the next one."""
        self._move(*self.plan.position(step))

    def state_dict(self) -> dict[str, int]:
        """The next batch not yet handed out; prefetched ones do not count."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._move(state["epoch"], state["batch"])

    def _move(self, epoch: int, batch: int) -> None:
        if (epoch, batch) != (self.epoch, self.batch):
            self.epoch, self.batch, self._stream = epoch, batch, None

    def _order(self, epoch: int) -> np.ndarray:
        """A function of (seed, epoch) alone."""
        order = sampling.permutation(self.seed, epoch, self.plan.n)
        return repeat(order, self.plan.repeats, self.plan.global_batch_size) if self.plan.repeats > 1 else order

    def _requests(self) -> Iterator[MicroBatch]:
        epoch, batch = self.epoch, self.batch
        while True:
            order = self._order(epoch)
            for number in range(batch, self.plan.batches_per_epoch):
                yield self.plan.micro_batch(order, epoch, number)
            epoch, batch = epoch + 1, 0

    def _lost_so_far(self, now: int, valid: int) -> int:
        return 0 if valid else self._lost + now

    def _limit(self) -> int:
        return min(IN_ROW, len(self.dataset))

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self.backend.stream(self._requests())
        batch = self._take(self._stream)
        self.batch += 1
        if self.batch == self.plan.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        return batch


class EvalLoader(_Loader):
    """This rank's share of an evaluation: equally many batches on every rank, every image once over all ranks."""

    def __init__(self, backend: Backend, settings: Any, requests: list[MicroBatch], on_error: str) -> None:
        super().__init__(backend, settings, on_error)
        self.requests = requests

    def __len__(self) -> int:
        return len(self.requests)

    def _limit(self) -> int:
        mine = sum(request.valid for request in self.requests)
        return min(mine, max(IN_ROW, mine // 2))

    def __iter__(self) -> Iterator[Batch]:
        self.skipped.clear()  # a file may be readable again
        self._lost = 0
        stream = self.backend.stream(self.requests)
        return (self._take(stream) for _ in self.requests)
