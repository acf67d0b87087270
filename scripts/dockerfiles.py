"""Dockerfiles and .dockerignore, read as far as our own need: instructions, stages, what a build context holds. Pure.

Not a parser for everybody's: no heredocs, no parser directives, no ${name:-word}. What it does not know it refuses, so that a check
never passes over an instruction that it did not understand.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

KEYWORDS = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)


class DockerfileError(Exception):
    """A line that cannot be read; says which and why."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`text`: what stands behind the keyword and its flags, continued lines joined. `line`: where it begins, from 1."""

    keyword: str
    text: str
    flags: Mapping[str, str]
    line: int

    @property
    def exec_form(self) -> list[str] | None:
        """The command's words when it is JSON, which no shell takes apart; else None."""
        try:
            words = json.loads(self.text)
        except ValueError:
            return None
        return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None

    @property
    def pairs(self) -> dict[str, str]:
        """Of ENV, LABEL and ARG: name -> value. An ARG without a value has ''."""
        words = shlex.split(self.text)
        return {name: value for name, _, value in (word.partition("=") for word in words)}


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    line: int
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, keyword: str) -> list[Instruction]:
        return [each for each in self.instructions if each.keyword == keyword]

    def last(self, keyword: str) -> Instruction | None:
        found = self.all(keyword)
        return found[-1] if found else None

    @cached_property
    def environment(self) -> dict[str, str]:
        return {name: value for each in self.all("ENV") for name, value in each.pairs.items()}


@dataclass(frozen=True)
class Dockerfile:
    stages: list[Stage]
    arguments: Mapping[str, str]
    """The ARGs above the first FROM, with what they are when nobody gives them."""

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def final(self) -> Stage:
        return self.stages[-1]

    def lineage(self, stage: Stage) -> list[Stage]:
        """`stage` and those that it is built upon, the outermost first."""
        below = self.stage(stage.base)
        return [*(self.lineage(below) if below is not None else []), stage]


def parse(text: str, arguments: Mapping[str, str] | None = None) -> Dockerfile:
    """`arguments`: as --build-arg gives them. Raises DockerfileError."""
    given = arguments or {}
    heads: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            words = substitute(instruction.text, heads).split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                raise DockerfileError(f"line {instruction.line}: expected FROM IMAGE [AS NAME], got {instruction.text!r}")
            stages.append(Stage(words[2] if len(words) == 3 else "", words[0], instruction.line))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            heads.update({name: given.get(name, value) for name, value in instruction.pairs.items()})
        else:
            raise DockerfileError(f"line {instruction.line}: expected FROM before {instruction.keyword}")
    if not stages:
        raise DockerfileError("expected at least one FROM, found none")
    return Dockerfile(stages, heads)


def _instructions(text: str) -> Iterable[Instruction]:
    for line, words in _logical_lines(text):
        keyword, _, rest = words.partition(" ")
        if keyword.upper() not in KEYWORDS:
            raise DockerfileError(f"line {line}: expected one of {', '.join(sorted(KEYWORDS))}, got {keyword!r}")
        flags: dict[str, str] = {}
        rest = rest.strip()
        while (found := re.match(r"--([a-z-]+)(?:=(\S+))?\s+", rest)) and keyword.upper() in ("COPY", "HEALTHCHECK", "FROM", "RUN"):
            flags[found[1]] = found[2] or ""
            rest = rest[found.end() :]
        if "<<" in rest:
            raise DockerfileError(f"line {line}: heredocs are not read here")
        yield Instruction(keyword.upper(), rest, flags, line)


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    began, parts = 0, []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):  # also between continued lines, as Docker has it
            continue
        began = began or number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            yield began, " ".join(parts)
            began, parts = 0, []
    if parts:
        raise DockerfileError(f"line {began}: the last line is continued, with nothing behind it")


def substitute(text: str, values: Mapping[str, str]) -> str:
    """$NAME and ${NAME} of what is known; the others stay, for a shell to fill in."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], found[0]), text)


class IgnoreFile:
    """.dockerignore by Docker's rules: the last pattern that matches a path, or a folder above it, decides."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        self._patterns = [(not line.startswith("!"), _pattern(line.removeprefix("!").strip("/"))) for line in lines]

    def is_ignored(self, path: str) -> bool:
        """`path`: relative to the context, with slashes."""
        parts = path.strip("/").split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        ignored = False
        for is_ignoring, pattern in self._patterns:
            if any(pattern.fullmatch(each) for each in above):
                ignored = is_ignoring
        return ignored


def _pattern(text: str) -> re.Pattern[str]:
    """** is any number of folders, * and ? stay within a name; as Go's filepath.Match otherwise."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))
