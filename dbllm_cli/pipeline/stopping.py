"""Signals as errors: work ends in order, keeps its scratch, and can go on later."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dbllm_cli.errors import StoppedError


@contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """Raise StoppedError where the work stands when SIGTERM comes.

    Outside the main thread, where Python has no signal handlers, it does nothing.

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        raise _stopped()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if received and not isinstance(error, StoppedError):  # wrapped by a broad `except`
            raise _stopped() from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:  # a library's broad `except` swallowed the error
        raise _stopped()


def _stopped() -> StoppedError:
    return StoppedError("stopped by SIGTERM", "give the same command again to go on")


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Tells afterwards whether Ctrl-C was pressed, whatever a library made of the error."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
