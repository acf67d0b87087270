from pathlib import Path

import pytest

from loadtests.h2load import LoadFailed, LoadRun, Summary, check_summary, parse_summary, read_latencies, spread_calls

# nghttp2 1.52, 30 000 calls of a gRPC server that answers with 46 bytes each.
OUTPUT = """\
starting benchmark...
spawning thread #0: 2 total client(s). 30000 total requests
Application protocol: h2c
progress: 100% done

finished in 1.28s, 23354.81 req/s, 1.75MB/s
requests: 30000 total, 30000 started, 30000 done, 30000 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 30000 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.25MB (2359351) total, 88.04KB (90150) headers (space savings 96.29%), 1.32MB (1380000) data
                     min         max         mean         sd        +/- sd
time for request:      622us      7.17ms      2.35ms       577us    71.35%
req/s           :   11677.60    11690.33    11683.97        9.00   100.00%
"""


def test_summary_of_a_good_run() -> None:
    assert parse_summary(OUTPUT) == Summary(1.28, 30_000, 30_000, 30_000, 1_380_000)


@pytest.mark.parametrize(("text", "seconds"), [("521us", 521e-6), ("134.69ms", 0.13469), ("1.5m", 90.0)])
def test_summary_takes_every_unit_of_time(text: str, seconds: float) -> None:
    assert parse_summary(OUTPUT.replace("1.28s,", f"{text},")).seconds == pytest.approx(seconds)


def test_output_without_a_summary_is_shown() -> None:
    with pytest.raises(LoadFailed, match="unrecognized option"):
        parse_summary("h2load: unrecognized option '--rps'")


def test_right_answers_pass() -> None:
    check_summary(parse_summary(OUTPUT), 46)


def test_an_answer_with_no_body_is_noticed() -> None:
    # What a gRPC error looks like to an HTTP/2 client: status 200 and no data.
    with pytest.raises(LoadFailed, match="expected 46 bytes each"):
        check_summary(Summary(1.0, 100, 100, 100, 99 * 46), 46)


@pytest.mark.parametrize("summary", [Summary(1.0, 100, 99, 100, 4600), Summary(1.0, 100, 100, 99, 4600)])
def test_a_failed_request_is_noticed(summary: Summary) -> None:
    with pytest.raises(LoadFailed, match="expected all"):
        check_summary(summary, 46)


@pytest.mark.parametrize(("concurrency", "spread"), [(1, (1, 1)), (16, (1, 16)), (32, (1, 32)), (64, (2, 32)), (256, (8, 32))])
def test_calls_share_few_connections(concurrency: int, spread: tuple[int, int]) -> None:
    assert spread_calls(concurrency) == spread


def test_a_concurrency_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="33 does not divide"):
        spread_calls(33)


def test_latencies_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("1795430557569695\t200\t316\n1795430557570074\t200\t2590\n")
    assert read_latencies(log).tolist() == pytest.approx([316e-6, 2590e-6])


def test_rate_is_requests_over_seconds() -> None:
    assert LoadRun(requests=3000, seconds=1.5, p50=0.0, p99=0.0, client_cpu=0.1).rate == 2000.0
