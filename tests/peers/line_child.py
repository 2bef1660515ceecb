"""A contender in its own process that answers one line of JSON to every line it reads.

While it waits for a line it sleeps: contenders take turns without taking each other's cores. This
file needs nothing beside Python: contenders import it in their own environments.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The workers of an OpenMP pool spin for some milliseconds after their last product.
SETTLE_SECONDS = 0.03


def openmp_settings(threads: int) -> dict[str, str]:
    """What keeps a pool's threads, woken after a sleep, from meeting on one core for a while."""
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if threads > 1 else {}


class ChildError(RuntimeError):
    """A contender answered with an error, or ended."""


class LineChild:
    """Starts a process and asks it lines.

    Args:
        command: the process.
        environment: variables it has beside ours.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def send(self, line: str) -> None:
        """Write a line, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The next answer.

        Raises:
            ChildError: it is an error, or the process ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(f"{self._command[:3]} ended with {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def ask(self, line: str) -> Any:
        """The answer to a line, when no pool of threads spins any more, here or there."""
        time.sleep(SETTLE_SECONDS)
        self.send(line)
        answer = self.receive()
        time.sleep(SETTLE_SECONDS)
        return answer

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve_rounds(run: Callable[[int], dict[str, float]]) -> None:
    """Say that all is loaded, then answer every line.

    Args:
        run: from the number of threads, that a line holds, to the round's figures.
    """
    print(json.dumps(memory()), flush=True)
    for line in sys.stdin:
        # Of the whole machine, to tell how busy others kept it.
        others = busy_seconds() - time.process_time()
        answer = run(int(line))
        others = busy_seconds() - time.process_time() - others
        print(json.dumps(answer | {"others": others} | memory()), flush=True)


def busy_seconds() -> float:
    """Seconds that all cores together have worked since the start, to a hundredth."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0]
    user, nice, system, _, _, irq, soft, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, float]:
    """Bytes this process has resident: at most so far, now, and now outside of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in names.items()}
