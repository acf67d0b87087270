"""What our Dockerfiles must and must not say. Pure: text in, one line for each fault out. hadolint knows more of shells; this knows us."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from scripts.dockerfiles import Dockerfile, IgnoreFile, Instruction, Stage, parse

SECRET = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|_KEY$)")
REQUIRED_LABELS = ("title", "description", "licenses", "version", "revision")

Exists = Callable[[str], bool]


def faults(text: str, ignored: IgnoreFile, exists: Exists) -> list[str]:
    """`exists`: whether a path is in the repository. Raises DockerfileError for what cannot be read."""
    file = parse(text)
    found = [*_stages(file), *_final(file.final, file.lineage(file.final))]
    for stage in file.stages:
        for instruction in stage.instructions:
            found += [f"line {instruction.line}: {fault}" for fault in _instruction(file, stage, instruction, ignored, exists)]
    return found


def _stages(file: Dockerfile) -> Iterator[str]:
    names = [stage.name for stage in file.stages if stage.name]
    for stage in file.stages:
        if stage.base in names[: len(names)]:
            continue
        tag = stage.base.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if not re.search(r"\d+\.\d+|\d{8}", tag) and "@sha256:" not in stage.base:
            yield f"line {stage.line}: {stage.base}: expected a tag with a release, or a digest"


def _final(stage: Stage, lineage: list[Stage]) -> Iterator[str]:
    user = stage.last("USER")
    if user is None or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text):
        yield f"USER: expected UID:GID in numbers, neither of them root's, got {user.text if user else 'none'}"
    for keyword in ("ENTRYPOINT", "CMD"):
        command = stage.last(keyword)
        if command is None or not command.exec_form:
            yield f"{keyword}: expected a JSON list of words, so that the server and not a shell gets the signals"
        elif user is not None and command.line < user.line:
            yield f"{keyword}: expected behind USER"
    health = stage.last("HEALTHCHECK")
    if health is None or not health.text.startswith("CMD "):
        yield "HEALTHCHECK: expected CMD and a JSON list of words"
    elif Instruction("CMD", health.text.removeprefix("CMD ").strip(), {}, health.line).exec_form is None:
        yield "HEALTHCHECK: expected a JSON list of words: the probe runs every few seconds, without a shell"
    signal = stage.last("STOPSIGNAL")
    if signal is None or signal.text != "SIGTERM":
        yield "STOPSIGNAL: expected SIGTERM"
    labels = {name for each in lineage for label in each.all("LABEL") for name in label.pairs}
    missing = [name for name in REQUIRED_LABELS if f"org.opencontainers.image.{name}" not in labels]
    if missing:
        yield f"LABEL: expected org.opencontainers.image.{', .'.join(missing)}"
    yield from _ports(stage)


def _ports(stage: Stage) -> Iterator[str]:
    exposed = {port for each in stage.all("EXPOSE") for port in each.text.split()}
    bound = {stage.environment.get(name, "").rpartition(":")[::2] for name in ("HEADRACE_GRPC", "HEADRACE_HTTP")}
    if {port for _, port in bound} != exposed:
        yield f"EXPOSE: expected the ports of HEADRACE_GRPC and HEADRACE_HTTP, got {', '.join(sorted(exposed)) or 'none'}"
    if {host for host, _ in bound} != {"0.0.0.0"}:
        yield "ENV: expected HEADRACE_GRPC and HEADRACE_HTTP on 0.0.0.0: loopback inside a container reaches nobody"


def _instruction(file: Dockerfile, stage: Stage, instruction: Instruction, ignored: IgnoreFile, exists: Exists) -> Iterator[str]:
    if instruction.keyword == "RUN":
        yield from _run(instruction)
    elif instruction.keyword == "COPY":
        yield from _copy(file, stage, instruction, ignored, exists)
    elif instruction.keyword in ("ENV", "ARG"):
        yield from (f"{name}: no secrets in an image" for name in instruction.pairs if SECRET.search(name.upper()))


def _run(instruction: Instruction) -> Iterator[str]:
    for command in re.split(r"&&|;|\|\|", instruction.text):
        if "apt-get install" in command:
            if "--no-install-recommends" not in command:
                yield "apt-get install: expected --no-install-recommends"
            if "apt-get update" not in instruction.text or "rm -rf /var/lib/apt/lists/*" not in instruction.text:
                yield "apt-get install: expected apt-get update before it and rm -rf /var/lib/apt/lists/* behind it, in one RUN"
        if re.search(r"\bpip\b.* install\b", command):
            if "--no-cache-dir" not in command:
                yield "pip install: expected --no-cache-dir"
            if not re.search(r"--require-hashes|--no-index|==", command):
                yield "pip install: expected --require-hashes, --no-index for what was built here, or at least a version"
    if re.search(r"\b(curl|wget)\b[^&;]*\|", instruction.text):
        yield "expected no script that is run as it is downloaded"
    if re.search(r"\bsudo\b", instruction.text):
        yield "expected no sudo: a build is root, a container is not"


def _copy(file: Dockerfile, stage: Stage, instruction: Instruction, ignored: IgnoreFile, exists: Exists) -> Iterator[str]:
    *sources, _ = instruction.text.split()
    origin = instruction.flags.get("from")
    if origin is not None:
        earlier = [each.name for each in file.stages[: file.stages.index(stage)]]
        if origin not in earlier:
            yield f"COPY --from={origin}: expected one of the stages above, {', '.join(earlier)}"
        return
    for source in sources:
        if source.strip("/") in ("", "."):
            yield "COPY: expected the names of what is needed, not everything that lies there"
        elif not exists(source):
            yield f"COPY: there is no {source}"
        elif ignored.is_ignored(source):
            yield f"COPY: {source} is left out by .dockerignore"


def environment(file: Dockerfile) -> Mapping[str, str]:
    """What a container of the final stage has, as far as the Dockerfile says it."""
    return {name: value for stage in file.lineage(file.final) for name, value in stage.environment.items()}
