"""Nothing is left behind: by a server's guard, and by processes that were killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from april.core.errors import ResourceError
from april.engines.vllm import serve
from april.engines.vllm.files import WeightFiles

GUARD = "import sys; from april.engines.vllm import serve; serve._SERVER = 'timeit'; sys.exit(serve.main(sys.argv[1:]))"
"""The guard over another module in the server's place: `timeit` runs the statement that it is given."""


def guard(folder: Path, statement: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, serve.FOLDERS: str(folder)}
    command = [sys.executable, "-c", GUARD, "-n", "1", "-r", "1", statement]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_guard_ends_its_server_and_removes_its_folders_when_the_pipe_closes(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    process = guard(folder, "import os; print(os.getpid(), flush=True); import time; time.sleep(600)")
    assert process.stdin is not None and process.stdout is not None
    server = int(process.stdout.readline())
    process.stdin.close()
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert not folder.exists()


def test_a_guard_tells_how_its_server_ended(tmp_path: Path) -> None:
    process = guard(tmp_path, "import os; os._exit(7)")
    assert process.wait(30) == 7 and tmp_path.exists(), "the log is still to be read"
    process.communicate()


def test_files_of_processes_that_were_killed_are_swept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True, text=True)
    name = f"april-weights-{socket.gethostname()}-"
    left, of_another = tmp_path / f"{name}{int(dead.stdout)}-x", tmp_path / f"april-weights-elsewhere-{int(dead.stdout)}-x"
    mine = tmp_path / f"{name}{os.getpid()}-x"
    for folder in (left, of_another, mine):
        folder.mkdir()
    files = WeightFiles(str(tmp_path))
    assert not left.exists() and of_another.exists() and mine.exists()
    path = files.write({"a": torch.arange(3.0)}, 4)
    assert load_file(path)["a"].tolist() == [0.0, 1.0, 2.0] and path != files.write({"a": torch.zeros(1)}, 4)
    files.close()
    assert not files.folder.exists()
    with pytest.raises(ResourceError, match=r"engine\.weights_folder"):
        files.write({"a": torch.zeros(1)}, 5)
