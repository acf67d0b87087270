import json
from dataclasses import replace

import numpy as np
import pytest

from loadtests.perf_analyzer import Analysis, AnalyzerFailed, input_file, parse_report

# perf_analyzer of tritonclient 2.50, -v.
OUTPUT = """\
*** Measurement Settings ***
  Batch size: 1
  Measurement window: 1500 msec

Request concurrency: 16
  Pass [1] throughput: 12187.2 infer/sec. Avg latency: 1220 usec (std 353 usec). 
  Client: 
    Request count: 74446
    Throughput: 11594.1 infer/sec
    Avg client overhead: 9.48%
    Avg latency: 1286 usec (standard deviation 723 usec)
    p50 latency: 1174 usec
    p99 latency: 3882 usec
    Avg gRPC time: 1282 usec (marshal 0 usec + response wait 1282 usec + unmarshal 0 usec)
  Server: 
    Inference count: 74446
    Execution count: 10979
    Successful request count: 74446
    Avg request latency: 958 usec (overhead 4 usec + queue 343 usec + compute input 65 usec + compute infer 259 usec + compute output 287 usec)

Inferences/Second vs. Client Average Batch Latency
Concurrency: 16, throughput: 11594.1 infer/sec, latency 1286 usec
"""  # noqa: E501, W291 - as it is printed

ANALYSIS = Analysis(
    concurrency=16,
    throughput=11594.1,
    client_latency=1286,
    p99=3882,
    inferences=74446,
    executions=10979,
    request=958,
    overhead=4,
    queue=343,
    compute_input=65,
    compute_infer=259,
    compute_output=287,
)


def test_report_is_parsed() -> None:
    # The totals are the client's, not those of the first pass.
    assert parse_report(OUTPUT) == [ANALYSIS]


def test_each_concurrency_is_a_block() -> None:
    blocks = parse_report(OUTPUT + OUTPUT.replace("Request concurrency: 16", "Request concurrency: 64"))
    assert [block.concurrency for block in blocks] == [16, 64]


def test_report_without_server_side_is_an_error() -> None:
    with pytest.raises(AnalyzerFailed, match="no inferences, executions"):
        parse_report(OUTPUT[: OUTPUT.index("  Server:")])


def test_output_without_report_is_shown() -> None:
    with pytest.raises(AnalyzerFailed, match="Connection refused"):
        parse_report("error: Connection refused")


def test_mean_batch_is_rows_over_executions() -> None:
    assert ANALYSIS.rows_per_batch == pytest.approx(6.78, abs=0.01)


def test_breakdown_that_adds_up_has_no_problems() -> None:
    assert ANALYSIS.problems(tolerance=0.1) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"executions": 0}, "no execution"),
        ({"queue": 400}, "the request only 958"),
        ({"compute_infer": 59}, "account for 754 µs only"),
        ({"client_latency": 900}, "900 µs for the client"),
    ],
)
def test_breakdown_that_does_not_add_up_is_told(change: dict[str, int], problem: str) -> None:
    found = replace(ANALYSIS, **change).problems(tolerance=0.1)  # type: ignore[arg-type]  # the keys are integer fields
    assert len(found) == 1
    assert problem in found[0]


def test_input_file_leaves_out_the_batch() -> None:
    written = json.loads(input_file({"x": np.arange(6, dtype=np.int32).reshape(1, 2, 3)}))
    assert written == {"data": [{"x": {"content": [0, 1, 2, 3, 4, 5], "shape": [2, 3]}}]}
