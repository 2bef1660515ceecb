"""The command `dbllm`. It imports little before it can be stopped in order: see `main`."""

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType

_INTERRUPTED, _STOPPED = 130, 75


def main() -> None:
    """Entry point of the console script.

    While the rest is imported nothing can be lost, so that a signal ends the process at once.
    Later `app.run` takes SIGINT, and the making of an artifact SIGTERM, as errors.
    """
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    # torch reads it when it is imported: what Apple's GPUs lack (frexp, eigh) runs on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if isinstance(sys.stdout, TextIOWrapper):
        # A path may hold bytes that are no text: they are printed as they are.
        sys.stdout.reconfigure(errors="surrogateescape")
    from dbllm_cli.app import run

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        _tell("interrupted")
        code = _INTERRUPTED
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    interrupted = number == signal.SIGINT
    _tell("interrupted" if interrupted else "stopped by SIGTERM")
    # An exception could be swallowed by whatever is being imported.
    os._exit(_INTERRUPTED if interrupted else _STOPPED)


def _tell(what: str) -> None:
    os.write(2, f"error: {what}\nhint: give the same command again\n".encode())


if __name__ == "__main__":
    main()
