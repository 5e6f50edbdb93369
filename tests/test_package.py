"""The wheel: built from a copy, installed outside of the repository, and used there."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser as MetadataParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTER_FILES = (
    "nbs/weights/gallery.safetensors",
    "benchmarks/results.jsonl",
    "benchmarks/position.jsonl",
    "benchmarks/demo.jsonl",
    "benchmarks/transfer.jsonl",
    "benchmarks/figures.jsonl",
)
pytest.importorskip("setuptools", minversion="70.1", reason="building a wheel needs setuptools")


def run(*argv, **kwargs):
    got = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, check=False, timeout=300, **kwargs
    )
    assert got.returncode == 0, got.stdout + got.stderr
    return got


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree, built from a copy of what belongs into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "densecl", source / "densecl", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in CHAPTER_FILES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out]
    run(sys.executable, "-m", "pip", "wheel", *options, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(folder of an environment with the wheel alone, environment with this one's libraries)."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    options = ["--no-deps", "--quiet", "--no-warn-script-location"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    # As a plain path: .pth files in it, such as that of an editable install, are not read.
    libraries = os.pathsep.join(site.getsitepackages())
    return folder, os.environ | {"PYTHONPATH": libraries, "OMP_NUM_THREADS": "1"}


def test_the_metadata_has_license_classifiers_links_and_requirements(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = MetadataParser().parsestr(
            z.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        )
    assert any(n.endswith("LICENSE") for n in names) and "densecl/py.typed" in names
    assert not [n for n in names if n.startswith(("nbs/", "tests/"))]
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert "Programming Language :: Python :: 3.10" in metadata.get_all("Classifier")
    assert {u.split(", ")[0] for u in metadata.get_all("Project-URL")} >= {"Source", "Paper"}
    needs = metadata.get_all("Requires-Dist")
    assert any(n.startswith("torch>=") for n in needs)
    assert any("extra == 'transfer'" in n.replace('"', "'") for n in needs)


def test_the_wheel_imports_from_its_own_environment(installed):
    folder, env = installed
    program = "import densecl; print(densecl.__file__, densecl.DenseCL.__name__)"
    got = run(folder / "venv/bin/python", "-c", program, cwd=folder, env=env)
    path, name = got.stdout.split()
    assert Path(path).is_relative_to(folder / "venv") and name == "DenseCL"


def test_the_wheel_contains_the_files_that_chapters_read(installed):
    folder, env = installed
    program = f"""from densecl.runtime.io import UsageError, chapter_file
for name in {CHAPTER_FILES}:
    print(chapter_file(name))
try: chapter_file("nbs/absent.bin")
except UsageError as e: print(e)"""
    *found, missing = run(
        folder / "venv/bin/python", "-c", program, cwd=folder, env=env
    ).stdout.splitlines()
    assert len(found) == len(CHAPTER_FILES)
    assert all(Path(p).is_relative_to(folder / "venv") for p in found)
    assert missing.startswith("absent.bin: not in this installation; put nbs/absent.bin")


def test_the_wheel_trains_on_the_embedded_photographs(installed):
    folder, env = installed
    options = ["--max-steps", "2", "--workers", "0", "--threads", "1", "--probe="]
    run(folder / "venv/bin/densecl", "train", "demo", *options, cwd=folder, env=env)
    run(folder / "venv/bin/python", "-m", "densecl", "--help", cwd=folder, env=env)
    assert json.loads((folder / "runs/demo/config.json").read_text())["max_steps"] == 2
    assert (folder / "runs/demo/last.pt").is_file()
    one = ["weights", "extract", "runs/demo/last.pt", "backbone.pth"]
    run(folder / "venv/bin/densecl", *one, cwd=folder, env=env)
    assert (folder / "backbone.pth").is_file()


def test_the_requirements_agree_with_each_other():
    got = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    broken = [line for line in got.stdout.splitlines() if line.startswith("densecl ")]
    assert not broken
