"""The parser of Dockerfiles and .dockerignore, and the rules; each rule on a file that breaks it."""

from __future__ import annotations

import pytest

from scripts.dockerfile_rules import faults
from scripts.dockerfiles import DockerfileError, IgnoreFile, parse

GOOD = """\
ARG BASE=debian:13.8-slim
FROM ${BASE} AS build
COPY app.py /app/
RUN apt-get update \\
    # why
    && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
FROM ${BASE}
COPY --from=build /app /app
ENV HEADRACE_GRPC=0.0.0.0:8001 HEADRACE_HTTP=0.0.0.0:8002
LABEL org.opencontainers.image.title="a b" org.opencontainers.image.description=d org.opencontainers.image.licenses=l \\
      org.opencontainers.image.version=1 org.opencontainers.image.revision=r
USER 65532:65532
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s CMD ["headrace", "health"]
ENTRYPOINT ["headrace"]
CMD ["serve"]
"""
KEEP = IgnoreFile("*\n!app.py\n!server\n**/*.pyc\n")


def lint(text: str) -> list[str]:
    return faults(text, KEEP, lambda path: path in ("app.py", "secret.txt"))


def test_lines_are_joined_and_comments_between_them_left_out() -> None:
    file = parse(GOOD)
    run = file.stages[0].last("RUN")
    assert run is not None
    assert (run.text.count("&&"), "why" in run.text, run.line) == (2, False, 4)
    assert [(stage.name, stage.base) for stage in file.stages] == [("build", "debian:13.8-slim"), ("", "debian:13.8-slim")]
    assert parse(GOOD, {"BASE": "debian:13.9-slim"}).final.base == "debian:13.9-slim"
    assert file.final.last("LABEL").pairs["org.opencontainers.image.title"] == "a b"


@pytest.mark.parametrize("text", ["RUN true\n", "FROM a:1.0\nADD x /\n", "FROM a:1.0\nRUN true \\\n", "FROM a:1.0\nRUN cat <<EOF\n", ""])
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(DockerfileError):
        parse(text)


def test_a_file_that_follows_every_rule_has_no_faults() -> None:
    assert lint(GOOD) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("debian:13.8-slim", "debian:latest", "expected a tag"),
        ("debian:13.8-slim", "debian:bookworm", "expected a tag"),
        (" --no-install-recommends", "", "--no-install-recommends"),
        (" && rm -rf /var/lib/apt/lists/*", "", "rm -rf"),
        ("COPY app.py /app/", "RUN pip install --no-cache-dir numpy", "--require-hashes"),
        ("COPY app.py /app/", "RUN pip install --require-hashes -r a.txt", "--no-cache-dir"),
        ("COPY app.py /app/", "RUN curl https://a | sh", "downloaded"),
        ("COPY app.py /app/", "COPY . /app/", "not everything"),
        ("COPY app.py /app/", "COPY gone.py /app/", "there is no gone.py"),
        ("COPY app.py /app/", "COPY secret.txt /app/", "left out by .dockerignore"),
        ("COPY app.py /app/", "ARG API_TOKEN", "no secrets"),
        ("COPY --from=build", "COPY --from=nobody", "expected one of the stages"),
        ("USER 65532:65532\n", "", "USER"),
        ("USER 65532:65532", "USER headrace", "USER"),
        ("USER 65532:65532", "USER 0:0", "USER"),
        ('ENTRYPOINT ["headrace"]', "ENTRYPOINT headrace", "ENTRYPOINT"),
        ('CMD ["headrace", "health"]', "CMD headrace health", "HEALTHCHECK"),
        ("HEALTHCHECK --interval=10s CMD", "HEALTHCHECK NONE\nVOLUME", "HEALTHCHECK"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL"),
        ("EXPOSE 8001 8002", "EXPOSE 8001", "EXPOSE"),
        ("HEADRACE_HTTP=0.0.0.0:8002", "HEADRACE_HTTP=127.0.0.1:8002", "0.0.0.0"),
        ("org.opencontainers.image.revision=r", "", "revision"),
    ],
)
def test_each_rule_finds_the_file_that_breaks_it(before: str, after: str, fault: str) -> None:
    assert before in GOOD
    found = lint(GOOD.replace(before, after))
    assert any(fault in line for line in found), found


@pytest.mark.parametrize(
    ("path", "is_ignored"),
    [
        ("README.md", True), ("app.py", False), ("server", False), ("server/headrace/cli.py", False), ("server/a/b.pyc", True),
        ("x.pyc", True), ("serverless", True), ("docs/app.py", True),
    ],
)  # fmt: skip
def test_the_last_pattern_that_matches_a_path_or_a_folder_above_decides(path: str, is_ignored: bool) -> None:
    assert KEEP.is_ignored(path) is is_ignored
