"""Each guard of the repository is shown a bad case, and must not let it pass."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lanerank"
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
}


# --- imports ----------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's modules, beside the repository's own contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        PACKAGE,
        tmp_path / "lanerank",
        ignore=lambda folder, names: [
            name
            for name in names
            if name == "__pycache__" or not (name.endswith(".py") or (Path(folder) / name).is_dir())
        ],
    )
    return tmp_path


def broken_contracts(copy: Path) -> set[str]:
    """The ids of the contracts that import-linter reports as broken for the copy."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run(
        [lint_imports, "--no-cache", "--config", "pyproject.toml"],
        cwd=copy,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts: " in run.stdout, run.stdout + run.stderr
    broken = {name for name, title in CONTRACTS.items() if f"{title} BROKEN" in run.stdout}
    assert run.returncode == bool(broken), run.stdout
    kept = {name for name, title in CONTRACTS.items() if f"{title} KEPT" in run.stdout}
    assert broken | kept == set(CONTRACTS), run.stdout
    return broken


def test_imports_of_the_package_itself_are_kept(copy: Path) -> None:
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        pytest.param("errors.py", "import lanerank.reranker", "layers", id="upward"),
        pytest.param("lanes.py", "from lanerank import scoring", "layers", id="one-layer-up"),
        pytest.param("helpers.py", "", "layers", id="stray-module"),
        pytest.param("lanes.py", "import torch", "torch-free", id="torch"),
        pytest.param("errors.py", "def f():\n    import transformers", "torch-free", id="local"),
        pytest.param(
            "evaluation/__init__.py", "import lanerank.checkpoint", "torch-free", id="indirect"
        ),
        pytest.param(
            "training/checks.py",
            "from lanerank.training import losses",
            "torch-free",
            id="training-data",
        ),
        pytest.param("scoring/__init__.py", "import langchain_core", "no-frameworks", id="plugin"),
        pytest.param("cli/__init__.py", "import lanerank", "no-root", id="root"),
    ],
)
def test_bad_import_breaks_its_contract(copy: Path, module: str, line: str, contract: str) -> None:
    with (copy / "lanerank" / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert contract in broken_contracts(copy)


def test_indirect_torch_is_found_where_the_layers_see_nothing(copy: Path) -> None:
    with (copy / "lanerank" / "evaluation" / "__init__.py").open("a") as file:
        file.write("\nimport lanerank.checkpoint\n")
    assert broken_contracts(copy) == {"torch-free"}


# --- the network ------------------------------------------------------------------------------


def test_socket_to_another_machine_is_refused() -> None:
    with socket.socket() as sock, pytest.raises(RuntimeError, match="offline"):
        sock.connect(("192.0.2.1", 9))


def test_datagram_to_another_machine_is_refused() -> None:
    with (
        socket.socket(type=socket.SOCK_DGRAM) as sock,
        pytest.raises(RuntimeError, match="offline"),
    ):
        sock.sendto(b"", ("192.0.2.1", 9))


def test_name_lookup_is_refused() -> None:
    with pytest.raises(RuntimeError, match="offline"):
        socket.create_connection(("example.com", 443))


def test_loopback_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_hub_is_told_to_stay_offline() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE


# --- the repository ---------------------------------------------------------------------------


def newest_entry(changelog: str) -> str | None:
    """The first version that a changelog has an entry for; a bare `[Unreleased]` is skipped."""
    found = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    return found and found[1]


def test_newest_entry_is_the_first_with_a_number() -> None:
    assert newest_entry("# x\n## [Unreleased]\n## [1.2.0] - 2026-01-01\n## [1.1.0]") == "1.2.0"
    assert newest_entry("## Notes\n") is None


def test_changelog_and_package_agree_on_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert newest_entry(changelog) == project["version"] == version("lanerank")


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on one person's machine only."""
    return re.findall(r"(?<![\w.~/}:-])/(?:work|root|home/\w+|Users/\w+)/[\w.-]*", text)


@pytest.mark.parametrize("folder", ["work", "root", "home/ada", "Users/ada"])
def test_machine_path_is_found(folder: str) -> None:
    assert machine_paths(f"see `/{folder}/notes.txt`") == [f"/{folder}/notes.txt"]


@pytest.mark.parametrize("text", ["https://example.org/work/x", "src/work/x", "./root/x"])
def test_other_path_is_left_alone(text: str) -> None:
    assert machine_paths(text) == []


def test_no_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git repository")
    found = {}
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        # Data are other people's words, and may well speak of such a folder.
        if path.suffix in {".jsonl", ".gz", ".safetensors"} or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if paths := machine_paths(text):
            found[name] = paths
    assert found == {}


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel."""
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> set[str]:
    """The names of the files in the wheel."""
    return set(zipfile.ZipFile(wheel_path).namelist())


def test_wheel_holds_the_package_and_nothing_else(wheel: set[str]) -> None:
    here = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    assert {name for name in wheel if ".dist-info/" not in name} == here


def test_wheel_is_small_enough_to_install_on_a_whim(wheel_path: Path) -> None:
    assert wheel_path.stat().st_size <= 50_000_000


@pytest.mark.parametrize(
    "name", ["py.typed", "demo.json", "models/lanerank-mini/model.safetensors"]
)
def test_wheel_holds_what_the_offline_demo_needs(wheel: set[str], name: str) -> None:
    assert f"lanerank/{name}" in wheel
