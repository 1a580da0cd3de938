"""What a training step costs: seconds, and the peak memory of the process or the GPU."""

import statistics
import threading
import time
from types import TracebackType

import psutil
import torch

__all__ = ["Meter"]

_SAMPLE_SECONDS = 0.005


class Meter:
    """Measure what runs inside `with meter:`; several such parts and a `lap()` make a step.

    Peak memory is the resident memory of the process, sampled, or what a GPU had allocated.

    Args:
        device: where the model is.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._laps: list[float] = []
        self._seconds = 0.0

    @property
    def median_seconds(self) -> float:
        return statistics.median(self._laps)

    @property
    def peak_gb(self) -> float:
        return self.peak_bytes / 1e9

    def lap(self) -> None:
        """End a step."""
        self._laps.append(self._seconds)
        self._seconds = 0.0

    def __enter__(self) -> "Meter":
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._sampler.start()
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        self._seconds += time.perf_counter() - self._begin
        self._stop.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            self._stop.wait(_SAMPLE_SECONDS)
