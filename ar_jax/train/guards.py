"""What watches over a training: notices to stop, updates that go wrong, and updates that never end."""

import dataclasses
import faulthandler
import math
import os
import signal
import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils

AGAIN = os.EX_TEMPFAIL  # 75: exit code of a training that saved on notice; the same command goes on with it
BY_HAND = 128 + signal.SIGINT  # 130: the same after Ctrl-C


@dataclasses.dataclass(frozen=True)
class Guards:
    """When to speak up, and when to give up."""

    skipped: int = 10
    """Updates in a row without finite loss and gradients after which the training stops; 0 never stops it."""
    spike: float = 6.0
    """Report a loss that is above its running mean by so many running standard deviations; 0 never does."""
    hang: float = 1800.0
    """Seconds without an update after which the stacks of all threads are printed; 0 never does. Longer than the
    compilation of a preview."""


class Stopped(Exception):
    """The training was told to stop, and saved its state first.

    Attributes:
      code: to exit with.
    """

    def __init__(self, message: str, code: int = AGAIN):
        super().__init__(message)
        self.code = code


class Notice:
    """Whether this training was told to stop: by Ctrl-C, by SIGTERM or, with `jax.distributed`, the cluster's preemption
    notice.

    A context; signals end the process at once before it is entered and after it is left. So does a second Ctrl-C.

    Attributes:
      code: to exit with.
    """

    def __enter__(self):
        self._signalled, self.code = False, AGAIN
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt)}
        if not jax.distributed.is_initialized():  # its preemption service listens for the signal itself
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._listen)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, *_):
        self._signalled = True

    def _interrupt(self, *_):
        signal.signal(signal.SIGINT, lambda *_: os._exit(BY_HAND))  # files are renamed when they are whole
        print("\nstopping after this update, which is saved; Ctrl-C once more ends at once", file=sys.stderr, flush=True)
        self.code = BY_HAND
        os.kill(os.getpid(), signal.SIGTERM)  # as all processes hear it

    def received(self, step: int) -> bool:
        """To be asked after every update; True after the same update on all processes."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled


class Watchdog:
    """Prints the stacks of all threads if `alive` is not called for so many seconds; a context."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def alive(self) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()


class Health:
    """Looks at the metrics of every update, in order."""

    MEMORY = 0.99  # decay of the running mean and variance of the loss
    WARMUP = 50  # updates before they are believed

    def __init__(self, guards: Guards):
        self._guards, self._bad = guards, None
        self._seen, self._mean, self._variance = 0, 0.0, 0.0

    def check(self, step: int, metrics: dict[str, float]) -> tuple[str, dict[str, float]]:
        """What is to be said of an update, and its figures; ("", {}) of a usual one.

        Raises:
          ValueError: too many updates in a row were skipped; the first is reported.
        """
        if in_a_row := int(metrics["skipped_in_a_row"]):
            if in_a_row == 1:
                self._bad = metrics
            if self._guards.skipped and in_a_row >= self._guards.skipped:
                raise ValueError(self._report(step - in_a_row + 1, step))
            return f"skipped, {in_a_row} in a row: {_words(metrics)}", metrics
        return self._spike(metrics["loss"])

    def _report(self, first, last):
        return (
            f"neither of updates {first} to {last} had a finite loss and finite gradients; all were skipped. The first of "
            f"them, {first}: {_words(self._bad) if self._bad else 'before this process began'}. Lower the learning rate, "
            "clip gradients harder or look at the data; guards.skipped sets how many in a row are borne. The same command "
            "goes on from the newest checkpoint"
        )

    def _spike(self, loss):
        deviation = math.sqrt(self._variance)
        limit = self._mean + self._guards.spike * deviation
        found = "", {}
        if self._guards.spike and self._seen >= self.WARMUP and loss > limit:
            figures = {"spike/loss": loss, "spike/mean": self._mean, "spike/deviation": deviation}
            found = f"loss spike: {loss:.4g}, while the running mean is {self._mean:.4g} ± {deviation:.2g}", figures
            loss = limit  # so that a spike does not hide the next, and a lasting rise is not reported for ever
        self._seen += 1
        rate = max(1 / self._seen, 1 - self.MEMORY)  # plain moments at first
        away = loss - self._mean
        self._mean += rate * away
        self._variance = (1 - rate) * (self._variance + rate * away**2)
        return found


def _words(metrics):
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


class Profile:
    """Traces some updates with jax.profiler, from the tenth on: the first ones compile. A context."""

    FIRST = 10

    def __init__(self, folder: Path, updates: int):
        self._folder, self._updates, self._seen, self._tracing = folder, updates, 0, False

    def updated(self, metrics: object) -> None:
        """To be called after every update with something it computes."""
        self._seen += 1
        if self._updates and self._seen == self.FIRST - 1:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and self._seen == self.FIRST - 1 + self._updates:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self):
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"profile of {self._updates} updates in {self._folder}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()
