"""The wheel as a stranger gets it: built, installed into an empty environment, called."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest

import edge_vlm

ROOT = Path(__file__).parents[3]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """In the project's folder, but without its packages on the path."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and numpy (this interpreter's own, so no network is needed)."""
    folder = tmp_path_factory.mktemp("env")
    made = run(sys.executable, "-m", "venv", folder)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "lib").glob("python*/site-packages")
    for source in Path(numpy.__file__).parents[1].glob("numpy*"):
        (site / source.name).symlink_to(source)
    return folder / "bin"


def test_the_wheel_holds_every_package_and_the_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(n for n in names if n.endswith(".dist-info/entry_points.txt"))
        assert "edge_vlm.commands" in archive.read(entry_points).decode()
    for package in ("", "_calibration", "_export", "_runtime", "_training"):
        assert f"edge_vlm{package}/__init__.py" in names
        assert f"edge_vlm{package}/py.typed" in names
    for data in (
        "demo/bundle/manifest.json",
        "demo/clip.mp4",
        "demo/clip.json",
        "server/web/index.html",
    ):
        assert f"edge_vlm_runtime/{data}" in names
    assert {"edge_vlm/world/sprites/atlas.npz", "edge_vlm/world/sprites/OFL.txt"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        f"edge_vlm{package}" for package in ("", "_calibration", "_export", "_runtime", "_training")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_answers_without_any_extra(installed: Path) -> None:
    version = run(installed / "edge-vlm", "--version")
    assert (version.returncode, version.stdout) == (0, f"edge-vlm {edge_vlm.__version__}\n")
    listing = run(installed / "edge-vlm", "--help")
    assert listing.returncode == 0, listing.stderr
    assert "  demo " in listing.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["demo"], "ort"),
        (["serve"], "ort"),
        (["train", "-o", "x"], "train"),
        (["export", "x", "-o", "y"], "export"),
    ],
)
def test_a_missing_extra_is_one_line(installed: Path, arguments: list[str], extra: str) -> None:
    done = run(installed / "edge-vlm", *arguments)
    assert done.returncode == 9, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"edge-vlm[{extra}]" in done.stderr


def test_the_demo_street_needs_no_extra(installed: Path) -> None:
    code = "from edge_vlm.world.street import Street; print(Street(7).picture(99.5).shape)"
    done = run(installed / "python", "-c", code)
    assert (done.returncode, done.stdout) == (0, "(192, 192, 3)\n"), done.stderr
