"""The server with its counting taken out, but for the rows that `compare` checks: what metrics and statistics cost is what it does more.

    python -m loadtests.compare --model mlp --transport native --contestant \\
        'uncounted=python -m loadtests.uncounted serve --models {repository} --grpc 127.0.0.1:{port} --http 127.0.0.1:{http_port}'

Takes the arguments of `headrace`. For this measurement only: all durations in ModelStatistics and /metrics stay at zero.
"""

from __future__ import annotations

import sys

from headrace import cli
from headrace.telemetry.counters import BatchTimes, CounterShard, DispatchReason


def _record_batch(self: CounterShard, times: BatchTimes) -> None:
    size = self.batch_sizes.get(times.rows)
    if size is None:
        size = self.batch_sizes[times.rows] = [0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    size[0] += 1
    self.success += len(times.arrived)


def _record_dispatch(self: CounterShard, reason: DispatchReason) -> None:
    return


def main() -> int:
    CounterShard.record_batch = _record_batch  # type: ignore[method-assign]  # that is what it is for
    CounterShard.record_dispatch = _record_dispatch  # type: ignore[method-assign]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
