"""Order and augmentation as pure functions of (seed, epoch, sample).

Nothing here knows of files, loaders, workers or devices, so that both loaders, any number of ranks and a resumed run
see the same images, crops and flips. All random bits come from Philox4x32-10 (Salmon et al., SC 2011), a counter-based
generator: random access needs no state, and unlike `np.random.Generator` its stream cannot change with a NumPy release.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CANDIDATES = 10  # windows RandomResizedCrop tries before it falls back to a central crop
DRAWS = 4 * CANDIDATES + 1  # area, ratio, top, left of every candidate, then the flip
_MASK = np.uint64(0xFFFFFFFF)
_CHUNK = 1 << 14  # samples numbered at once: stays in the cache
_SHUFFLE, _AUGMENT, _PLAIN, _MIX, _POLICY, _ERASE = range(6)  # separate streams of one seed
_COPY = 16  # from a stream to that of a sample's next copy in an epoch


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32 with 10 rounds: counter (..., 4) -> random (..., 4); 32-bit words, kept in uint64."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def _words(seed: int, epoch: int, stream: int | np.ndarray, indices: np.ndarray, blocks: int) -> np.ndarray:
    """(n, 4 * blocks) random 32-bit words for n sample indices; `stream` is one, or (n, 1)."""
    counter = np.empty((len(indices), blocks, 4), np.uint64)
    counter[..., 0] = np.asarray(indices, np.uint64)[:, None]
    counter[..., 1] = np.arange(blocks, dtype=np.uint64)
    counter[..., 2] = epoch
    counter[..., 3] = stream
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(len(indices), -1)


def uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1): as many as wanted, for whatever `index` numbers."""
    return _words(seed, 0, _PLAIN, np.array([index]), -(-count // 4))[0, :count].astype(np.float64) / 2.0**32


def normal(radius: float, angle: float) -> float:
    """A normal number of two in [0, 1) (Box and Muller, 1958)."""
    return math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)


def batch_uniforms(seed: int, epoch: int, position: int) -> np.ndarray:
    """(128,) numbers in [0, 1) for the micro-batch that begins at a position of an epoch."""
    return _words(seed, epoch, _MIX, np.array([position]), 32)[0].astype(np.float64) / 2.0**32


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order (n,) of an epoch: sample indices sorted by a random 64-bit number each (a true global shuffle)."""
    keys = np.empty(n, np.uint64)
    for start in range(0, n, _CHUNK):
        words = _words(seed, epoch, _SHUFFLE, np.arange(start, min(start + _CHUNK, n)), 1)
        keys[start : start + _CHUNK] = words[:, 0] << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable").astype(np.int32)


def draws(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """(n, DRAWS) numbers in [0, 1) that decide crop and flip of n samples of an epoch."""
    return _numbers(seed, epoch, _AUGMENT, indices, DRAWS)


def _numbers(seed: int, epoch: int, stream: int | np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    words = _words(seed, epoch, stream, indices, -(-count // 4))
    return words[:, :count].astype(np.float64) / 2.0**32


def crop_window(
    draw: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params from given numbers.

    Args:
        draw: one row of `draws`.
        height, width: of the image in pixels.
        scale: range of the window's share of the image's area.
        ratio: range of the window's width / height, drawn log-uniformly.

    Returns:
        (top, left, height, width) of the first of ten candidate windows that fits, or a central one.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * CANDIDATES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[i])
        aspect = math.exp(log_low + (log_high - log_low) * draw[i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[i + 2] * (height - h + 1)), int(draw[i + 3] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class MicroBatch:
    """What one rank loads at once: `indices` (batch_size,) of samples, of which the first `valid` count.

    `position` of the first one in the epoch's order: the same on any number of ranks. `copies` (batch_size,) tells the
    repetitions of a sample apart (repeated augmentation); None: all are the first.
    """

    epoch: int
    indices: np.ndarray
    valid: int
    position: int = 0
    copies: np.ndarray | None = None

    def take(self, places: np.ndarray, valid: int) -> "MicroBatch":
        """The same of other samples of it."""
        copies = None if self.copies is None else self.copies[places]
        return MicroBatch(self.epoch, self.indices[places], valid, self.position, copies)

    def draws(self, seed: int, policies: int = 0) -> np.ndarray:
        """(batch_size, DRAWS + policies) numbers in [0, 1): crop and flip, then what further operations take."""
        found = [_numbers(seed, self.epoch, self._stream(_AUGMENT), self.indices, DRAWS)]
        if policies:
            found.append(_numbers(seed, self.epoch, self._stream(_POLICY), self.indices, policies))
        return np.concatenate(found, axis=1)

    def erasing(self, seed: int, count: int) -> np.ndarray:
        """(batch_size, count) numbers in [0, 1) for random erasing."""
        return _numbers(seed, self.epoch, self._stream(_ERASE), self.indices, count)

    def _stream(self, stream: int) -> int | np.ndarray:
        return stream if self.copies is None else stream + _COPY * self.copies[:, None].astype(np.uint64)


@dataclass(frozen=True)
class Plan:
    """Which positions of an epoch's order make up which step, and which rank takes them in which micro-batch.

    Global step s takes positions [s * GB, min((s + 1) * GB, n)). Chunk j * world_size + rank of batch_size positions is
    this rank's micro-batch j. The last step of an epoch may be ragged: it has as many micro-batches as it needs, equal
    on every rank, and what is missing is filled with other samples of the epoch that do not count.

    With `repeats` an epoch holds so many copies of a part of the samples (see orders.repeat).
    """

    n: int
    batch_size: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"{self} is not possible: n and batch_size must be positive, 0 <= rank < world_size")
        if self.global_batch_size < 1 or self.global_batch_size % (self.batch_size * self.world_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of batch_size {self.batch_size} x "
                f"{self.world_size} ranks; change one of them so that it divides"
            )
        if not 1 <= self.repeats <= min(self.global_batch_size, self.n):
            raise ValueError(
                f"repeats is {self.repeats}; so many copies of a sample should fit a step of {self.global_batch_size} "
                f"and a data set of {self.n}: at least 1, and no more than either"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n // self.global_batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this rank in an epoch (equal on all ranks)."""
        return (self.steps_per_epoch - 1) * self._full + self.micro_batches(self.steps_per_epoch - 1)

    @property
    def _full(self) -> int:
        return self.global_batch_size // (self.batch_size * self.world_size)

    def samples(self, step: int) -> int:
        """Number of samples of global step `step`, counted from the start of training, over all ranks."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, self.n - start)

    def micro_batches(self, step: int) -> int:
        """Number of micro-batches this rank gets in global step `step`."""
        return -(-self.samples(step) // (self.batch_size * self.world_size))

    def position(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, batch): the step's first micro-batch on this rank."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self._full

    def micro_batch(self, order: np.ndarray, epoch: int, batch: int) -> MicroBatch:
        """The rank's micro-batch number `batch` of an epoch whose order (n,) is given."""
        step, micro = divmod(batch, self._full)
        start = step * self.global_batch_size + (micro * self.world_size + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        copies, indices = np.divmod(order[positions % self.n], self.n)
        valid = int(np.clip(self.n - start, 0, self.batch_size))
        return MicroBatch(epoch, indices, valid, start, copies if self.repeats > 1 else None)


def eval_batches(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """Finite plan of an evaluation: position p goes to rank p % world_size, equally many batches on every rank."""
    count = math.ceil(math.ceil(n / world_size) / batch_size)
    mine = np.arange(count * batch_size) * world_size + rank
    return [MicroBatch(0, rows % n, int((rows < n).sum())) for rows in mine.reshape(count, batch_size)]
