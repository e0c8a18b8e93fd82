"""Compiles a C++ file of this folder with the machine's own compiler, once, and loads it.

A plain shared library with C functions, called through ctypes: no headers of Python or torch, so that it builds in
seconds with any compiler and serves every release of both. The result is kept in the user's cache folder, under a name
that tells the sources, the flags, the compiler and the instructions that it uses; a folder shared by different machines
is no problem.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_LOG = logging.getLogger(__name__)
_TIMEOUT = 300  # seconds
# Nothing that changes a result: no contraction of a * b + c. Of what is not computed, only errno and traps are dropped.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of `name`.cpp, or None, with the reason logged, where it cannot be built."""
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)
    if compiler is None:
        _LOG.info("no C++ compiler (CXX, g++, clang++, c++): %s runs as torch operations, with the same results", name)
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or error
        _LOG.warning("%s could not build %s, which runs as torch operations: %s", compiler, source.name, details)
        return None


def _built(source: Path, compiler: str) -> Path:
    command = [compiler, *_FLAGS, _NATIVE, *_threads(compiler)]
    # The predefined macros name the compiler's version and every extension of the instruction set.
    macros = _run([compiler, _NATIVE, "-dM", "-E", "-x", "c++", os.devnull])
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, macros, *command]).encode()).hexdigest()[:16]
    target = _folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        # Under another name first: several processes may build at once, and one may be killed.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unfinished = Path(folder) / target.name
            _run([*command, str(source), "-o", str(unfinished)])
            unfinished.replace(target)
    return target


def _threads(compiler: str) -> tuple[str, ...]:
    """The flag of OpenMP, where the compiler has its runtime; without it the loops run on one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-fopenmp", "-x", "c++", "-", "-o", str(Path(folder) / "probe")]
        found = subprocess.run(command, input=program, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    return ("-fopenmp",) if found.returncode == 0 else ()


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or where that cannot be written, a folder of this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_fp8"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="lightning_fp8-"))


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
