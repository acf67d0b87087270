from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from headrace_kernels import build
from headrace_kernels.build import ARCHITECTURES, FLAGS, Resources, compile_cubin, fatbin_path, find_nvcc, parse_resources, table
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.modules import Modules, cuda_core, unavailable
from headrace_kernels.sources import DIRECTORY, ITEMSIZE, digest, kernel_names, text

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'topk_warp_float32' for 'sm_90'
ptxas info    : Function properties for topk_warp_float32
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 8 bytes cumulative stack size
ptxas info    : Compile time = 12.4 ms
ptxas info    : Compiling entry function 'topk_block_float32' for 'sm_90'
ptxas info    : Function properties for topk_block_float32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 128 bytes smem
"""


ALL = "HEADRACE_ALL_ARCHITECTURES"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(architecture: int, tmp_path: Path) -> None:
    try:
        nvcc = find_nvcc()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    if architecture != 90 and not os.environ.get(ALL):
        pytest.skip(f"a quarter of a minute for each architecture: sm_90 stands for all, {ALL}=1 has the others compiled too")
    found = compile_cubin(nvcc, architecture, tmp_path / "cubin")
    assert {one.kernel for one in found} == {name for names in kernel_names().values() for name in names}
    assert [one for one in found if one.spills or one.stack] == []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["gather", "normalize"])
def test_whole_words_are_loaded_and_stored(tmp_path: Path, source: str) -> None:
    """The compiler once took a store of 16 bytes apart into eight of two: right, and several times as slow."""
    try:
        nvcc = find_nvcc()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    subprocess.run([nvcc, "-ptx", "-arch=compute_90", FLAGS[0], "-o", tmp_path / "ptx", DIRECTORY / f"{source}.cu"], check=True)
    bodies = re.findall(r"\.entry (\w+)\((.*?)\n}", (tmp_path / "ptx").read_text(), re.DOTALL)
    assert {name for name, _ in bodies} == set(kernel_names()[source])
    for name, body in bodies:
        source_type, target_type = name.split("_")[-2:] if source == "gather" else ("uint8", name.split("_")[2])
        if name.startswith("resize"):
            continue  # a thread has one pixel
        assert "st.global.v2.u16" not in body, name
        if ITEMSIZE[target_type] >= ITEMSIZE[source_type]:
            assert "st.global.v4.u32" in body, name
        if ITEMSIZE[source_type] >= ITEMSIZE[target_type] or source == "normalize":
            assert "ld.global.nc.v4.u32" in body, name


def test_what_ptxas_says_is_read() -> None:
    assert parse_resources(LOG) == [
        Resources("topk_warp_float32", "sm_90", registers=26, stack=8, spills=28, shared=0),
        Resources("topk_block_float32", "sm_90", registers=24, stack=0, spills=0, shared=128),
    ]
    assert "topk_warp_float32" in table(parse_resources(LOG)).splitlines()[-1]


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (4, 1)])
def test_a_spill_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spills: int, code: int
) -> None:
    def built(out: Path) -> list[Resources]:
        out.write_bytes(b"")
        return [Resources("k", "sm_90", 32, 0, spills, 0)]

    monkeypatch.setattr(build, "build", built)
    assert build.main(["--out", str(tmp_path), "--ptxas-info"]) == code
    assert f"{code} of 1 kernels spill" in capsys.readouterr().out


def test_without_nvcc_the_build_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.main([]) == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err


def test_a_compilers_reasons_are_kept(tmp_path: Path) -> None:
    (compiler := tmp_path / "nvcc").write_text("#!/bin/sh\necho 'gather.cu(3): error: no'; exit 2\n")
    compiler.chmod(0o755)
    with pytest.raises(KernelsUnavailable, match=r"nvcc failed \(2\): gather.cu\(3\): error: no"):
        compile_cubin(compiler, 90, tmp_path / "out")


def test_the_names_are_those_in_the_sources() -> None:
    """The prefixes at least: the whole names are made by macros, and held against the compiler's by the slow test."""
    for source, names in kernel_names().items():
        prefixes = re.findall(r"KERNEL\([^)]*\) (\w+?)_?(?:##|\()", (DIRECTORY / f"{source}.cu").read_text())
        assert prefixes
        for name in names:
            assert name.startswith(tuple(prefixes)), name


def test_a_source_is_one_text_and_a_changed_one_another_fatbin(tmp_path: Path) -> None:
    assert "#include" not in text("kernels")
    assert text("kernels").count("struct half_t") == 1
    for file in DIRECTORY.glob("*.cu*"):
        (tmp_path / file.name).write_text(file.read_text())
    assert digest(tmp_path) == digest()
    with (tmp_path / "topk.cu").open("a") as file:
        file.write("// changed\n")
    assert digest(tmp_path) != digest()
    assert fatbin_path(tmp_path).name == f"kernels-{digest()}.fatbin"


def test_a_missing_library_is_named_with_what_brings_it() -> None:
    message = unavailable("NVRTC cannot compile topk.cu for sm_90", RuntimeError('Failure finding "libnvrtc.so"\nmore'))
    assert "libnvrtc.so" in message
    assert "pip install cuda-core" in message
    assert unavailable("device 3", RuntimeError("CUDA_ERROR_INVALID_DEVICE")) == "device 3: CUDA_ERROR_INVALID_DEVICE"


@pytest.mark.slow
def test_nvrtc_makes_machine_code_of_each_source_and_keeps_it(tmp_path: Path) -> None:
    try:
        cuda_core()
        modules = Modules("sm_90", fatbin=tmp_path / "none", cache=tmp_path)
        first = modules.compile("topk")
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    assert bytes(first.code)[:4] == b"\x7fELF"
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert kept
    assert bytes(modules.compile("topk").code) == bytes(first.code)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept
    for source in ("gather", "normalize", "screen", "histogram"):
        assert bytes(modules.compile(source).code)[:4] == b"\x7fELF"
