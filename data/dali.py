"""The DALI loader: native threads decode nothing but the window that a crop needs, or a GPU decodes and resizes.

Order, windows and flips come from the same pure functions as in the torch loader. Python reads the encoded files in
threads ahead of the pipeline and looks at their headers: what is not a plain JPEG or PNG takes the way through Pillow
and enters the pipeline as an uncompressed picture, so that every file is decoded as Pillow does it, or is named. On the
CPU the same function as in the torch loader resizes and flips: the two loaders' pictures are equal to the last bit.

Shapes: b images a batch, 3 channels, S pixels a side.
"""

import ctypes
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import Pipeline, fn, types

from data.decode import BadImageError
from data.loader import Loaded, Settings, arrange
from data.plain import plain_size
from data.sampling import MicroBatch
from data.torch_loader import at_most_cores
from data.transforms import TrainTransform, cut
from involution.checks import first_line

log = logging.getLogger("involution.data")
QUEUE = 4  # batches DALI prepares ahead: 18 % faster than 2 on a busy 2-core machine
READERS = 8  # threads that read files
CHUNK = 32  # files a task reads
BUILT = int(str(nvidia.dali.__cuda_version__)[:2])  # the CUDA that DALI is made for; 13.4.92 is written 13492
_DEVICE_PADDING, _HOST_PADDING = 211025920, 140544512  # nvJPEG buffers for ImageNet's largest image: no reallocation


def unfit_for(device: torch.device) -> str | None:
    """Why this DALI cannot work on a GPU that torch can use; None if it can, or on a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "DALI is for NVIDIA's GPUs"
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return unfit(version.value // 1000, torch.cuda.get_device_capability(device))


def unfit(driver: int, capability: tuple[int, int], built: int = BUILT) -> str | None:
    """The same for a driver for CUDA `driver`, a GPU of this compute capability, and a DALI made for CUDA `built`."""
    if driver < built:
        return f"this DALI is made for CUDA {built}, the driver for {driver}: pip install nvidia-dali-cuda{driver}0"
    if built >= 13 and capability < (7, 5):
        return f"DALI for CUDA {built} needs a GPU of compute capability 7.5 or more: pip install nvidia-dali-cuda120"
    return None


class _Row(NamedTuple):
    """A sample as the pipeline takes it: encoded bytes and the window to decode; then what to do with the window.

    DALI resizes `box` in it and flips it where `mirror` is true; on the CPU `draw` decides, if it is not None.
    """

    data: np.ndarray
    window: tuple[int, int, int, int]
    box: tuple[float, float, float, float]
    mirror: bool
    draw: list[float] | None


class _Work(NamedTuple):
    """A request whose rows are being read; `pillow` sends all of them through Pillow."""

    request: MicroBatch
    pillow: bool
    rows: list[Future[list[_Row | BadImageError]]]


def _ready(picture: torch.Tensor) -> _Row:
    """A row for a picture (S, S, 3) that needs nothing more: as PPM, which DALI reads back exactly and without work."""
    height, width, _ = picture.shape
    data = b"P6 %d %d 255\n" % (width, height) + picture.numpy().tobytes()
    box = (0.0, 0.0, float(height), float(width))
    return _Row(np.frombuffer(data, np.uint8), (0, 0, height, width), box, False, None)


class DaliBackend:
    """See data.loader.Backend. `resize` lets DALI resize and flip, which pays on a GPU only."""

    def __init__(self, settings: Settings, resize: bool | None = None) -> None:
        self.settings = settings
        # policies work on the CPU, and then all the rest does
        automatic = settings.device.type == "cuda" and not settings.transform.policies
        self.resize = automatic if resize is None else resize
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="image-reader")
        self.threads = max(1, at_most_cores(settings.workers))
        self._augmenters = ThreadPoolExecutor(self.threads, thread_name_prefix="image-augmenter")

    def stream(self, requests: Iterable[MicroBatch]) -> Iterator[Loaded]:
        source: Iterable[tuple[MicroBatch, bool]] = ((request, False) for request in requests)
        while True:
            run = _Run(self, source)
            try:
                yield from run
                return
            except RuntimeError as error:  # a file that looked plain, and that DALI could not decode
                unfinished = [(request, pillow) for request, pillow, _ in run.unfinished()]
                if not unfinished or unfinished[0][1]:
                    raise
                log.warning("DALI fails, so some batches go through Pillow: %s", first_line(error))
                source = itertools.chain(((request, True) for request, _ in unfinished), run.source)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._augmenters.shutdown(cancel_futures=True)

    def read(self, request: MicroBatch, pillow: bool) -> _Work:
        """Starts reading a batch in chunks."""
        size = self.settings.transform.size_at(request.epoch)
        draws = self.settings.transform.draws(request).tolist()
        pairs = list(zip(request.indices.tolist(), draws, strict=True))
        chunks = [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]
        return _Work(request, pillow, [self._readers.submit(self._rows, chunk, size, pillow) for chunk in chunks])

    def _rows(self, pairs: list[tuple[int, list[float]]], size: int, pillow: bool) -> list[_Row | BadImageError]:
        return [self._row(index, draw, size, pillow) for index, draw in pairs]

    def _row(self, index: int, draw: list[float], size: int, pillow: bool) -> _Row | BadImageError:
        images, transform = self.settings.images, self.settings.transform
        try:
            data = images.read(index)
            shape = None if pillow else plain_size(data, self.settings.max_pixels)
            if shape is not None and (not self.resize or transform.same_in_dali(*shape)):
                region = transform.region(draw, *shape)
                return _Row(np.frombuffer(data, np.uint8), *region, transform.mirror(draw), draw)
            picture = self.settings.picture(data, index)
            picture = transform.finish(cut(picture, transform, draw), draw, size)
            transform.augment(picture, draw)
            return _ready(picture)
        except BadImageError as error:
            return error

    def pipeline(self, source: Iterator[tuple[Any, ...]], batch_size: int) -> Pipeline:
        """Encoded files and windows -> windows (h, w, 3), or finished pictures (S, S, 3)."""
        settings = self.settings
        gpu = settings.device.type == "cuda" and self.resize
        mixed = gpu and settings.decoder == "mixed"
        hints: Any = {}
        if mixed:
            hints["jpeg_fancy_upsampling"] = True  # of chroma, as libjpeg does it on the CPU
        if mixed and isinstance(settings.transform, TrainTransform):  # evaluations are short: their buffers may grow
            hints |= {"device_memory_padding": _DEVICE_PADDING, "host_memory_padding": _HOST_PADDING}
        pipe = Pipeline(
            batch_size,
            num_threads=self.threads,
            device_id=(settings.device.index or 0) if gpu else None,
            prefetch_queue_depth=QUEUE,
        )
        with pipe:
            pixels: Any
            # a copy costs 3 %; on a GPU work may still be queued when a batch is handed out
            data, start, shape, *rest = fn.external_source(source, num_outputs=7 if self.resize else 3, no_copy=not gpu)
            pixels = fn.decoders.image_slice(
                data,
                device="mixed" if mixed else "cpu",
                start=start,
                shape=shape,
                axis_names="HW",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,  # Pillow's convert does not apply Exif either
                **hints,
            )
            if self.resize:
                low, high, size, mirror = rest
                pixels = fn.resize(
                    pixels.gpu() if gpu and not mixed else pixels,
                    size=size,
                    roi_start=low,
                    roi_end=high,
                    interp_type=types.DALIInterpType.INTERP_LINEAR,
                    antialias=True,
                    subpixel_scale=False,
                )
                pixels = fn.flip(pixels, horizontal=mirror)
            pipe.set_outputs(pixels)
        pipe.build()
        return pipe

    def finish(self, windows: Any, draws: list[list[float] | None], size: int) -> torch.Tensor:
        """The pipeline's output -> pictures (b, S, S, 3)."""
        if self.resize:
            return torch.from_dlpack(windows.as_tensor())  # no copy
        pictures = torch.empty(len(draws), size, size, 3, dtype=torch.uint8)
        for picture, window, draw in zip(pictures, windows, draws, strict=True):
            window = torch.from_dlpack(window)
            picture.copy_(window if draw is None else self.settings.transform.finish(window, draw, size))
        if self.settings.transform.policies:
            n = self.threads  # shares: a task for each picture costs more in switches
            shares = ([values[i::n] for i in range(n)] for values in (pictures, draws))
            list(self._augmenters.map(self._augment, *shares))
        if self.settings.device.type == "cuda":
            pictures = pictures.pin_memory().to(self.settings.device, non_blocking=True)
        return pictures

    def _augment(self, pictures: torch.Tensor, draws: list[list[float] | None]) -> None:
        for picture, draw in zip(pictures, draws, strict=True):
            if draw is not None:
                self.settings.transform.augment(picture, draw)


class _Running(NamedTuple):
    """A batch inside the pipeline. DALI reads `inputs` where they lie, but does not keep them alive."""

    work: _Work
    inputs: tuple[Any, ...]
    draws: list[list[float] | None]
    size: int
    request: MicroBatch
    bad: list[BadImageError]


class _Run:
    """One pass of a pipeline over requests; iterating gives the batches."""

    def __init__(self, backend: DaliBackend, source: Iterable[tuple[MicroBatch, bool]]) -> None:
        self.backend, self.settings = backend, backend.settings
        self.source = iter(source)
        self._reading: deque[_Work] = deque()
        self._running: deque[_Running] = deque()

    def unfinished(self) -> list[_Work]:
        """What was begun and not handed out, in order."""
        return [entry.work for entry in self._running] + list(self._reading)

    def __iter__(self) -> Iterator[Loaded]:
        self._refill()
        if not self._reading:
            return
        pipe: Any = self.backend.pipeline(self._feed(), len(self._reading[0].request.indices))
        pipe.inputs_in_flight = self._running  # so that they live until its threads have stopped, also when abandoned
        device = self.settings.device
        while True:
            try:
                # on the stream that will read the batch: its memory is not reused before that stream is done with it
                on_device = device.type == "cuda" and self.backend.resize
                (windows,) = pipe.run(torch.cuda.current_stream(device) if on_device else None)
            except StopIteration:
                return
            done = self._running.popleft()
            pictures = self.backend.finish(windows, done.draws, done.size)
            targets = self.settings.images.targets[done.request.indices].astype(np.int64)
            yield Loaded(pictures, torch.from_numpy(targets), done.bad, done.request)

    def _refill(self) -> None:
        for request, pillow in itertools.islice(self.source, max(0, 2 - len(self._reading))):
            self._reading.append(self.backend.read(request, pillow))

    def _feed(self) -> Iterator[tuple[Any, ...]]:
        """The pipeline's inputs of a batch after the other; DALI calls this when it has room in its queue."""
        while self._reading:
            work = self._reading[0]
            rows = [row for future in work.rows for row in future.result()]
            self._reading.popleft()
            request, transform = work.request, self.settings.transform
            size = transform.size_at(request.epoch)
            bad = [row for row in rows[: request.valid] if isinstance(row, BadImageError)]
            blank = _ready(self.settings.blank(size))
            good, places, valid = arrange(rows, np.arange(len(rows)), request.valid, blank)
            request = request.take(places, valid)
            self._refill()
            window = np.array([row.window for row in good], np.int32)
            inputs: tuple[Any, ...] = ([row.data for row in good], window[:, :2].copy(), window[:, 2:].copy())
            if self.backend.resize:
                box = np.array([row.box for row in good], np.float32)
                mirror = np.array([row.mirror for row in good], np.int32)
                inputs += (box[:, :2].copy(), box[:, 2:].copy(), np.full((len(good), 2), size, np.float32), mirror)
            self._running.append(_Running(work, inputs, [row.draw for row in good], size, request, bad))
            yield inputs
