"""`doctor`: what this machine has of what dbllm needs, told without importing torch."""

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from dbllm_cli.commands.options import JsonOption, StoreOption
from dbllm_cli.console import Console, size_text
from dbllm_cli.errors import ConfigError, DbllmError
from dbllm_cli.machine.cpu_library import INSTRUCTION_SETS, REFERENCE, VARIABLE, library_path
from dbllm_cli.machine.packages import installed_version
from dbllm_cli.machine.processor import cpu_info, processor_name
from dbllm_cli.store import Store, resolve_model
from dbllm_cli.store.store import DEFAULT_ROOT

_DEMO_MODEL = "builtin:smollm2-135m"
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "i8mm", "sve", "bf16",
)  # fmt: skip
_REINSTALL = "pip install -c constraints.txt -e . again"
_EXTRAS = {"gguf": "only for .gguf models", "eval": "only for eval-tasks"}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        ok: whether all of dbllm works with it as it is.
        found: what is there.
        hint: how to mend or improve it.
    """

    name: str
    ok: bool
    found: str
    hint: str = ""


def register(app: typer.Typer) -> None:
    """Add `doctor`."""
    app.command("doctor")(doctor)


def doctor(store: StoreOption = DEFAULT_ROOT, json: JsonOption = False) -> None:
    """Tell what this machine has of what dbllm needs, and how to get the rest."""
    console = Console()
    checks = list(_checks(store))
    if json:
        console.print_json({"checks": [asdict(check) for check in checks]})
    else:
        rows = [
            (check.name, "ok" if check.ok else "PROBLEM", check.found, check.hint)
            for check in checks
        ]
        console.print_table(("check", "", "found", "hint"), rows)
    if not all(check.ok for check in checks):
        raise typer.Exit(ConfigError.exit_code)


def own_version() -> str:
    """The version of dbllm itself."""
    return installed_version("dbllm") or "not installed"


def _checks(store: Path) -> Iterator[Check]:
    installed = installed_version("dbllm") is not None
    hint = "" if installed else "pip install -e . (in the folder of pyproject.toml)"
    yield Check("dbllm", installed, own_version(), hint)
    yield Check("python", True, f"{platform.python_version()} at {sys.executable}")
    yield from _dependencies()
    yield _processor()
    yield _threads()
    yield _memory()
    yield _store(store)
    yield _compiler()
    yield _kernels()
    yield _gpu()
    yield _demo_model(store)


def _dependencies() -> Iterator[Check]:
    """The packages that dbllm's own metadata asks for, so that no list is kept here."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("dbllm") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, required):
        marker = requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        extras = [name for name in _EXTRAS if marker and marker.evaluate({"extra": name})]
        if optional and not extras:
            continue
        found = installed_version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        hint = "" if fits else f'pip install "{requirement.name}{requirement.specifier}"'
        if optional and found is None:
            yield Check(requirement.name, True, f"absent ({_EXTRAS[extras[0]]})", hint)
        else:
            yield Check(requirement.name, fits, found or "absent", hint)


def _processor() -> Check:
    info = cpu_info()
    features = {*info.get("flags", "").split(), *info.get("Features", "").split()}
    known = " ".join(feature for feature in _FEATURES if feature in features)
    return Check("processor", True, f"{processor_name(info)} ({known or 'no known features'})")


def _threads() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    return Check("threads", True, f"{count}" + (f", OMP_NUM_THREADS={limit}" if limit else ""))


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS
        return Check("memory", True, size_text(total))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("memory", True, f"{size_text(total)}, {size_text(free)} of it unused")


def _store(store: Path) -> Check:
    folder = next(path for path in (store.absolute(), *store.absolute().parents) if path.exists())
    free = size_text(shutil.disk_usage(folder).free)
    if os.access(folder, os.W_OK):
        return Check("store", True, f"{store}, {free} free")
    return Check("store", False, f"{folder} can't be written", "name another with --store")


def _compiler() -> Check:
    wanted = (os.environ.get("CC") or "cc").split()[0]
    found = next((path for name in (wanted, "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Check("C compiler", True, found)
    return Check("C compiler", True, "absent", "apt-get install gcc (for the CPU kernels)")


def _kernels() -> Check:
    """Whether the compiled CPU kernels are there, and whether a process with torch takes them."""
    path = library_path()
    if path is None:
        found = "not compiled: packed models run in plain torch, several times slower"
        hint = "install a C compiler, then: pip install --force-reinstall --no-deps -e ."
        return Check("CPU kernels", True, found, hint)
    try:
        supports = ctypes.CDLL(str(path)).dbllm_supports
    except (OSError, AttributeError) as error:
        return Check("CPU kernels", False, f"can't be loaded: {error}", _REINSTALL)
    names = [name for name in INSTRUCTION_SETS if supports(name.encode())]
    forced = os.environ.get(VARIABLE)
    if forced and forced not in (*names, REFERENCE):
        hint = f"one of {', '.join((*names, REFERENCE))}"
        return Check("CPU kernels", False, f"{VARIABLE}={forced} can't be used", hint)
    refusal = _refusal()
    if refusal:
        return Check("CPU kernels", False, f"can't be used: {refusal}", _REINSTALL)
    if forced:
        return Check("CPU kernels", True, f"{forced}, forced by {VARIABLE}")
    return Check("CPU kernels", True, f"{names[0]} (there too: {', '.join(names[1:])})")


def _refusal() -> str:
    """Why torch's process can't use the kernels; nothing where it can, or where torch is absent."""
    if installed_version("torch") is None:
        return ""
    code = "from dbllm_cli.kernels.cpu import refusal; print(refusal() or '')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr.strip().splitlines() or [f"its process ended with {result.returncode}"]
        return f"torch can't be imported: {said[-1]}"
    return result.stdout.strip()


def _gpu() -> Check:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("GPU", True, "none found")
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("GPU", True, f"nvidia-smi fails: {error}")
    names = "; ".join(result.stdout.splitlines())
    if "+cpu" in (installed_version("torch") or ""):
        return Check("GPU", True, names, "this torch is built without CUDA: install one with it")
    return Check("GPU", True, names)


def _demo_model(store: Path) -> Check:
    try:
        model = resolve_model(_DEMO_MODEL, None, Store(store))
    except DbllmError as error:
        return Check("demo model", True, error.message, error.hint)
    return Check("demo model", True, str(model.path))
