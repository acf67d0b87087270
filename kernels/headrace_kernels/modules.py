"""The compiled kernels, from where they are: the fatbin that `headrace_kernels.build` made, else NVRTC with a cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace_kernels.build import FLAGS, fatbin_path
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.sources import source_of, text

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode

INSTALL = "pip install cuda-core 'cuda-bindings>=13,<14' nvidia-cuda-nvrtc"
"""Not the extra `gpu`: beside the extra `cpu` it would bring a second ONNX Runtime."""


class Modules:
    """Its state: the object code loaded so far, and the kernels looked up in it. Loads at first use, for the device that is current.

    `fatbin`: None looks in the package. `cache`: directory of what NVRTC made; None is cuda.core's own place for it.
    """

    def __init__(self, architecture: str, fatbin: Path | None = None, cache: Path | None = None) -> None:
        self.architecture = architecture
        self.fatbin = fatbin or fatbin_path()
        self.cache = cache
        self._modules: dict[str, ObjectCode] = {}
        self._kernels: dict[str, Kernel] = {}

    def __repr__(self) -> str:
        return f"Modules({self.origin}, {self.architecture}, {len(self._kernels)} kernels in use)"

    @property
    def origin(self) -> str:
        return self.fatbin.name if self.fatbin.exists() else "NVRTC"

    def kernel(self, name: str) -> Kernel:
        """Raises KernelsUnavailable when it can neither be found nor compiled."""
        if name not in self._kernels:
            self._kernels[name] = self._find(name)
        return self._kernels[name]

    def _find(self, name: str) -> Kernel:
        from cuda.core import ObjectCode

        source = "fatbin" if self.fatbin.exists() else source_of(name)
        if source not in self._modules:
            self._modules[source] = ObjectCode.from_fatbin(str(self.fatbin)) if source == "fatbin" else self.compile(source)
        try:
            kernel = self._modules[source].get_kernel(name)
            _put_on_device(kernel)
        except Exception as error:
            raise KernelsUnavailable(f"kernel {name!r} of {self.origin} for {self.architecture}: {error}") from error
        return kernel

    def compile(self, source: str) -> ObjectCode:
        """Needs NVRTC, and no device. Machine code, not PTX: a driver older than NVRTC takes it too, within one major version."""
        from cuda.core import Program, ProgramOptions
        from cuda.core.utils import FileStreamProgramCache

        options = ProgramOptions(std=FLAGS[0].partition("=")[2], arch=self.architecture, name=f"headrace_{source}")
        try:
            with FileStreamProgramCache(self.cache) as cache:
                return Program(text(source), "c++", options).compile("cubin", cache=cache)
        except Exception as error:
            raise KernelsUnavailable(unavailable(f"NVRTC cannot compile {source}.cu for {self.architecture}", error)) from error


def _put_on_device(kernel: Kernel) -> None:
    """CUDA does so by itself at the first launch, as long as that is not into a graph (CUDA_MODULE_LOADING is LAZY)."""
    from cuda.bindings import driver

    code, function = driver.cuKernelGetFunction(driver.CUkernel(int(kernel.handle)))
    if not code:
        (code,) = driver.cuFuncLoad(function)
    if code:
        raise RuntimeError(f"it cannot be loaded: {code.name}")


def cuda_core() -> Any:
    """The package, which the extra `gpu` brings. Raises KernelsUnavailable where it or what it needs is missing."""
    try:
        import cuda.core
    except ImportError as error:
        raise KernelsUnavailable(f"the device kernels need the packages cuda-core and cuda-bindings ({error}): {INSTALL}") from error
    return cuda.core


def unavailable(what: str, error: Exception) -> str:
    """The reason; and what to do where it is a library that was not found."""
    reason = str(error) or type(error).__name__
    if not any(words in reason.lower() for words in ("not found", "no such file", "cannot open", "failure finding")):
        return f"{what}: {reason}"
    return f"{what}: {reason.splitlines()[0]} (the driver comes with the GPU, NVRTC: {INSTALL})"


__all__ = ["Modules", "cuda_core", "unavailable"]
