"""Load whose requests are sent when they are due, whatever became of those before: what users see at a rate, and beyond it.

    python -m loadtests.open_loop HOST:PORT --model mlp --rate 5000 --seconds 5 [--arrivals NAME] [--core 1]
    python -m loadtests.open_loop HOST:PORT --model mlp --concurrency 64       (as many calls as that, always: what the client can do)

Latency counts from the time at which a request was intended to be sent: a client that is held up adds to the latency, and cannot
hide it. The send lag says by how much it was; where its p99 is over a tenth of the SLO (or a millisecond) the run is not valid.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.arrivals import Times, bursts, constant, poisson, ramp, read_trace
from loadtests.encoded_calls import EncodedCall, encode_calls
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.service_level import Results, Status, count, goodput, is_valid, percentiles, statement, status_name
from loadtests.statistics import markdown_table
from loadtests.wire_client import Client, ConnectFailed

SPIN = 2e-4
"""Seconds before a request is due from which on the client no longer sleeps: waking up takes a part of that."""
PATIENCE = 10.0
"""Seconds after the last request for which answers are waited for; three times the run besides, for what piled up in it."""
LEAD = 0.01
LEAD_EACH = 3e-6
"""Seconds for what is prepared before the first request, for each of them."""
MOST_TEXTS = 100

Kinds = NDArray[np.int64]
"""For each arrival the index of its call."""


def run_open_loop(
    client: Client,
    calls: Sequence[EncodedCall],
    times: Times,
    kinds: Kinds,
    seconds: float,
    *,
    grace: float = 0.0,
    bound: tuple[float, int] | None = None,
) -> Results:
    """Send `calls[kinds[i]]` at `times[i]`, in seconds from now. Returns when all have ended or the patience has.

    Calls that are not answered `grace` seconds after their deadline are given up. `bound`: an SLO and how many may miss it; after more
    nothing further is sent, and the results are of what was.
    """
    slo, may_miss = bound or (math.inf, len(times))
    clock, total = time.monotonic, len(times)
    begin = clock() + LEAD + LEAD_EACH * total
    due = (begin + times).tolist()
    timeouts = np.array([math.inf if call.timeout is None else call.timeout for call in calls])[kinds]
    deadlines = [None if at == math.inf else at for at in (begin + times + timeouts).tolist()]
    given_up = (begin + times + timeouts + grace).tolist()
    expiring = _by_deadline(begin + times + timeouts)
    chosen = [calls[kind] for kind in kinds]
    sent, done, statuses = [math.nan] * total, [math.nan] * total, [int(Status.UNANSWERED)] * total
    texts: Counter[str] = Counter()
    first_pending, left, expired, missed = 0, total, 0, 0
    end = begin + 4 * seconds + PATIENCE
    with _no_collector():
        while left:
            now = clock()
            while first_pending < total and due[first_pending] <= now:
                sent[first_pending] = now
                deadline = deadlines[first_pending]
                if deadline is None or now < deadline:  # a client does not send what it has given up
                    client.start(first_pending, chosen[first_pending].body, deadline, now)
                first_pending += 1
            while expired < len(expiring) and given_up[expiring[expired]] <= now:
                token = expiring[expired]
                expired += 1
                if statuses[token] == Status.UNANSWERED:
                    client.give_up(token)
                    statuses[token], done[token] = Status.EXPIRED, now
                    left -= 1
                    missed += 1
            if missed > may_miss and first_pending < total:
                left -= total - first_pending
                total, seconds = first_pending, now - begin
                expiring = [token for token in expiring[expired:] if token < total]
                expired = 0
            if now > end:
                break
            wait = _wait(due[first_pending] if first_pending < total else end, now)
            if expired < len(expiring):
                wait = min(wait, given_up[expiring[expired]] - now)
            if not left:
                wait = 0.0  # only the server is still to be told of those given up
            for arrived, ended in client.exchange(wait):
                left -= len(ended)
                for token, status, body in ended:
                    done[token] = arrived
                    statuses[token] = status if status or chosen[token].is_right(body) else Status.WRONG
                    missed += statuses[token] != Status.OK or arrived - due[token] > slo
                    if status:
                        _note(texts, status, body)
    _give_up_rest(client, statuses[:total])
    of_times = np.array([due[:total], sent[:total], done[:total]])
    return Results(of_times[0], of_times[1], of_times[2], np.array(statuses[:total], np.int16), timeouts[:total], seconds, texts)


def run_closed_loop(client: Client, calls: Sequence[EncodedCall], concurrency: int, seconds: float) -> Results:
    """So many calls under way, always, each followed by the next: capacity, and at a concurrency of 1 the time of a call alone."""
    clock = time.monotonic
    sent: list[float] = []
    done: list[float] = []
    statuses: list[int] = []
    texts: Counter[str] = Counter()

    def begin(now: float) -> None:
        client.start(len(sent), calls[len(sent) % len(calls)].body, None, now)
        sent.append(now)
        done.append(math.nan)
        statuses.append(Status.UNANSWERED)

    started = clock()
    end, under_way = started + seconds, concurrency
    with _no_collector():
        for _ in range(concurrency):
            begin(started)
        while under_way and clock() < end + PATIENCE:
            for arrived, ended in client.exchange(0.1):
                for token, status, body in ended:
                    done[token] = arrived
                    statuses[token] = status if status or calls[token % len(calls)].is_right(body) else Status.WRONG
                    if status:
                        _note(texts, status, body)
                    if arrived < end:
                        begin(clock())
                    else:
                        under_way -= 1
    _give_up_rest(client, statuses)
    times = np.array(sent)
    return Results(times, times, np.array(done), np.array(statuses, np.int16), np.full(len(sent), math.inf), seconds, texts)


def _note(texts: Counter[str], status: int, text: bytes) -> None:
    said = f"{status_name(status)} {text.decode(errors='replace')}".strip()
    if said in texts or len(texts) < MOST_TEXTS:
        texts[said] += 1


def _wait(due: float, now: float) -> float:
    left = due - now
    return left - SPIN if left > SPIN else 0.0


def _by_deadline(deadlines: Times) -> list[int]:
    """Indexes of those that have one, the earliest first."""
    order = np.argsort(deadlines, kind="stable")
    return [int(index) for index in order[np.isfinite(deadlines[order])]]


def _give_up_rest(client: Client, statuses: Sequence[int]) -> None:
    for token, status in enumerate(statuses):
        if status == Status.UNANSWERED:
            client.give_up(token)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Nothing that a run makes has cycles, and a collection would come between a request and its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def alternate(total: int, calls: int) -> Kinds:
    """The calls in turn."""
    return np.arange(total) % calls


# -- the program -------------------------------------------------------------------------------------------------------


def arrivals(name: str, rate: float, seconds: float, seed: int) -> Times:
    """By name, or a file of times. Raises ValueError."""
    match name:
        case "constant":
            return constant(rate, seconds)
        case "poisson":
            return poisson(rate, seconds, seed)
        case "bursts":
            return bursts(rate, seconds, seed)
        case "ramp":
            return ramp(0.0, 2 * rate, seconds, seed)
    if not Path(name).is_file():
        raise ValueError(f"arrivals {name!r}: expected poisson, constant, bursts, ramp, or a file with a time in seconds a line")
    return read_trace(Path(name))


def describe(results: Results, slo: float | None) -> str:
    counts, lags = count(results, slo), percentiles(results.lags, [50, 99, 100])
    p50, p90, p99 = percentiles(results.latencies, [50, 90, 99])
    row = [f"{len(results) / results.seconds:.0f}", f"{goodput(results, slo):.0f}", f"{p50 * 1e3:.3f}", f"{p90 * 1e3:.3f}"]
    row += [f"{p99 * 1e3:.3f}", *(f"{lag * 1e6:.0f}" for lag in lags)]
    row += [str(number) for number in (counts.ok, counts.late, counts.refused, counts.failed, counts.wrong)]
    header = ["offered/s", "goodput/s", "p50 ms", "p90 ms", "p99 ms", "lag p50 µs", "lag p99 µs", "lag max µs"]
    lines = [markdown_table([*header, "ok", "late", "refused", "failed", "wrong"], [row])]
    kinds, numbers = np.unique(results.statuses, return_counts=True)
    if len(kinds) > 1:
        lines.append("statuses: " + ", ".join(f"{status_name(int(k))} {n}" for k, n in zip(kinds, numbers, strict=True)))
    lines += [f"{number} times: {text}" for text, number in results.texts.most_common(5)]
    if slo is not None:
        lines.append(statement(len(results), len(results) - counts.ok, slo))
    if not is_valid(results, slo):
        lines.append("NOT VALID: the client did not keep to its schedule")
    return "\n".join(lines)


def main() -> int:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.open_loop", description=description, formatter_class=formatter)
    parser.add_argument("address", metavar="HOST:PORT", help="or unix:PATH")
    add_models_argument(parser)
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second (default: 1000)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--arrivals",
        default="poisson",
        metavar="NAME|FILE",
        help="poisson, constant, bursts, ramp (from 0 to twice the rate), or a recorded trace",
    )
    parser.add_argument("--concurrency", type=int, help="a closed loop with so many calls instead")
    parser.add_argument("--slo-ms", type=float, help="what counts as in time")
    parser.add_argument("--deadline-ms", type=float, help="given to the server with each request")
    parser.add_argument("--priority", type=int, help="of each request")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--core", type=int, help="where the client runs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    slo = None if options.slo_ms is None else options.slo_ms / 1e3
    deadline = None if options.deadline_ms is None else options.deadline_ms / 1e3
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for model, path in write_repository(Path(scratch), selected_models(parser, options)).items():
            calls = encode_calls(model, path, timeout=deadline, priority=options.priority)
            try:
                times = arrivals(options.arrivals, options.rate, options.seconds, options.seed)
                used = time.process_time()
                with Client(options.address, options.connections) as client:
                    if options.concurrency:
                        results = run_closed_loop(client, calls, options.concurrency, options.seconds)
                    else:
                        seconds = max(options.seconds, float(times[-1]) if len(times) else 0.0)
                        results = run_open_loop(client, calls, times, alternate(len(times), len(calls)), seconds)
            except ValueError as error:
                parser.error(str(error))
            except ConnectFailed as error:
                print(error, file=sys.stderr)
                return 1
            used = time.process_time() - used
            print(f"{model}: {used / max(1, len(results)) * 1e6:.1f} CPU-µs a request here\n{describe(results, slo)}")
            counts = count(results, slo)
            failed += counts.failed + counts.wrong
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
