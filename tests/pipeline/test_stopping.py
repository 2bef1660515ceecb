"""Killed, stopped and crowded runs, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbllm_cli.errors import ConfigError, StoppedError
from dbllm_cli.pipeline.stopping import stops_on_sigterm
from dbllm_cli.store import Artifact, Store

pytestmark = pytest.mark.slow

# Runs the stage `slow` in the store argv[1]. argv[2] says what happens in it: `plain`, `wait`, or
# a number: the process is killed with -9 before its so-manieth step of publishing.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from types import ModuleType

from dbllm_cli.configs import StageConfig
from dbllm_cli.errors import DbllmError
from dbllm_cli.pipeline.stage import run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.context import Result
from dbllm_cli.stages.spec import StageSpec
from dbllm_cli.store import Store, disk

mode = sys.argv[2]

class Told(SilentProgress):
    def note(self, message):
        print(message, flush=True)

def body(config, inputs, ctx):
    (ctx.out / "inner").mkdir()
    (ctx.out / "inner" / "data.txt").write_text("content")
    (ctx.scratch / "checkpoint").write_text("kept")
    if mode == "fill":
        (ctx.out / "big").write_bytes(bytes(2**20))
    if mode in ("wait", "moment"):
        print("running", flush=True)
        time.sleep(60 if mode == "wait" else 1.5)
    (ctx.out / "mode.txt").write_text(mode)
    return Result({})

def dying(step):
    def call(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)
    return call

if mode.isdigit():
    left = int(mode)
    disk.sync = dying(disk.sync)
    Path.rename = dying(Path.rename)

module = sys.modules["dbllm_cli.stages.slow"] = ModuleType("dbllm_cli.stages.slow")
module.run = body
spec = StageSpec("slow", 1, StageConfig, (), "eval", "Slow.")
try:
    store = Store(Path(sys.argv[1]))
    run_stage(
        spec, StageConfig(), {}, store, progress=Told(), force="force" in sys.argv,
        wait="wait for it" in sys.argv,
    )
except DbllmError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def command(store: Store, *arguments: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(store.root), *arguments]


def finish(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(store, *arguments), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def waiting(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the midst of a stage."""
    with subprocess.Popen(
        command(store, "wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
        process.kill()


def scratch_of(store: Store) -> list[str]:
    return [path.name for path in (store.root / ".scratch").glob("*/*")]


def whole_artifacts(store: Store) -> int:
    """How many artifacts there are; each must be whole."""
    found = store.artifacts()
    for item in found:
        assert isinstance(item, Artifact), item
        assert store.verify(item) == []
    return len(found)


@pytest.mark.parametrize("arguments", [(), ("force",)], ids=["first", "forced"])
def test_a_kill_between_writes_leaves_the_whole_artifact_or_none(
    store: Store, arguments: tuple[str, ...]
) -> None:
    counts = []
    for step in range(1, 20):
        if arguments:
            assert finish(store, "plain").returncode == 0
        done = finish(store, str(step), *arguments)
        counts.append(whole_artifacts(store))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert scratch_of(store) == ["checkpoint"]
    assert done.returncode == 0
    assert len(counts) >= 6
    assert set(counts) == {0, 1}
    assert finish(store, "plain").returncode == 0
    assert whole_artifacts(store) == 1


def test_sigterm_ends_the_run_resumably(store: Store, waiting: subprocess.Popen[str]) -> None:
    waiting.terminate()
    _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 75
    assert "stopped by SIGTERM" in errors
    assert store.artifacts() == []
    assert scratch_of(store) == ["checkpoint"]
    assert list((store.root / ".staging").iterdir()) == []
    assert finish(store, "plain").returncode == 0
    assert whole_artifacts(store) == 1


def test_a_second_run_fails_at_once_and_names_the_first(
    store: Store, waiting: subprocess.Popen[str]
) -> None:
    second = finish(store, "plain")
    assert second.returncode == 6
    assert f"held by another run: process {waiting.pid}" in second.stderr


def test_a_second_run_that_may_wait_says_for_whom_and_takes_what_the_first_has_made(
    store: Store,
) -> None:
    with subprocess.Popen(command(store, "moment"), stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "running\n"
        second = finish(store, "plain", "wait for it")
        assert second.returncode == 0
        assert f"is being made by process {first.pid} on" in second.stdout
        assert first.wait(timeout=60) == 0
    (artifact,) = store.artifacts()
    assert isinstance(artifact, Artifact)
    assert (artifact.path / "mode.txt").read_text() == "moment"


def test_a_run_that_waits_can_be_stopped(store: Store, waiting: subprocess.Popen[str]) -> None:
    with subprocess.Popen(
        command(store, "plain", "wait for it"), stdout=subprocess.PIPE, text=True
    ) as second:
        assert second.stdout is not None
        assert "waiting until it ends" in second.stdout.readline()
        second.terminate()
        assert second.wait(timeout=60) == 75


def test_after_a_kill_the_same_command_goes_on(
    store: Store, waiting: subprocess.Popen[str]
) -> None:
    waiting.kill()
    waiting.wait()
    assert finish(store, "plain").returncode == 0
    assert whole_artifacts(store) == 1
    assert list((store.root / ".staging").iterdir()) == []


def test_a_full_disk_ends_the_stage_with_a_clear_error(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        store = Store(disk)
        done = finish(store, "fill")
        assert done.returncode == 6
        assert "no space left on the disk of the store" in done.stderr
        assert store.artifacts() == []
        assert finish(store, "plain").returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_sigterm_is_an_error_only_inside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as caught, stops_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_that_a_library_swallows_still_counts() -> None:
    def swallow() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StoppedError:
            return

    with pytest.raises(StoppedError), stops_on_sigterm():
        swallow()


def test_another_thread_runs_without_a_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stops_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_stop_that_a_library_takes_for_its_own_error_still_counts() -> None:
    def wrap() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise ConfigError("no network", "try again") from error

    with pytest.raises(StoppedError), stops_on_sigterm():
        wrap()


def test_an_error_without_a_stop_stays_what_it_is() -> None:
    with pytest.raises(ConfigError), stops_on_sigterm():
        raise ConfigError("no network", "try again")
