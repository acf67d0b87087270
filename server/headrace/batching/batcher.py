"""The driver of one version's queue: admits tickets from any thread, hands batches to free instances, settles every ticket once.

A ticket is settled by whoever takes it out of the queue, under the lock: `take` (then the worker that ran the batch settles
it, or `take` itself if it can no longer be answered in time), `cancel`, `expire` or `close`. Since a ticket leaves the queue exactly
once, it is settled exactly once, whatever races. Requests without a deadline pay one comparison for those that have one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from headrace.batching.batch_queue import NEVER, BatchQueue
from headrace.batching.forecast import MARGIN, Forecast
from headrace.batching.latency import LatencyStats, LatencyTable
from headrace.batching.lateness import expired_error, hopeless_error, unlikely_error
from headrace.config import BatchingConfig
from headrace.errors import Cancelled, DeviceLost, HeadraceError, NotReady, QueueFull
from headrace.requests import Answer, Outlet, Reply, Ticket
from headrace.telemetry.counters import CounterShard, DispatchReason, DropCause, FailureReason

PROBE_AFTER = 1.0
"""Seconds of refusals on an idle model after which one request is tried all the same. What makes them is an estimate, and only
batches can correct it."""


class Instance(Protocol):
    """A free instance that can be woken. `wake` may run batches on the calling thread; it is never called under the lock."""

    def wake(self) -> None: ...


class Timer(Protocol):
    """Calls back at a monotonic time, from a thread of its choosing; a later call replaces an earlier one."""

    def __call__(self, when: float, callback: Callable[[], None]) -> None: ...


class Schedule(Protocol):
    """Runs a short callback soon: at once, or once everything that was received together has been submitted.

    Equal callbacks that still wait may run once for all.
    """

    def __call__(self, callback: Callable[[], None]) -> None: ...


def at_once(callback: Callable[[], None]) -> None:
    callback()


class Batcher:
    """Owns the queue, the set of idle instances, what runs, what is known of l(b) and of the traffic, and the number of unsettled
    tickets of one version, all under one lock.
    """

    def __init__(
        self,
        name: str,
        config: BatchingConfig,
        *,
        latencies: LatencyTable,
        clock: Callable[[], float],
        timer: Timer,
        shard: CounterShard,
        schedule: Schedule = at_once,
        on_dropped: Callable[[Sequence[Ticket], HeadraceError], None] | None = None,
        instances: int = 1,
        on_lost: Callable[[Instance, DeviceLost], None] | None = None,
    ) -> None:
        self._name = name
        self._delay = config.max_queue_delay
        self._max_queue_rows = config.max_queue_size
        self.latencies = latencies
        self._forecast = Forecast(latencies)
        self._queue = BatchQueue(latencies.worthwhile, config.max_queue_size)
        self._clock = clock
        self._timer = timer
        self._schedule = schedule
        self._on_dropped = on_dropped
        self._on_lost = on_lost
        self._armed = NEVER
        self._shard = shard
        self._lock = threading.Lock()
        self._idle: list[Instance] = []
        self._running: dict[Ticket, _Running] = {}
        """By the first ticket of the batch."""
        self._instances = instances
        self._lost: set[Instance] = set()
        self._held: set[Instance] = set()
        """Of the idle those that have something to run once what they run has ended."""
        self._refused_rows = 0
        self._refusing_since = NEVER
        self._unsettled = 0
        self._is_open = True
        self._closed_reason: HeadraceError = NotReady(f"{name} is not at ready state")
        self._when_drained: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"Batcher({self._name}, {self._queue!r}, unsettled={self._unsettled}, idle={len(self._idle)}, open={self._is_open})"

    @property
    def pending_rows(self) -> int:
        return self._queue.rows

    @property
    def pending_requests(self) -> int:
        return self._queue.requests

    @property
    def unsettled(self) -> int:
        """Tickets admitted and not yet answered: the leases on this version."""
        return self._unsettled

    def latency_stats(self) -> LatencyStats:
        with self._lock:
            return self.latencies.stats()

    def submit(self, ticket: Ticket) -> None:
        """Admit a ticket. Raises QueueFull, NotReady, and DeadlineExceeded or QueueTimeout when it is too late or foreseeably will be;
        then nothing was kept."""
        for _, error in self.submit_all([ticket]):
            raise error

    def submit_all(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, HeadraceError]]:
        """Admit tickets that came together, before anybody looks at the queue. Those that are refused, with what `submit` raises."""
        refused: list[tuple[Ticket, HeadraceError]] = []
        now = self._clock()
        with self._lock:
            push, most = self._queue.push, self._max_queue_rows
            has_room = self._is_open and (not most or self._queue.rows + sum([ticket.rows for ticket in tickets]) <= most)
            for ticket in tickets:
                ticket.enqueued = now
                # Most have no deadline and find room.
                if ticket.expires != NEVER or not has_room:
                    try:
                        self._check(ticket, now)
                    except HeadraceError as error:
                        refused.append((ticket, error.with_traceback(None)))
                        continue
                    if ticket.expires < self._armed:
                        self._arm(ticket.expires)
                push(ticket)
            self._unsettled += len(tickets) - len(refused)
            has_idle = bool(self._idle)
        if has_idle:
            self._schedule(self._wake_one)
        return refused

    def _check(self, ticket: Ticket, now: float) -> None:
        """Raises when the ticket cannot be admitted."""
        if not self._is_open:
            # A new one each time: an exception that is raised again and again grows by a traceback each time.
            raise type(self._closed_reason)(str(self._closed_reason))
        if ticket.expires != NEVER:
            self._check_deadline(ticket, now)
        if self._queue.is_full_for(ticket.rows):
            self._shard.record_drop(DropCause.QUEUE_FULL)
            self._refused_rows += ticket.rows
            raise QueueFull(
                f"Exceeds maximum queue size: {self._queue.rows} of {self._max_queue_rows} rows wait for {self._name}, "
                f"got {ticket.rows} more"
            )

    def _check_deadline(self, ticket: Ticket, now: float) -> None:
        """Raises when it is over, or will be before the request could be answered."""
        if ticket.expires <= now:
            self._shard.record_drop(DropCause.EXPIRED)
            raise expired_error(ticket, self._name)
        forecast, queue = self._forecast, self._queue
        if now >= forecast.next_look:
            self._look(now)
        if ticket.answer_by != NEVER:
            forecast.saw_deadline(ticket.answer_by - now)
        if not self.latencies.is_known or forecast.is_easy(ticket.expires - now, queue.rows):
            return
        start, answer = forecast.start_and_answer(now, self._free_at(now), queue.rows_ahead(ticket), queue.rows, ticket.rows)
        if (start <= ticket.expires and answer <= ticket.answer_by) or self._is_probe(ticket, now):
            return
        self._shard.record_drop(DropCause.REFUSED)
        self._refused_rows += ticket.rows
        raise unlikely_error(ticket, self._name, now, start, answer)

    def _free_at(self, now: float) -> list[float]:
        """When each instance has done what it runs, ascending; those that are about to look at the queue are free."""
        free: dict[Instance, float] = {}
        for batch in self._running.values():
            free[batch.instance] = self._end_of(batch, free.get(batch.instance, 0.0))
        ends = sorted([max(end, now) for end in free.values()])
        return [now] * (self._instances - len(ends)) + ends

    def _end_of(self, batch: _Running, before: float) -> float:
        """`before`: when the batch that its instance got before it ends."""
        return max(batch.began, before) + self.latencies.mean(batch.rows)

    def _is_probe(self, ticket: Ticket, now: float) -> bool:
        """Whether to try it against the estimate: with the device to itself the model could do it, and nobody else waits."""
        if self._running or self._queue.requests or now + self.latencies.possible(ticket.rows) > ticket.answer_by:
            return False
        self._refusing_since = min(self._refusing_since, now)
        return now - self._refusing_since > PROBE_AFTER

    def _look(self, now: float) -> None:
        self._forecast.look(self._instances, self._queue.rows + self._queue.left_rows + self._refused_rows, now)

    def _wake_one(self) -> None:
        with self._lock:
            instance = self._pop_helper()
        if instance is not None:
            instance.wake()

    def count_failure(self, reason: FailureReason) -> None:
        """For requests refused before they became tickets; the shard has one writer at a time, hence the lock."""
        with self._lock:
            self._shard.record_failure(reason)

    def take(self, instance: Instance, lead: float = 0.0) -> tuple[list[Ticket], float]:
        """A batch for a free instance, or ([], until): nothing to run before `until` (inf: until woken).

        An instance may take a batch while it runs another. It gets a full one at once; any other `lead` seconds before that one
        ends, so that it could fill until then.
        """
        now = self._clock()
        expired: list[Ticket] = []
        hopeless: list[Ticket] = []
        with self._lock:
            if self._queue.has_deadlines:
                expired = self._queue.expire(now)
            ready_at = self._ready_at()
            is_due = ready_at <= now
            if self._running and ready_at < NEVER and not self._queue.is_batch_full():
                ready_at = max(ready_at, self._free_from(instance) - lead)
            if instance in self._lost:
                # It may have been woken for what is queued now.
                tickets, ready_at, helper = [], NEVER, self._pop_helper()
            elif ready_at > now:
                tickets, helper = self._rest(instance, ready_at), self._pop_helper() if is_due else None
            else:
                if self._queue.has_deadlines and self._queue.is_pressed(self.latencies, now):
                    hopeless = self._queue.drop_late(self.latencies, now, self._forecast.sustaining(self._instances, now))
                tickets, helper = self._start(instance, now)
        if expired:
            self._fail_late(expired, DropCause.EXPIRED)
        if hopeless:
            self._fail_late(hopeless, DropCause.HOPELESS)
        if helper is not None:
            helper.wake()
        return tickets, ready_at

    def _free_from(self, instance: Instance) -> float:
        """When the instance has done what it runs; 0 when it runs nothing."""
        end = 0.0
        for batch in self._running.values():
            if batch.instance is instance:
                end = self._end_of(batch, end)
        return end

    def _rest(self, instance: Instance, until: float) -> list[Ticket]:
        """Nothing to run now. On the list also when it will look again by itself, so that a filled batch need not wait for that."""
        if instance not in self._idle:
            self._idle.append(instance)
        if until < NEVER and self._running:
            self._held.add(instance)
        else:
            self._held.discard(instance)
        return []

    def _start(self, instance: Instance, now: float) -> tuple[list[Ticket], Instance | None]:
        """The batch that runs now, and another idle instance if there is more."""
        queue, latencies = self._queue, self.latencies
        rows, due = queue.rows, queue.next_expiry()
        if now >= latencies.next_trial:
            queue.limit = latencies.trial(now, rows)
        is_full = queue.is_batch_full()
        tickets = queue.take(latencies, now)
        queue.limit = latencies.worthwhile
        self._shard.record_dispatch(self._dispatch_reason(is_full))
        self._running[tickets[0]] = _Running(now, rows - queue.rows, due, instance)
        if now >= self._forecast.next_look:
            self._look(now)
        if not self._idle:
            return tickets, None
        if instance in self._idle:
            self._idle.remove(instance)
        return tickets, self._pop_helper()

    def _pop_helper(self) -> Instance | None:
        """An instance to look at the queue: one that runs nothing, if there is one. Those that wait for what they run to end have
        looked already, and need not again before there is a full batch."""
        idle = self._idle
        if not idle or not self._queue.requests:
            return None
        if not self._running:
            return idle.pop()
        busy = {batch.instance for batch in self._running.values()}
        has_full = self._queue.is_batch_full()
        chosen = None
        for index, instance in enumerate(idle):
            if instance not in busy or (chosen is None and (has_full or instance not in self._held)):
                chosen = index
        return None if chosen is None else idle.pop(chosen)

    def _dispatch_reason(self, is_full: bool) -> DispatchReason:
        if is_full:
            return DispatchReason.FULL
        return DispatchReason.DELAY if self._delay else DispatchReason.IDLE

    def _ready_at(self) -> float:
        if not self._queue.requests:
            return NEVER
        if not self._delay or not self._is_open or self._queue.is_batch_full():
            return 0.0
        ready_at = self._queue.oldest_enqueued() + self._delay
        expiry = self._queue.next_expiry()
        if expiry == NEVER:
            return ready_at
        # Nobody is left to expire beside an idle instance.
        if not self.latencies.is_known:
            return 0.0 if expiry <= ready_at else ready_at
        # The last moment at which another one may still join.
        return min(ready_at, expiry - self.latencies.upper(min(self._queue.rows + 1, self._queue.limit)) - MARGIN)

    def settle(self, tickets: Sequence[Ticket], answers: Sequence[Answer], stretch: float = 0.0) -> None:
        """Deliver a taken batch's answers, one hop per outlet, and give the leases back. `stretch`: see LatencyTable.observe, which does
        not see a batch for which it is negative."""
        now = self._clock()
        for ticket in tickets:
            if ticket.is_settled:
                raise AssertionError(f"{ticket!r} settled twice")
            ticket.is_settled = True
        deliver(tickets, answers)
        with self._lock:
            self._end(tickets, answers, now, stretch)
            self._unsettled -= len(tickets)
            is_drained = self._unsettled == 0 and not self._is_open
        if is_drained:
            self._report_drained()

    def _end(self, tickets: Sequence[Ticket], answers: Sequence[Answer], now: float, stretch: float) -> None:
        batch = self._running.pop(tickets[0])
        for first, other in self._running.items():
            if other.instance is batch.instance:
                # It had the device only from now on.
                self._running[first] = other._replace(began=now)
        if batch.due < now:
            self._shard.record_drop(DropCause.LATE, len([ticket for ticket in tickets if ticket.answer_by < now]))
        if now >= self.latencies.next_look and stretch >= 0.0 and not isinstance(answers[0], HeadraceError):
            self.latencies.observe(batch.rows, max(now - batch.began, _SHORTEST), now, stretch)
            self._refusing_since = NEVER

    def cancel(self, ticket: Ticket) -> bool:
        """The caller went away. True when the ticket was still queued; else its batch runs on and the answer is dropped."""
        with self._lock:
            if not self._queue.remove(ticket):
                return False
            self._shard.record_failure(FailureReason.CANCELED)
            ticket.is_settled = True
        self._drop([ticket], Cancelled("the caller cancelled the request"))
        self._release(1)
        return True

    def _drop(self, tickets: Sequence[Ticket], error: HeadraceError) -> None:
        if self._on_dropped is not None:
            self._on_dropped(tickets, error)
        deliver(tickets, [error] * len(tickets))

    def cancel_reply(self, reply: Reply) -> None:
        ticket = reply.ticket  # once: whoever delivers the answer takes it away, perhaps right now
        if ticket is not None:
            self.cancel(ticket)

    def expire(self) -> None:
        """Answer whoever has waited past its time, also while every instance is busy. The timer's callback."""
        with self._lock:
            expired = self._queue.expire(self._clock())
            self._arm(self._queue.next_expiry())
        self._fail_late(expired, DropCause.EXPIRED)

    def _arm(self, when: float) -> None:
        self._armed = when
        if when != NEVER:
            self._timer(when, self.expire)

    def _fail_late(self, late: Sequence[Ticket], cause: DropCause) -> None:
        if late:
            with self._lock:
                self._shard.record_drop(cause, len(late))
            for ticket in late:
                ticket.is_settled = True
                self._drop(
                    [ticket], expired_error(ticket, self._name) if cause is DropCause.EXPIRED else hopeless_error(ticket, self._name)
                )
            self._release(len(late))

    def lose(self, instance: Instance, error: DeviceLost) -> None:
        """The instance runs nothing any more: it is given no batch from here on, and what is queued goes to the others. Whoever ran its
        last batch settles that first. Any thread; without effect the second time. With the last one gone what is queued stays so: the
        owner, who is told by `on_lost`, has it answered.
        """
        with self._lock:
            if instance in self._lost:
                return
            self._lost.add(instance)
            if instance in self._idle:
                self._idle.remove(instance)
            self._instances = max(self._instances - 1, 1)
            # It may have been the one that was to look again when a batch is due.
            helper = self._pop_helper()
        if helper is not None:
            helper.wake()
        if self._on_lost is not None:
            self._on_lost(instance, error)

    def stop_admitting(self, reason: HeadraceError, when_drained: Callable[[], None]) -> None:
        """Refuse new tickets with `reason`; run what is queued; call `when_drained` (from any thread) when the last is settled."""
        with self._lock:
            self._is_open = False
            self._closed_reason = reason
            self._when_drained = when_drained
            is_drained = self._unsettled == 0
            idle, self._idle = self._idle, []
        for instance in idle:
            instance.wake()
        if is_drained:
            self._report_drained()

    def hand_over(self, successor: Batcher) -> None:
        """Pass on what waits and is bound to no version; what runs already, and what asked for this version, stays."""
        with self._lock:
            tickets = self._queue.clear()
            for ticket in tickets:
                if ticket.is_bound:
                    self._queue.push(ticket)
            passed = [ticket for ticket in tickets if not ticket.is_bound]
        # Theirs before they are no longer ours: at no moment does nobody know of a ticket.
        successor._adopt(passed)
        self._release(len(passed))

    def _adopt(self, tickets: Sequence[Ticket]) -> None:
        """However full the queue is: they were admitted once."""
        with self._lock:
            for ticket in tickets:
                ticket.reply.cancel = self.cancel_reply
                self._queue.push(ticket)
            self._unsettled += len(tickets)
            has_idle = bool(self._idle)
            if self._queue.next_expiry() < self._armed:
                self._arm(self._queue.next_expiry())
        if tickets and has_idle:
            self._schedule(self._wake_one)

    def fail_queued(self, error: HeadraceError) -> int:
        """Answer everything still queued with `error`, when the grace to run it is over. Returns how many."""
        with self._lock:
            tickets = self._queue.clear()
            if tickets:
                self._shard.record_failure(FailureReason.OTHER, len(tickets))
        for ticket in tickets:
            ticket.is_settled = True
        if tickets:
            self._drop(tickets, error)
            self._release(len(tickets))
        return len(tickets)

    def _release(self, count: int) -> None:
        with self._lock:
            self._unsettled -= count
            is_drained = self._unsettled == 0 and not self._is_open
        if is_drained:
            self._report_drained()

    def _report_drained(self) -> None:
        with self._lock:
            callback, self._when_drained = self._when_drained, None
        if callback is not None:
            callback()


def deliver(tickets: Sequence[Ticket], answers: Sequence[Answer]) -> None:
    outlet = tickets[0].reply.outlet
    pairs = [(ticket.reply, answer) for ticket, answer in zip(tickets, answers, strict=True)]
    if len(pairs) == 1 or len({id(reply.outlet) for reply, _ in pairs}) == 1:
        outlet.deliver(pairs)
        return
    by_outlet: dict[int, tuple[Outlet, list[tuple[Reply, Answer]]]] = {}
    for pair in pairs:
        by_outlet.setdefault(id(pair[0].outlet), (pair[0].outlet, []))[1].append(pair)
    for other, group in by_outlet.values():
        other.deliver(group)


class _Running(NamedTuple):
    """`began`: when its instance had nothing else to do. `due`: no ticket of it is, before that."""

    began: float
    rows: int
    due: float
    instance: Instance


_SHORTEST = 1e-6
"""Seconds of a batch that took less than the clock can tell."""
