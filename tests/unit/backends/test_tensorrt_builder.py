"""What the builder asks of TensorRT, on a stand-in that notes it. That TensorRT then builds what was meant is not shown here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Plain, Severity
from headrace.backends import tensorrt_builder
from headrace.backends.tensorrt_api import Library
from headrace.backends.tensorrt_build import BuildOrder
from headrace.backends.tensorrt_builder import build_engine
from headrace.backends.tensorrt_options import BuildOptions
from headrace.backends.tensorrt_profiles import derive_profiles
from headrace.errors import LoadError
from headrace.signature import DataType, TensorSpec

X = TensorSpec("x", DataType.FP32, (-1, 4))


class Names:
    """An enumeration whose members are their names, but where a number is wanted of them."""

    def __getattr__(self, name: str) -> str:
        return name


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, input_cache: Cache, ignore_mismatch: bool) -> bool:
        self.content += b"+" + input_cache.content
        return True

    def serialize(self) -> bytes:
        return self.content + b"+measured"


class Config:
    def __init__(self, owner: TensorRt) -> None:
        self._owner = owner
        self.flags: set[str] = set()
        self.cleared: set[str] = set()
        self.pools: dict[str, int] = {}
        self.profiles: list[Any] = []
        self.cache: Cache | None = None
        self.progress_monitor: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.cleared.add(flag)

    def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1 if not self._owner.refuses_profiles else -1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache:
        return Cache(serialized_timing_cache)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return cache.content != b"of another GPU"

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = (min, opt, max)


class Network:
    num_inputs = 1

    def __init__(self, is_shape: bool) -> None:
        self._is_shape = is_shape

    def get_input(self, index: int) -> Any:
        is_shape = self._is_shape

        class Tensor:
            name = "x"
            is_shape_tensor = is_shape

        return Tensor()


class TensorRt:
    """Stands for the module, and for its Builder and OnnxParser."""

    __name__ = "tensorrt"
    __version__ = "11.4.fake"
    ILogger = IProgressMonitor = Plain
    BuilderFlag = MemoryPoolType = HardwareCompatibilityLevel = Names()

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    def __init__(self) -> None:
        self.library = Library(self)
        self.config = Config(self)
        self.network_flags = 0
        self.parse_error: str | None = None
        self.build_error: str | None = None
        self.refuses_profiles = False
        self.is_shape = False

    def init_libnvinfer_plugins(self, logger: object, namespace: str) -> bool:
        return True

    def Builder(self, logger: object) -> TensorRt:  # noqa: N802  # as theirs
        return self

    def OnnxParser(self, network: object, logger: object) -> Any:  # noqa: N802  # as theirs
        error = self.parse_error

        class Parser:
            num_errors = int(error is not None)

            def parse_from_file(self, model: str) -> bool:
                return error is None

            def get_error(self, index: int) -> Any:
                class Error:
                    desc = staticmethod(lambda: error)
                    node_name = staticmethod(lambda: "conv1")
                    node_operator = staticmethod(lambda: "Det")

                return Error()

        return Parser()

    def create_network(self, flags: int) -> Network:
        self.network_flags = flags
        return Network(self.is_shape)

    def create_builder_config(self) -> Config:
        return self.config

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 9)
        assert monitor.step_complete("Tactics", 0)
        assert monitor.step_complete("Tactics", 1)
        monitor.phase_finish("Tactics")
        if self.build_error is not None:
            self.library.logger.log(Severity.ERROR, self.build_error)
            return None
        return b"the plan"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    monkeypatch.setattr(tensorrt_builder, "_choose_device", lambda _index: None)
    return TensorRt()


def order(directory: Path, **build: Any) -> BuildOrder:
    profiles = derive_profiles([X], 8, (), {})
    return BuildOrder(
        str(directory / "model.onnx"), str(directory / "plan"), str(directory / "timings"), 0, "11.4.fake", profiles, BuildOptions(**build)
    )


def run(tensorrt: TensorRt, wanted: BuildOrder) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    build_engine(wanted, tensorrt.library, reports.append)
    return reports


def test_plan_is_written_and_progress_told(tensorrt: TensorRt, tmp_path: Path) -> None:
    reports = run(tensorrt, order(tmp_path))
    assert (tmp_path / "plan").read_bytes() == b"the plan"
    assert [report["phase"] for report in reports] == ["reading the model", "Building", "Tactics", "writing the plan"]
    assert reports[2] == {"phase": "Tactics", "step": 1, "steps": 9}
    assert tensorrt.network_flags == 1 << 1


def test_profiles_are_those_of_the_order(tensorrt: TensorRt, tmp_path: Path) -> None:
    run(tensorrt, order(tmp_path))
    assert tensorrt.config.profiles == [{"x": ((1, 4), (1, 4), (1, 4))}, {"x": ((2, 4), (8, 4), (8, 4))}]


def test_left_out_options_are_left_to_tensorrt(tensorrt: TensorRt, tmp_path: Path) -> None:
    run(tensorrt, order(tmp_path))
    assert not tensorrt.config.flags | tensorrt.config.cleared | set(tensorrt.config.pools)
    assert {"builder_optimization_level", "max_aux_streams", "hardware_compatibility_level"}.isdisjoint(vars(tensorrt.config))


def test_options_are_set(tensorrt: TensorRt, tmp_path: Path) -> None:
    run(
        tensorrt,
        order(
            tmp_path,
            optimization_level=5,
            max_aux_streams=0,
            workspace_mb=64,
            tf32=False,
            version_compatible=True,
            hardware_compatibility="ampere_plus",
            refit=True,
        ),
    )
    config: Any = tensorrt.config
    assert config.flags == {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN"}
    assert config.cleared == {"TF32"}
    assert config.pools == {"WORKSPACE": 64 << 20}
    assert (config.builder_optimization_level, config.max_aux_streams, config.hardware_compatibility_level) == (5, 0, "AMPERE_PLUS")


def test_measurements_are_kept_for_the_next_build(tensorrt: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "timings").write_bytes(b"before")
    run(tensorrt, order(tmp_path))
    assert (tmp_path / "timings").read_bytes() == b"before+measured"


def test_measurements_of_another_gpu_are_not_used(tensorrt: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "timings").write_bytes(b"of another GPU")
    run(tensorrt, order(tmp_path))
    assert (tmp_path / "timings").read_bytes() == b"+measured"


def test_measurements_that_came_meanwhile_are_joined(tensorrt: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensorrt.build_serialized_network

    def build(network: Network, config: Config) -> bytes | None:
        (tmp_path / "timings").write_bytes(b"theirs")
        return real(network, config)

    monkeypatch.setattr(tensorrt, "build_serialized_network", build)
    run(tensorrt, order(tmp_path))
    assert (tmp_path / "timings").read_bytes() == b"+theirs+measured"


def test_model_that_cannot_be_read_is_told_with_its_node(tensorrt: TensorRt, tmp_path: Path) -> None:
    tensorrt.parse_error = "no importer"
    with pytest.raises(LoadError, match=r"no importer \(node 'conv1', Det\)"):
        run(tensorrt, order(tmp_path))


def test_failed_build_is_told_with_what_was_logged(tensorrt: TensorRt, tmp_path: Path) -> None:
    tensorrt.build_error = "Error Code 10: could not find any implementation"
    with pytest.raises(LoadError, match="could not find any implementation"):
        run(tensorrt, order(tmp_path))
    assert not (tmp_path / "plan").exists()


def test_input_that_decides_shapes_is_refused(tensorrt: TensorRt, tmp_path: Path) -> None:
    tensorrt.is_shape = True
    with pytest.raises(LoadError, match="input 'x' decides the shape of others"):
        run(tensorrt, order(tmp_path))


def test_refused_profile_is_an_error(tensorrt: TensorRt, tmp_path: Path) -> None:
    tensorrt.refuses_profiles = True
    with pytest.raises(LoadError, match="TensorRT refused the profile"):
        run(tensorrt, order(tmp_path))


def test_tensorrt_that_was_exchanged_meanwhile_builds_nothing(tensorrt: TensorRt, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"expected TensorRT 11\.3, found 11\.4\.fake"):
        run(tensorrt, dataclasses.replace(order(tmp_path), tensorrt="11.3"))
