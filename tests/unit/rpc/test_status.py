from __future__ import annotations

import grpc
import pytest
from headrace.errors import Code, NotFound
from headrace.rpc.status import MAX_DETAILS_BYTES, STATUS, status_details


def test_every_code_has_the_status_of_its_name() -> None:
    assert {code.value: STATUS[code].name for code in Code} == {code.value: code.value for code in Code}
    assert all(isinstance(status, grpc.StatusCode) for status in STATUS.values())


@pytest.mark.parametrize(
    "text", ["", "Request for unknown model: 'resnet' is not found", "модель 'ü😀' is not found", "x" * MAX_DETAILS_BYTES]
)
def test_a_text_that_can_be_sent_is_left_alone(text: str) -> None:
    assert status_details(NotFound(text)) == text


@pytest.mark.parametrize("text", ["line\nbreak", "nul\x00", "lone \udcff surrogate", "\x1b[31mred"])
def test_what_a_header_cannot_carry_becomes_a_space(text: str) -> None:
    details = status_details(NotFound(text))
    assert details.isprintable()
    assert len(details) == len(text)


@pytest.mark.parametrize("letter", ["x", "ü", "😀"])
def test_a_long_text_is_cut_between_characters(letter: str) -> None:
    details = status_details(NotFound(letter * 100_000))
    assert details.endswith(letter + "...")
    assert MAX_DETAILS_BYTES - 6 <= len(details.encode()) <= MAX_DETAILS_BYTES
