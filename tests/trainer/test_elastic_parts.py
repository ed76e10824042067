"""The small parts under a worker: notes about its end, thread counts, addresses."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.trainer.forkhost import ROOT
from trainyard.elastic import notes, threads
from trainyard.elastic.network import interface_of, wait_for_listener
from trainyard.elastic.worker import path0


def raised(source: str) -> BaseException:
    try:
        exec(source)  # noqa: S102 - ours
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("source", "code", "exception", "message"),
    [
        ("raise ValueError('x')", 1, "ValueError", "x"),
        ("raise SystemExit", 0, "SystemExit", ""),
        ("raise SystemExit(78)", 78, "SystemExit", "exited with code 78"),
        ("raise SystemExit(256 + 3)", 3, "SystemExit", "exited with code 3"),
        ("raise SystemExit('why')", 1, "SystemExit", "why"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt", ""),
        (
            "try: 1 / 0\nexcept ZeroDivisionError: raise SystemExit(78)",
            78,
            "ZeroDivisionError",
            "division by zero",
        ),
        (
            "try: 1 / 0\nexcept ZeroDivisionError: raise SystemExit(78) from None",
            78,
            "SystemExit",
            "exited with code 78",
        ),
        (
            "raise RuntimeError('bad\\nException raised from f at x.cpp:1\\nframe #0: y')",
            1,
            "RuntimeError",
            "bad",
        ),
    ],
)
def test_note_of(source: str, code: int, exception: str, message: str, tmp_path: Path) -> None:
    note = notes.note_of(raised(source))
    assert (note.exit_code, note.exception, note.message) == (code, exception, message)
    path = notes.path_of(tmp_path, 0)
    assert notes.read(path) is None
    notes.write(note, path)
    assert notes.read(path) == note
    path.write_text("{")
    assert notes.read(path) is None


def test_note_tells_of_the_exceptions_behind_it() -> None:
    error = raised(
        "try: raise OSError('reset by peer')\nexcept OSError as e: raise RuntimeError('step failed') from e"
    )
    assert notes.note_of(error).text == "RuntimeError: step failed | OSError: reset by peer"


def test_chain_that_bites_its_tail_ends() -> None:
    error = ValueError("a")
    error.__context__ = error
    assert notes.chain(error) == [error]


@pytest.mark.parametrize(("text", "number"), [("4", 4), ("4,2", 4), ("0", None), ("x", None), ("", None)])
def test_thread_count_wanted(text: str, number: int | None) -> None:
    assert threads.wanted({"OMP_NUM_THREADS": text}, "OMP_NUM_THREADS") == number


def test_several_processes_have_one_thread_each_unless_told_otherwise() -> None:
    for env, procs, wanted in (({}, 2, "1"), ({}, 1, None), ({"OMP_NUM_THREADS": "3"}, 2, "3")):
        threads.default_omp(env, procs)
        assert env.get("OMP_NUM_THREADS") == wanted


def test_threads_of_a_process_that_imported_with_one() -> None:
    code = (
        "import os\n"
        "for n in ('OMP', 'OPENBLAS', 'MKL'): os.environ[n + '_NUM_THREADS'] = '1'\n"
        "import numpy, torch\n"
        "from trainyard.elastic import threads\n"
        "assert torch.get_num_threads() == 1\n"
        "assert sum(1 for _ in os.scandir('/proc/self/task')) == 1\n"
        "threads.apply({'OMP_NUM_THREADS': '3', 'OPENBLAS_NUM_THREADS': '2'})\n"
        "try:\n"
        "    import threadpoolctl\n"
        "    libraries = [p for p in threadpoolctl.threadpool_info() if p['internal_api'] == 'openblas']\n"
        "    print(all(p['num_threads'] == 2 for p in libraries))\n"
        "except ImportError: print(True)\n"
        "print(torch.get_num_threads())\n"
        "threads.apply({})\n"
        "print(torch.get_num_threads() == len(os.sched_getaffinity(0)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["True", "3", "True"]


def test_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert interface_of("2001:db8::1") is None
    assert interface_of("a.name") is None


def test_wait_for_a_listener_that_is_late_or_never_comes() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        port = late.getsockname()[1]
        with pytest.raises(TimeoutError, match=f"127.0.0.1:{port}"):
            wait_for_listener("127.0.0.1", port, 0.05)
        timer = threading.Timer(0.1, late.listen)
        timer.start()
        begun = time.monotonic()
        wait_for_listener("127.0.0.1", port, 10)
        assert time.monotonic() - begun >= 0.1
        timer.join()


def test_path0_is_that_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "train.py").touch()
    (tmp_path / "train.py").symlink_to("..data/train.py")  # as a ConfigMap is mounted
    monkeypatch.chdir(tmp_path)
    for command in (["train.py"], ["-m", "train"]):
        code = "import sys; print(sys.path[0])"
        (tmp_path / "..data" / "train.py").write_text(code)
        said = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert path0(command) == (said or str(tmp_path))


def test_an_image_without_an_optional_package_preloads_without_a_warning() -> None:
    script = (
        "import sys\n"
        "for name in ('rich', 'tqdm', 'matplotlib', 'onnx'): sys.modules[name] = None\n"
        "from trainyard.elastic.zygote import import_all\n"
        "print(import_all(['not_there'], '.'))\n"
    )
    paths = os.pathsep.join([str(ROOT / "trainer-image"), str(ROOT / "operator")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (problem,) = ast.literal_eval(done.stdout.splitlines()[-1])
    assert problem.startswith("cannot preload not_there")
