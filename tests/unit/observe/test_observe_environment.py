from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from april.observe.environment import describe_environment


def test_the_description_is_json_and_names_versions(tmp_path: Path) -> None:
    found = describe_environment(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version() and "numpy" in found["packages"] and "git" not in found


def test_torch_is_asked_only_when_it_is_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert "torch" not in describe_environment() and "torch" not in sys.modules
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda i: "GPU")
    cuda.get_device_properties = lambda i: SimpleNamespace(total_memory=7)
    fake = SimpleNamespace(cuda=cuda, get_num_threads=lambda: 2, version=SimpleNamespace(cuda="13"))
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert describe_environment()["torch"] == {"threads": 2, "cuda": "13", "devices": [{"name": "GPU", "memory_bytes": 7}]}


def test_the_commit_is_that_of_the_folder(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e", *words], check=True, capture_output=True
        )

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "one")
    clean = describe_environment(tmp_path)["git"]
    (tmp_path / "f").write_text("2")
    assert len(clean["commit"]) == 40 and clean["changed"] is False
    assert describe_environment(tmp_path)["git"] == {"commit": clean["commit"], "changed": True}


def test_observe_imports_no_torch_and_no_plotting() -> None:
    code = (
        "import sys, april.observe.report, april.observe.compare, april.observe.console, april.observe.recorder, "
        "april.observe.trace, april.observe.environment; "
        "print(sorted({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
