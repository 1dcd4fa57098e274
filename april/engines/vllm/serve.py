"""`python -m april.engines.vllm.serve ARGUMENTS`: vLLM's API server, which ends with the process that started it.

    engine's process --- pipe ---> this --- starts ---> API server --> engine core --> workers

This one computes nothing. When the pipe closes, however the other end died, or when the API server ends, all of the server's
processes are killed: vLLM's engine core and workers would go on without their API server, with all their memory. With the pipe
closed, the folders that the environment names are removed, too.

The command `vllm serve` is not used: vLLM's CPU build lacks the package metadata that it asks for.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

FOLDERS = "APRIL_SERVER_FOLDERS"
"""Environment variable: folders that nobody needs when the server has ended."""
_SERVER = "vllm.entrypoints.launchers.api_server.entry"


def main(arguments: list[str]) -> int:
    """Serve until standard input closes; returns the exit code of the server."""
    server = subprocess.Popen([sys.executable, "-m", _SERVER, *arguments], stdin=subprocess.DEVNULL, start_new_session=True)
    closed = threading.Event()
    threading.Thread(target=_end_with_input, args=(server.pid, closed), daemon=True).start()
    code = server.wait()
    _end(server.pid)
    if closed.is_set():  # else the other end lives, and reads how the server ended
        for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
            shutil.rmtree(folder, ignore_errors=True)
    return code


def _end_with_input(group: int, closed: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    closed.set()
    _end(group)


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
