"""Carries a Dockerfile out without an engine: each RUN in a chroot of the base's release, each layer a directory that overlayfs stacks.

As near to a build as root, overlayfs and debootstrap come. What it is not: no cache, no BuildKit frontend, and the base is made from the
release's own packages and not pulled from a registry. Everything is mounted in the caller's mount namespace: enter one of your own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.dockerfiles import Dockerfile, IgnoreFile, Instruction, Stage, substitute

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HELP = "mnt"
"""Where a build finds what is no part of the image: wheels that are already here, and the network's certificates."""

SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/groff", "var/cache/apt",
        "var/lib/apt/lists", "var/log/apt", "var/log/bootstrap.log", "var/log/dpkg.log")  # fmt: skip
"""What debian:*-slim lacks beside debootstrap's minimal base."""
SLIM_DPKG = (
    "".join(f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "man", "info", "locale", "lintian", "groff"))
    + "path-include /usr/share/doc/*/copyright\n"
)
"""As that image has it for the packages that are installed later."""

SLIM_APT = """\
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
"""
"""As that image has it too: apt keeps no packages and no caches."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def make_base(folder: Path, release: str) -> Path:
    """debian:*-slim's contents from debootstrap, once. Raises CalledProcessError."""
    if not (folder / "etc" / "debian_version").exists():
        subprocess.run(["debootstrap", "--variant=minbase", release, folder], check=True, stdout=subprocess.DEVNULL)
    for name in SLIM:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "var/log/apt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "etc" / "dpkg" / "dpkg.cfg.d" / "docker").write_text(SLIM_DPKG, encoding="utf-8")
    (folder / "etc" / "apt" / "apt.conf.d" / "docker").write_text(SLIM_APT, encoding="utf-8")
    return folder


def size(folder: Path) -> int:
    """Bytes of its files; one with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(place, name))
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


@dataclass(frozen=True)
class Layer:
    what: str
    folder: Path

    def compressed(self) -> int:
        """As a registry keeps it: tar, gzip."""
        archive = ["tar", "--create", "--directory", str(self.folder), "."]
        with (
            subprocess.Popen(archive, stdout=subprocess.PIPE) as tar,
            subprocess.Popen(["gzip", "-6"], stdin=tar.stdout, stdout=subprocess.PIPE) as gzip,
        ):
            out = gzip.stdout
            assert out is not None
            return sum(len(piece) for piece in iter(lambda: out.read(1 << 20), b""))


@dataclass
class Built:
    """A stage that was carried out: its layers, the base's first, and the environment that it left."""

    layers: list[Layer]
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    def mount(self, place: Path) -> Path:
        """Its tree, read-only."""
        place.mkdir(parents=True, exist_ok=True)
        lower = ":".join(str(layer.folder) for layer in reversed(self.layers))
        # Two at least, by overlayfs's rule for one that nothing is written to.
        empty = place.with_name(place.name + ".empty")
        empty.mkdir(exist_ok=True)
        _mount("overlay", place, "-t", "overlay", "-o", f"ro,lowerdir={empty}:{lower}")
        return place


class Builder:
    """`work`: an empty folder on a file system that can be an overlay's upper layer. Nothing in it is used twice."""

    def __init__(
        self, context: Path, ignored: IgnoreFile, base: Path, work: Path, *, wheels: Path | None, certificates: Path | None
    ) -> None:
        self._context = context
        self._ignored = ignored
        self._base = base
        self._work = work
        self._wheels = wheels
        self._certificates = certificates
        self._built: dict[str, Built] = {}
        self._count = 0

    def build(self, file: Dockerfile, arguments: Mapping[str, str]) -> Built:
        """The final stage. Raises CalledProcessError for the first RUN that fails."""
        for stage in file.stages:
            below = self._built.get(stage.base)
            built = Built([*below.layers], dict(below.environment), {}) if below else Built([Layer("base", self._base)], {"PATH": PATH})
            for instruction in stage.instructions:
                self._carry_out(built, stage, instruction, arguments)
            self._built[stage.name] = built
        return self._built[file.final.name]

    def _carry_out(self, built: Built, stage: Stage, instruction: Instruction, arguments: Mapping[str, str]) -> None:
        known = built.arguments | built.environment
        if instruction.keyword == "ENV":
            built.environment |= {name: substitute(value, known) for name, value in instruction.pairs.items()}
        elif instruction.keyword == "ARG":
            built.arguments |= {name: arguments.get(name, substitute(value, known)) for name, value in instruction.pairs.items()}
        elif instruction.keyword in ("RUN", "COPY"):
            self._count += 1
            folder = self._work / f"layer{self._count:02}"
            for name in ("tree", "work", "merged"):
                (folder / name).mkdir(parents=True)
            lower = ":".join(str(layer.folder) for layer in reversed(built.layers))
            merged = folder / "merged"
            _mount("overlay", merged, "-t", "overlay", "-o", f"lowerdir={lower},upperdir={folder / 'tree'},workdir={folder / 'work'}")
            try:
                print(f"  {stage.name or 'final'}: {instruction.keyword} {re.sub(' +', ' ', instruction.text)[:110]}", flush=True)
                if instruction.keyword == "RUN":
                    self._run(merged, instruction, known)
                else:
                    self._copy(merged, instruction)
            finally:
                unmount_below(merged)
            built.layers.append(Layer(f"{instruction.keyword} {instruction.text}", folder / "tree"))

    def _run(self, root: Path, instruction: Instruction, environment: Mapping[str, str]) -> None:
        mount_devices(root)
        _mount("proc", root / "proc", "-t", "proc")
        help_ = root / HELP
        _mount("tmpfs", help_, "-t", "tmpfs")
        more = {}
        if self._certificates is not None:
            shutil.copy(self._certificates, help_ / "certificates.pem")
            more["PIP_CERT"] = f"/{HELP}/certificates.pem"
        if self._wheels is not None:
            (help_ / "wheels").mkdir()
            _mount(str(self._wheels), help_ / "wheels", "--bind")
            more |= {"PIP_FIND_LINKS": f"/{HELP}/wheels", "PIP_NO_INDEX": "1"}
        resolver = (root / "etc" / "resolv.conf").exists()
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        # pip leaves the terminal alone: its output is a log here.
        words = ["env", "-i", *(f"{name}={value}" for name, value in ({"PIP_PROGRESS_BAR": "off"} | more | dict(environment)).items())]
        subprocess.run(["chroot", root, *words, "DEBIAN_FRONTEND=noninteractive", "/bin/sh", "-c", instruction.text], check=True)
        if not resolver:
            (root / "etc" / "resolv.conf").unlink()

    def _copy(self, root: Path, instruction: Instruction) -> None:
        *sources, target = instruction.text.split()
        origin = instruction.flags.get("from")
        top = self._context if origin is None else self._built[origin].mount(self._work / f"from{self._count:02}")
        place = root / target.strip("/")
        is_folder = target.endswith("/") or len(sources) > 1
        for source in sources:
            path = top / source.strip("/")
            into = place / path.name if is_folder and path.is_file() else place
            into.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=None if origin else self._left_out)
            else:
                shutil.copy2(path, into, follow_symlinks=False)

    def _left_out(self, place: str, names: list[str]) -> set[str]:
        folder = Path(place).relative_to(self._context)
        return {name for name in names if self._ignored.is_ignored((folder / name).as_posix())}


def mount_devices(root: Path) -> None:
    """A /dev of its own, as a container has it. Never the machine's: what runs here is root, and may remove what it finds."""
    dev = root / "dev"
    _mount("tmpfs", dev, "-t", "tmpfs", "-o", "mode=755")
    for name in DEVICES:
        (dev / name).touch()
        _mount(f"/dev/{name}", dev / name, "--bind")
    for name, kind, options in (("shm", "tmpfs", "mode=1777,size=64m"), ("pts", "devpts", "newinstance,ptmxmode=0666,mode=620")):
        (dev / name).mkdir()
        _mount(kind, dev / name, "-t", kind, "-o", options)
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        (dev / name).symlink_to(target)


def unmount_below(folder: Path) -> None:
    """Everything that is mounted there, the innermost first. Raises CalledProcessError: what is still mounted must not be removed."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    places = [Path(line.split()[4]) for line in lines]
    for place in reversed([place for place in places if place.is_relative_to(folder.resolve())]):
        subprocess.run(["umount", place], check=True)


def _mount(what: str, place: Path, *options: str) -> None:
    subprocess.run(["mount", *options, what, place], check=True)
