"""The distribution: what the wheel holds, and that it shares its namespace."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import llama_index
import llama_index.postprocessor
from llama_index.postprocessor import lanerank as plugin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build(kind: str, target: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_no_namespace_of_its_own(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path)
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folder = "llama_index/postprocessor/lanerank"
    assert names == {f"{folder}/{name}" for name in ("__init__.py", "base.py", "py.typed")}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_editable_install_adds_a_folder_and_takes_over_no_namespace(tmp_path: Path) -> None:
    wheel = build("wheel:editable", tmp_path)
    [name] = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert wheel.read(name).decode().split() == [str(ROOT)]


def test_namespaces_are_shared() -> None:
    for namespace in (llama_index, llama_index.postprocessor):
        assert getattr(namespace, "__file__", None) is None


def test_llamahub_metadata_name_what_is_there() -> None:
    hub = PROJECT["tool"]["llamahub"]
    assert hub["import_path"] == plugin.__name__
    for name in hub["class_authors"]:
        assert name in plugin.__all__
    assert set(plugin.__all__) == {"InstructedQueryBundle", "LanerankRerank"}
