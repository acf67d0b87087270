"""The images' own files, without an engine: what `docker build` would stumble over, and what the server would make of their settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from headrace import cli
from headrace.config_loading import load_server_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.check_images import RELEASE, lint
from scripts.dockerfile_rules import environment
from scripts.dockerfiles import Dockerfile, parse
from scripts.lock_images import BESIDE, EXTRAS, PYTHON, TOOLS, lock_file

ROOT = Path(__file__).parents[3]
IMAGES = {"Dockerfile": "cpu", "Dockerfile.gpu": "gpu"}
both = pytest.mark.parametrize("name", IMAGES)


def read(name: str) -> Dockerfile:
    return parse((ROOT / name).read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+) \\$", lock_file(name).read_text(encoding="utf-8"), re.MULTILINE))


@both
def test_dockerfiles_follow_our_rules(name: str) -> None:
    assert lint(name) == []


@both
def test_the_server_takes_the_environment_of_the_image(name: str) -> None:
    config = load_server_config({}, environment(read(name)), None)
    assert (config.models, config.grpc, config.http) == (("/models",), ("0.0.0.0:8001",), "0.0.0.0:8002")


@both
def test_the_command_and_the_health_check_are_commands_of_headrace(name: str) -> None:
    final = read(name).final
    health = json.loads(final.last("HEALTHCHECK").text.removeprefix("CMD "))
    entry, command = final.last("ENTRYPOINT").exec_form, final.last("CMD").exec_form
    assert entry == [health[0]] == ["headrace"]
    assert cli._parser().parse_args(command).run is cli._serve
    assert cli._parser().parse_args(health[1:]).timeout < 6, "less than the image gives it"


@both
def test_both_stages_and_the_lock_file_are_of_one_python(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"python(3\.\d+)/site-packages", text)) == {PYTHON}
    assert set(re.findall(r"requirements-\w+-py(\d+)", text)) == {PYTHON.replace(".", "")}
    assert RELEASE == "trixie"  # Debian 13, whose Python that is; check_images.py makes its base of it
    assert read(name).final.base.startswith("debian:13.")


@pytest.mark.parametrize("name", [*EXTRAS, *TOOLS])
def test_lock_files_have_what_pyproject_asks_for_with_hashes(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*TOOLS.get(name, ()), *BESIDE.get(name, ())]
    if name in EXTRAS:
        extras = project["project"]["optional-dependencies"]
        wanted += [*project["project"]["dependencies"], *(each for extra in EXTRAS[name] for each in extras[extra])]
    if name == "build":
        wanted += project["build-system"]["requires"]
    locked = pins(name)
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name), "")
        assert version, f"{requirement.name} is in no lock file: run scripts/lock_images.py"
        assert requirement.specifier.contains(version), f"{requirement} but {version} is locked: run scripts/lock_images.py"
    blocks = re.split(r"^(?=\w)", lock_file(name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked) > 2
    assert all("--hash=sha256:" in block for block in blocks)


def test_an_image_has_one_onnx_runtime() -> None:
    assert ("onnxruntime" in pins("cpu"), "onnxruntime-gpu" in pins("cpu")) == (True, False)
    assert ("onnxruntime" in pins("gpu"), "onnxruntime-gpu" in pins("gpu")) == (False, True)


def test_nvcc_and_the_run_time_libraries_are_of_one_release() -> None:
    releases = {name: version.rpartition(".")[0] for file in ("gpu", "nvcc") for name, version in pins(file).items() if "-cuda-" in name}
    assert len(set(releases.values())) == 1, releases


def run_slim(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "deploy" / "docker" / "slim.py", place], capture_output=True, text=True, check=False)


def test_slimming_says_when_a_package_has_moved_what_was_removed(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / f"python{PYTHON}" / "site-packages"
    for name in ("pip", "pip-25.dist-info", "numpy/tests", "numpy/f2py"):
        (packages / name).mkdir(parents=True)
    (packages / "numpy" / "tests" / "test_a.py").write_text("pass")
    done = run_slim(tmp_path)
    assert done.returncode == 1
    assert "**/*.pyx" in done.stderr
    assert not (packages / "numpy" / "tests").exists()
