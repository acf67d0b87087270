"""Runs an image's tree as `docker run --read-only --tmpfs /tmp --cap-drop ALL --network none --volume DIR:/models:ro` would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.dockerfiles import Dockerfile
from scripts.image_chroot import mount_devices, unmount_below

READY_WITHIN = 60.0
STOPS_WITHIN = 40.0


def run_image(file: Dockerfile, environment: Mapping[str, str], tree: Path, examples: Path, python: Path) -> dict[str, object]:
    """What was seen. `python` has tritonclient, for examples/client.py. Raises SystemExit for what is not as it should be."""
    container = Container(file, environment, tree, examples / "models")
    try:
        began = time.monotonic()
        while (probe := container.probe()).returncode:
            if container.process.poll() is not None or time.monotonic() - began > READY_WITHIN:
                raise SystemExit(f"expected it to become healthy, got {probe.stderr.strip()!r}, server {container.process.poll()}")
        ready = time.monotonic() - began
        began = time.monotonic()
        text = container.probe().stdout.strip()
        took = time.monotonic() - began
        container.expect(0, "headrace", "health", "--grpc", "127.0.0.1:8001")
        container.expect(1, "headrace", "health", "--http", "127.0.0.1:9")
        container.expect(1, "python3", "-c", "open('/opt/headrace/x', 'w')")  # the root cannot be written to
        _ask(container, examples, python)
        found = _check_gpu(container) if "NVIDIA_VISIBLE_DEVICES" in environment else {}
        status = Path(f"/proc/{container.pid}/status").read_text(encoding="utf-8")
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        began = time.monotonic()
        if code := container.stop():
            raise SystemExit(f"expected exit code 0 after SIGTERM, got {code}")
    finally:
        container.kill()
    seen: dict[str, object] = {
        "ready_s": round(ready, 2), "probe": text, "probe_s": round(took, 2), "uid": facts["Uid"].split()[0],
        "capabilities": facts["CapEff"], "resident_kB": facts["VmRSS"].split()[0], "stop_s": round(time.monotonic() - began, 2), **found,
    }  # fmt: skip
    print(f"  ran: {json.dumps(seen)}", flush=True)
    return seen


def _ask(container: Container, examples: Path, python: Path) -> None:
    client = subprocess.run([*container.enter("--net"), python, examples / "client.py"], capture_output=True, text=True, check=False)
    print(*(f"  client: {line.strip()}" for line in client.stdout.splitlines()), sep="\n")
    if client.returncode:
        raise SystemExit(f"expected answers of the example models, got {client.stderr.strip()[-2000:]!r}")


LIBRARIES = """
import ctypes, glob, json, sys
loaded, failed = [], {}
for path in sorted(glob.glob('/opt/venv/lib/python3*/site-packages/nvidia/*/lib/*.so.*')):
    try:
        ctypes.CDLL(path)
        loaded.append(path)
    except OSError as error:
        failed[path.rpartition('/')[2]] = str(error)
print(json.dumps([len(loaded), failed]))
"""
COMPILE = """
from cuda.core import Program, ProgramOptions
code = Program('extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }', 'c++', ProgramOptions(arch='sm_90')).compile('cubin')
print(len(code.code))
"""
FATBIN = "from headrace_kernels.build import fatbin_path; print(fatbin_path().stat().st_size)"


def _check_gpu(container: Container) -> dict[str, object]:
    """What of CUDA can be seen without a GPU: libraries are found by name and load, NVRTC compiles, the kernels' fatbin is where it is
    looked for. The driver's libcuda.so.1 is all that may be missing: it comes with the host."""
    provider = "ldd /opt/venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so"
    missing = [line.split()[0] for line in container.expect(0, "sh", "-c", provider).splitlines() if "not found" in line]
    if missing != ["libcuda.so.1"]:
        raise SystemExit(f"expected ONNX Runtime's CUDA library to lack libcuda.so.1 alone, got {missing}")
    loaded, failed = json.loads(container.expect(0, "python3", "-c", LIBRARIES))
    if wrong := {name: error for name, error in failed.items() if "libcuda.so.1" not in error and "rdma" not in name}:
        raise SystemExit(f"expected CUDA's libraries to load, got {wrong}")
    cubin = int(container.expect(0, "python3", "-c", COMPILE))
    fatbin = int(container.expect(0, "python3", "-c", FATBIN))
    return {"cuda_libraries_loaded": loaded, "need_the_driver": sorted(failed), "nvrtc_cubin_bytes": cubin, "fatbin_bytes": fatbin}


class Container:
    """One process tree in namespaces of its own. `pid` is the server's, which is 1 to itself."""

    def __init__(self, file: Dockerfile, environment: Mapping[str, str], tree: Path, models: Path) -> None:
        self._file = file
        self._environment = environment
        self._tree = tree
        user = file.final.last("USER")
        assert user is not None
        self._uid, _, self._gid = user.text.partition(":")
        mount_devices(tree)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", tree / "tmp"], check=True)
        subprocess.run(["mount", "--bind", "--read-only", models, tree / "models"], check=True)
        script = f'ip link set lo up && mount -t proc proc "{tree}/proc" && mount -t sysfs -o ro sys "{tree}/sys" && exec "$@"'
        namespaces = ["unshare", "--net", "--pid", "--ipc", "--fork", "--kill-child", "sh", "-c", script, "sh"]
        self.process = subprocess.Popen([*namespaces, *self._as_user(self._command())])
        self.pid = self._wait_for_child()

    def _command(self) -> list[str]:
        entry, arguments = self._file.final.last("ENTRYPOINT"), self._file.final.last("CMD")
        assert entry is not None
        assert arguments is not None
        return [*(entry.exec_form or []), *(arguments.exec_form or [])]

    def _as_user(self, command: Sequence[str]) -> list[str]:
        drop = ["setpriv", f"--reuid={self._uid}", f"--regid={self._gid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        return ["chroot", str(self._tree), *drop, "env", "-i", *variables, *command]

    def _wait_for_child(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text(encoding="utf-8").split()):
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start: exit code {self.process.returncode}")
            time.sleep(0.01)
        return int(found[0])

    def enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *namespaces]

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        words = [*self.enter("--net", "--pid", "--ipc"), *self._as_user(command)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def expect(self, code: int, *command: str) -> str:
        """Its standard output. Raises SystemExit when it ends with another exit code."""
        done = self.run(command)
        if done.returncode != code:
            raise SystemExit(
                f"expected exit code {code} of {command}, got {done.returncode}: {(done.stdout + done.stderr).strip()[-2000:]}"
            )
        return done.stdout

    def probe(self) -> subprocess.CompletedProcess[str]:
        """The image's HEALTHCHECK."""
        health = self._file.final.last("HEALTHCHECK")
        assert health is not None
        return self.run(json.loads(health.text.removeprefix("CMD ")))

    def stop(self) -> int:
        """The exit code after SIGTERM, as `docker stop` sends it."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(STOPS_WITHIN)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its child goes with it (--kill-child)
            self.process.wait()
        for name in ("proc", "sys", "dev", "tmp", "models"):
            unmount_below(self._tree / name)
