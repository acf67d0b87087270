import time
from pathlib import Path

import pytest
from headrace.config import ModelConfig
from headrace.plugins import load_backends
from headrace.sources.manifest import read_manifest
from headrace.sources.verification import verify_version

from loadtests.models import make_mlp
from loadtests.publisher import Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    artifacts = [tmp_path / name / "model.onnx" for name in ("a", "b")]
    for seed, artifact in enumerate(artifacts):
        artifact.parent.mkdir()
        artifact.write_bytes(make_mlp(seed).SerializeToString())
    return Publisher(tmp_path / "models", tmp_path / "staging", "m", artifacts, load_backends())


def test_a_staged_version_is_not_served_before_it_is_committed(publisher: Publisher) -> None:
    publisher.stage(2)
    assert not (publisher.repository / "m").exists()
    before = time.monotonic()
    assert before <= publisher.commit(2) <= time.monotonic()
    assert [path.name for path in (publisher.repository / "m").iterdir()] == ["2"]


def test_what_is_committed_is_a_published_version_of_its_parity(publisher: Publisher) -> None:
    for version in (2, 3):
        publisher.stage(version)
        publisher.commit(version)
        directory = publisher.repository / "m" / str(version)
        verify_version(ModelConfig("m"), directory.parent, directory)
        assert (read_manifest(directory).model, read_manifest(directory).version) == ("m", version)
        assert (directory / "model.onnx").read_bytes() == publisher.artifacts[(version - 1) % 2].read_bytes()


def test_retention_keeps_the_newest_and_what_is_no_version(publisher: Publisher) -> None:
    for name in (*range(1, 12), "model.toml"):
        (publisher.repository / "m" / str(name)).mkdir(parents=True)
    publisher.retire(11, kept=3)
    assert sorted(path.name for path in (publisher.repository / "m").iterdir()) == ["10", "11", "9", "model.toml"]
