import argparse
from pathlib import Path

import onnx
import pytest

from loadtests.models import parse_models, write_repository


def test_repository_is_laid_out_for_a_server(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    source.write_bytes(b"weights")
    placed = write_repository(tmp_path / "models", {"mlp": None, "other": source})
    assert placed["other"] == tmp_path / "models" / "other" / "1" / "model.onnx"
    assert placed["other"].read_bytes() == b"weights"
    onnx.checker.check_model(str(placed["mlp"]))


def test_models_are_named_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.touch()
    assert parse_models(["mlp", f"a={file}"]) == {"mlp": None, "a": file}


@pytest.mark.parametrize(("argument", "complaint"), [("magika", "expected NAME=FILE"), ("magika=/nowhere.onnx", "no file")])
def test_a_model_without_a_file_is_refused(argument: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        parse_models([argument])
