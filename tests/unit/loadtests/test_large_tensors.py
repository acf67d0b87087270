import json

import numpy as np
import pytest
from headrace.wire.codec import decode_request
from headrace.wire.shared_memory import place

from loadtests.calls import WrongAnswer
from loadtests.large_tensors import (
    BYTES,
    ECHO,
    MODEL,
    REGION,
    ROUTES,
    SERVER,
    SHAPE,
    SHARED_MEMORY,
    TCP,
    Cell,
    Memory,
    Report,
    as_json,
    make_tensor,
    placed_message,
    render,
)


def cell(round=0, server=SERVER, route=TCP, rate=100.0, cpu=1204.224, client=0.2):
    return Cell(round, server, route, 8, 500, rate, 0.001, 0.002, cpu, 600.0, client)


def test_the_placed_message_is_a_request_with_both_tensors_in_the_region():
    class Regions:
        def view(self, name, offset, byte_size):
            assert name == REGION
            return memoryview(bytearray(2 * BYTES))[offset : offset + byte_size]

    request = decode_request(placed_message())
    place(request, Regions())
    assert (request.model, request.inputs[0].shape, len(request.inputs[0].data)) == (MODEL, SHAPE, BYTES)
    assert (request.destinations[0].offset, request.destinations[0].view.nbytes) == (BYTES, BYTES)


def test_the_region_holds_the_input_and_an_output_that_is_not_there_is_found_out():
    tensor = make_tensor()
    with Memory(tensor) as memory:
        with open(f"/dev/shm/{memory.key}", "r+b") as file:
            assert np.array_equal(np.frombuffer(file.read(BYTES), np.float32).reshape(SHAPE), tensor)
            file.write(tensor.tobytes())
        memory.check_output()
        memory.clear_output()
        with pytest.raises(WrongAnswer, match="expected the output to be the input"):
            memory.check_output()


def test_rates_are_set_against_the_echo_of_the_same_round():
    report = Report({}, {}, [cell(0, rate=90), cell(0, ECHO, rate=100), cell(1, rate=240), cell(1, ECHO, rate=200), cell(2, rate=7)])
    assert report.ratios(TCP, 8) == [0.9, 1.2]


def test_the_table_has_cpu_time_by_request_and_by_megabyte_in_and_out():
    line = next(line for line in render(Report({}, {}, [cell()]), [8]).splitlines() if line.startswith("| TCP"))
    cells = [text.strip() for text in line.split("|")[1:-1]]
    assert cells == [TCP, "8", SERVER, "100", "-", "1.00", "2.00", "1 200", "1 000", "600", "498", "20%", "1"]


def test_an_echo_beside_shared_memory_moves_no_megabytes_and_a_busy_client_is_marked():
    text = render(Report({}, {}, [cell(server=ECHO, route=SHARED_MEMORY, client=0.9)]), [8])
    line = next(line for line in text.splitlines() if line.startswith(f"| {SHARED_MEMORY}") and ECHO in line)
    assert "≥ 100" in line
    assert [text.strip() for text in line.split("|")].count("-") == 3


def test_what_was_not_measured_is_in_the_table_and_failures_below_it():
    text = render(Report({"cpu": "x"}, {}, failures=["no answer"]), [1, 8])
    assert text.count("not measured") == 2 * 2 * len(ROUTES)
    assert text.endswith("## Failures\n\n- no answer\n")


def test_the_json_says_what_it_is():
    content = json.loads(as_json(Report({}, {"transport": "native"}, [cell()])))
    assert (content["kind"], content["cells"][0]["rate"]) == ("large_tensors", 100.0)
