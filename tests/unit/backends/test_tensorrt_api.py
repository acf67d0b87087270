"""The names used of TensorRT, against those builds of the bindings that are installed; without one, against nothing.

The bindings give their signatures in docstrings. What a call does is not shown here: that takes a GPU. How the full bindings were held
against this without their libraries, which no registry has: docs/tensorrt.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from headrace.backends import tensorrt_api
from headrace.backends.tensorrt_api import (
    BASES,
    BUILD_CLASSES,
    CONSTRUCTORS,
    FUNCTIONS,
    MEMBERS,
    MODULES,
    RUN_CLASSES,
    Library,
    find_library,
)
from headrace.backends.tensorrt_builder import _monitor_class
from headrace.backends.tensorrt_engine import _allocator_class
from headrace.errors import LoadError


@functools.cache
def installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        pytest.skip(f"{name}: {error}")


def overloads(function: object, name: str) -> list[list[tuple[str, bool]]]:
    """(name, has a default) of the parameters after self, of each overload that the docstring tells."""
    text = getattr(function, "__doc__", None) or ""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{name}\((.*)\) -> ", text, re.MULTILINE):
        parameters = [part for part in split_parameters(match[1]) if not part.startswith("self")]
        found.append([(part.partition(":")[0], " = " in part) for part in parameters])
    return found


def split_parameters(text: str) -> list[str]:
    """At commas that are in no brackets: `a: list[int, str], b: int = 0`."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append(text[start:index].strip())
            start = index + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def takes(function: object, name: str, given: list[str]) -> bool:
    """Whether an overload takes these, by position and under these names, and needs no others."""
    return any(
        [known for known, _ in overload[: len(given)]] == given and all(has_default for _, has_default in overload[len(given) :])
        for overload in overloads(function, name)
    )


def used(protocol: type) -> dict[str, list[str] | None]:
    """Parameters of each method of a protocol; None of an attribute."""
    names = dict.fromkeys(protocol.__annotations__)
    functions = {n: f for n, f in vars(protocol).items() if not n.startswith("_")}
    return names | {
        name: list(inspect.signature(member).parameters)[1:] if inspect.isfunction(member) else None for name, member in functions.items()
    }


CASES = [(module, protocol) for module in MODULES for protocol in (*RUN_CLASSES, *(BUILD_CLASSES if module == MODULES[0] else ()))]


@pytest.mark.parametrize(("module", "protocol"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_every_method_used_is_there_with_the_parameters_used(module: str, protocol: type) -> None:
    real = getattr(installed(module), protocol.__name__)
    wrong = []
    for name, parameters in used(protocol).items():
        member = getattr(real, name, None)
        if member is None or (parameters is not None and not takes(member, name, parameters)):
            wrong.append(f"{name}({parameters}): {overloads(member, name)}")
    assert not wrong


def test_protocols_name_what_the_check_above_reads() -> None:
    assert used(tensorrt_api.Runtime) == {"engine_host_code_allowed": None, "deserialize_cuda_engine": ["serialized_engine"]}
    assert sum(len(used(protocol)) for protocol in (*RUN_CLASSES, *BUILD_CLASSES)) > 40


def test_check_fails_for_what_the_bindings_do_not_take() -> None:
    class Bound:
        def f(self) -> None:
            """f(self: m.X, name: str, shape: list[int, str] = <A.B: 0>) -> bool"""

    assert takes(Bound.f, "f", ["name"])
    assert takes(Bound.f, "f", ["name", "shape"])
    assert not takes(Bound.f, "f", [])
    assert not takes(Bound.f, "f", ["shape"])
    assert not takes(Bound.f, "g", ["name"])


@pytest.mark.parametrize("module", MODULES)
def test_constructors_take_what_they_are_given(module: str) -> None:
    real = installed(module)
    for kind, parameters in CONSTRUCTORS.items():
        if module == MODULES[0] or kind == "Runtime":
            assert takes(getattr(real, kind).__init__, "__init__", list(parameters)), kind


def test_functions_take_what_they_are_given() -> None:
    real = installed(MODULES[0])
    for name, parameters in FUNCTIONS.items():
        assert takes(getattr(real, name), name, list(parameters)), name


@pytest.mark.parametrize("module", MODULES)
def test_members_of_enumerations_are_there(module: str) -> None:
    real = installed(module)
    for enumeration, names in MEMBERS.items():
        if module != MODULES[0] and not hasattr(real, enumeration):
            assert enumeration in ("NetworkDefinitionCreationFlag", "TensorFormat")
            continue
        assert set(names) <= set(getattr(real, enumeration).__members__), enumeration


@pytest.mark.parametrize("module", MODULES)
def test_bases_can_be_derived_from_and_called_as_expected(module: str) -> None:
    real = installed(module)
    for base, methods in BASES.items():
        found: Any = getattr(real, base)
        assert type(f"Our{base}", (found,), {"__init__": lambda self, found=found: found.__init__(self)})()
        for name, parameters in methods.items():
            assert takes(getattr(found, name), name, list(parameters)), name


@pytest.mark.parametrize("module", MODULES)
def test_our_own_classes_can_be_made_of_its_bases(module: str) -> None:
    library = Library(installed(module))
    allocator = _allocator_class(library)(64)
    allocator.address = 4096
    assert [allocator.reallocate_output_async("y", 0, size, 256, 1) for size in (64, 65)] == [4096, 0]
    allocator.notify_shape("y", installed(module).Dims((2, 3)))
    assert allocator.shape == (2, 3)
    reports: list[dict[str, Any]] = []
    monitor = _monitor_class(library, reports.append)()
    monitor.phase_start("a", "", 3)
    assert monitor.step_complete("a", 0)
    assert reports[0] == {"phase": "a", "step": 0, "steps": 3}
    library.logger.log(library.logger.ERROR, "what\nwas wrong")
    assert library.take_errors() == "what was wrong"
    assert not library.take_errors()


WITHOUT_A_DEVICE = """
import sys
from headrace.backends.tensorrt_api import _open
from headrace.errors import LoadError
try:
    _open(sys.argv[1]).make("Runtime")
except LoadError as error:
    print(error)
"""


@pytest.mark.parametrize("module", MODULES)
def test_runtime_without_a_device_is_a_load_error_and_not_the_end_of_the_process(module: str) -> None:
    """In a process of its own: what TensorRT makes instead of raising ends the process once it is touched, or freed at its end."""
    installed(module)
    if has_device():
        pytest.skip("there is a device")
    ended = subprocess.run([sys.executable, "-c", WITHOUT_A_DEVICE, module], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{module} " in ended.stdout
    assert "cannot make a Runtime: " in ended.stdout
    assert "needs an NVIDIA GPU and a driver" in ended.stdout


def has_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def test_without_any_build_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_api, "_open", absent)
    with pytest.raises(LoadError, match=r"runs engines is there .*tensorrt_dispatch.*headrace\[cpu,tensorrt\].*tensorrt-lean-cu13"):
        find_library()
    with pytest.raises(LoadError, match=r"builds engines of ONNX models is there \(tensorrt: No module named 'tensorrt'\)"):
        find_library(to_build=True)
