"""The batcher under random walks: everything that can happen to a ticket, in every order, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
from headrace.batching.batch_queue import NEVER
from headrace.batching.batcher import PROBE_AFTER, Batcher
from headrace.batching.latency import LatencyTable
from headrace.config import BatchingConfig
from headrace.errors import BackendError, Cancelled, DeadlineExceeded, DeviceLost, HeadraceError, NotReady, QueueFull, QueueTimeout
from headrace.requests import Reply, Ticket
from headrace.telemetry.counters import DropCause, FailureReason, VersionCounters
from headrace.testing import CollectingOutlet

NOTHING: Mapping[int, float] = {}
LINEAR = {1: 0.5, 2: 0.6, 4: 0.8, 8: 1.2}


class World:
    """A batcher with a clock and a timer that the test turns by hand."""

    def __init__(self, batch_limit: int = 8, seconds: Mapping[int, float] = NOTHING, **config: object) -> None:
        self.now = 0.0
        self.timer: tuple[float, Callable[[], None]] | None = None
        self.outlet = CollectingOutlet()
        self.counters = VersionCounters()
        self.batcher = Batcher(
            "m:1",
            BatchingConfig(**config),  # type: ignore[arg-type]
            latencies=LatencyTable(seconds, batch_limit),
            clock=lambda: self.now,
            timer=self.set_timer,
            shard=self.counters.shard(),
            on_lost=lambda instance, error: self.lost.append(instance),
        )
        self.lost: list[object] = []

    def set_timer(self, when: float, callback: Callable[[], None]) -> None:
        self.timer = (when, callback)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self.timer is not None and self.timer[0] <= self.now:
            _, callback = self.timer
            self.timer = None
            callback()

    def submit(
        self,
        id: str,
        rows: int = 1,
        key: object = (),
        expires: float = NEVER,
        deadline: float | None = None,
        answer_by: float = NEVER,
    ) -> Ticket:
        reply = Reply(self.outlet, deadline)
        expires = min(expires, answer_by)
        ticket = Ticket(reply, rows, key, (), (), id=id, expires=expires, answer_by=answer_by)  # type: ignore[arg-type]
        self.batcher.submit(ticket)
        return ticket


class FakeInstance:
    def __init__(self) -> None:
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1


def test_cancelled_request_does_not_disturb_batch_mates() -> None:
    world = World()
    a, b, c = (world.submit(id) for id in "abc")
    assert world.batcher.cancel(b)
    tickets, _ = world.batcher.take(FakeInstance())
    world.batcher.settle(tickets, [ticket.id.encode() for ticket in tickets])
    assert world.outlet.answers[a.reply] == b"a"
    assert isinstance(world.outlet.answers[b.reply], Cancelled)
    assert world.outlet.answers[c.reply] == b"c"


def test_a_ticket_cancelled_while_it_runs_is_answered_once_by_its_batch() -> None:
    world = World()
    ticket = world.submit("a")
    tickets, _ = world.batcher.take(FakeInstance())
    assert not world.batcher.cancel(ticket)
    world.batcher.settle(tickets, [b"a"])
    assert world.outlet.answers == {ticket.reply: b"a"}


def test_expired_ticket_is_answered_by_the_timer_while_every_instance_is_busy() -> None:
    world = World()
    ticket = world.submit("a", expires=1.0)
    world.advance(0.9)
    assert not world.outlet.answers
    world.advance(0.2)
    assert isinstance(world.outlet.answers[ticket.reply], QueueTimeout)


def test_a_passed_grpc_deadline_is_deadline_exceeded_and_refused_at_the_door() -> None:
    world = World()
    world.advance(5)
    with pytest.raises(DeadlineExceeded):
        world.submit("late", expires=4.0, deadline=4.0)
    assert world.batcher.unsettled == 0


def test_full_queue_refuses_at_once_and_says_how_full() -> None:
    world = World(max_queue_size=2)
    world.submit("a")
    world.submit("b")
    with pytest.raises(QueueFull, match="2 of 2 rows"):
        world.submit("c")
    assert world.counters.snapshot().failures[FailureReason.REJECTED] == 1


def test_max_queue_delay_holds_a_batch_until_it_is_full_or_old_enough() -> None:
    world = World(batch_limit=2, max_queue_delay=0.5)
    instance = FakeInstance()
    world.submit("a")
    tickets, until = world.batcher.take(instance)
    assert (tickets, until) == ([], 0.5)
    world.submit("b")
    assert instance.wakes == 1
    assert len(world.batcher.take(instance)[0]) == 2
    world.submit("c")
    world.advance(0.5)
    assert len(world.batcher.take(instance)[0]) == 1
    assert world.counters.snapshot().dispatches == (1, 0, 1)


def test_a_request_that_would_expire_within_the_queue_delay_runs_at_once() -> None:
    world = World(batch_limit=8, max_queue_delay=0.5)
    world.submit("patient")
    world.submit("hurried", expires=0.1)
    assert len(world.batcher.take(FakeInstance())[0]) == 2


def test_a_second_idle_instance_is_woken_when_one_batch_does_not_hold_all() -> None:
    world = World(batch_limit=1)
    first, second = FakeInstance(), FakeInstance()
    world.batcher.take(second)
    world.batcher.take(first)
    world.submit("a")
    world.submit("b")
    assert first.wakes + second.wakes == 2


def test_draining_refuses_new_runs_old_and_reports_once() -> None:
    world = World()
    ticket = world.submit("a")
    drained: list[bool] = []
    world.batcher.stop_admitting(NotReady("gone"), lambda: drained.append(True))
    with pytest.raises(NotReady, match="gone"):
        world.submit("b")
    assert drained == []
    tickets, _ = world.batcher.take(FakeInstance())
    world.batcher.settle(tickets, [b"a"])
    assert world.outlet.answers == {ticket.reply: b"a"}
    assert drained == [True]


def test_refusals_while_draining_do_not_pile_up_in_one_exception() -> None:
    world = World()
    world.batcher.stop_admitting(NotReady("gone"), lambda: None)
    depths = []
    for _ in range(5):
        with pytest.raises(NotReady) as caught:
            world.submit("late")
        depths.append(len(caught.traceback))
    assert depths == depths[:1] * 5


def busy(world: World) -> list[Ticket]:
    """The only instance runs a batch of one row."""
    world.submit("running")
    tickets, _ = world.batcher.take(FakeInstance())
    return tickets


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_says_why() -> None:
    world = World(seconds=LINEAR)
    busy(world)
    with pytest.raises(QueueTimeout, match="expected within 700 ms, foreseen in 1"):
        world.submit("slow", answer_by=0.7)
    with pytest.raises(DeadlineExceeded, match="cannot be answered in time by m:1"):
        world.submit("slow", deadline=0.7, answer_by=0.7)
    assert world.batcher.pending_requests == 0
    assert world.counters.snapshot().drops[DropCause.REFUSED] == 2
    assert world.counters.snapshot().failures[FailureReason.REJECTED] == 2


def test_a_request_that_need_only_start_in_time_is_not_refused_for_how_long_it_takes() -> None:
    world = World(seconds=LINEAR)
    world.submit("short", expires=0.1)
    busy(world)
    with pytest.raises(QueueTimeout, match="cannot be started in time"):
        world.submit("late", expires=0.1)


def test_requests_without_a_deadline_are_queued_however_long_it_takes() -> None:
    world = World(seconds=LINEAR)
    busy(world)
    for number in range(1000):
        world.submit(str(number))
    assert world.batcher.pending_requests == 1000


def test_what_batches_take_is_learnt_and_failed_ones_teach_nothing() -> None:
    world = World(seconds=LINEAR)
    for answer in (BackendError("boom"), b""):
        before = world.batcher.latencies.mean(1)
        tickets = busy(world)
        world.advance(2.0)
        world.batcher.settle(tickets, [answer])
        assert (world.batcher.latencies.mean(1) > 1.2 * before) == (answer == b"")


def test_refusals_end_by_themselves_when_the_model_is_fast_again() -> None:
    world = World(seconds=LINEAR)
    for _ in range(5):
        tickets = busy(world)
        world.advance(4.0)
        world.batcher.settle(tickets, [b""])
    for _ in range(2):
        with pytest.raises(QueueTimeout):
            world.submit("fair", answer_by=world.now + 1.0)
    world.advance(PROBE_AFTER + 0.1)
    world.submit("fair", answer_by=world.now + 1.0)


def test_a_deadline_shorter_than_the_model_ever_was_is_never_tried() -> None:
    world = World(seconds=LINEAR)
    for _ in range(5):
        with pytest.raises(QueueTimeout):
            world.submit("vain", answer_by=world.now + 0.1)
        world.advance(2 * PROBE_AFTER)


def test_what_became_hopeless_in_the_queue_is_answered_and_does_not_hold_up_the_rest() -> None:
    world = World(seconds=LINEAR)
    running = busy(world)
    hopeless, other = world.submit("hopeless", answer_by=1.5), world.submit("other")
    world.advance(1.2)
    world.batcher.settle(running, [b""])
    assert world.batcher.take(FakeInstance())[0] == [other]
    assert isinstance(world.outlet.answers[hopeless.reply], QueueTimeout)
    assert world.counters.snapshot().drops[DropCause.HOPELESS] == 1


def test_answers_after_their_deadline_are_given_and_counted() -> None:
    world = World(seconds=LINEAR)
    late = world.submit("late", answer_by=0.7)
    tickets, _ = world.batcher.take(FakeInstance())
    world.advance(0.8)
    world.batcher.settle(tickets, [b"answer"])
    assert world.outlet.answers[late.reply] == b"answer"
    assert world.counters.snapshot().drops[DropCause.LATE] == 1


def test_the_queue_delay_ends_when_another_request_could_no_longer_join_in_time() -> None:
    world = World(seconds=LINEAR, max_queue_delay=10.0)
    world.submit("due", answer_by=3.0)
    _, until = world.batcher.take(FakeInstance())
    assert until == pytest.approx(3.0 - world.batcher.latencies.upper(2), abs=0.01)


GONE = DeviceLost("cuda:0: unspecified launch failure")


def test_a_lost_instance_gets_no_more_and_what_waits_goes_to_the_others() -> None:
    world = World(batch_limit=1)
    lost, other = FakeInstance(), FakeInstance()
    world.submit("fails")
    failed, _ = world.batcher.take(lost)
    waiting = world.submit("waits")
    world.batcher.settle(failed, [GONE])
    world.batcher.lose(lost, GONE)
    world.batcher.lose(lost, GONE)
    assert world.batcher.take(lost) == ([], NEVER)
    assert world.batcher.take(other)[0] == [waiting]
    assert world.lost == [lost]


def test_an_idle_instance_that_is_lost_is_not_woken_and_passes_a_wake_on_that_it_was_given_before() -> None:
    world = World(batch_limit=1)
    idle, woken, other = FakeInstance(), FakeInstance(), FakeInstance()
    for instance in (other, woken, idle):
        world.batcher.take(instance)
    world.batcher.lose(idle, GONE)
    waiting = world.submit("waits")
    assert (idle.wakes, woken.wakes, other.wakes) == (0, 1, 0)
    world.batcher.lose(woken, GONE)
    assert other.wakes == 1
    assert world.batcher.take(woken) == ([], NEVER)
    assert world.batcher.take(other)[0] == [waiting]


def test_the_one_that_was_to_look_again_is_lost_and_another_looks_in_its_place() -> None:
    world = World(max_queue_delay=0.5)
    patient, other = FakeInstance(), FakeInstance()
    world.batcher.take(other)
    assert world.batcher.take(patient) == ([], NEVER)
    world.submit("a")
    assert world.batcher.take(patient) == ([], 0.5)
    world.batcher.lose(patient, GONE)
    assert other.wakes == 1
    assert world.batcher.take(other) == ([], 0.5)


def busy_and_idle(world: World) -> tuple[FakeInstance, FakeInstance]:
    """One that runs a batch and could take another, put on the idle list after one that runs nothing."""
    idle, busy = FakeInstance(), FakeInstance()
    world.submit("first")
    assert world.batcher.take(busy)[0]
    for instance in (idle, busy):
        assert world.batcher.take(instance, lead=0.1) == ([], NEVER)
    return busy, idle


def test_one_that_runs_nothing_is_woken_before_one_that_would_have_to_wait_for_what_it_runs() -> None:
    world = World(seconds=LINEAR)
    busy, idle = busy_and_idle(world)
    second = world.submit("second")
    assert (busy.wakes, idle.wakes) == (0, 1)
    assert world.batcher.take(idle, lead=0.1)[0] == [second]


def test_a_busy_one_that_looks_passes_what_it_must_wait_for_to_one_that_runs_nothing() -> None:
    world = World(seconds=LINEAR)
    busy, idle = busy_and_idle(world)
    second = world.submit("second")
    assert world.batcher.take(busy, lead=0.1) == ([], pytest.approx(0.4, abs=0.001))
    assert idle.wakes == 1
    assert world.batcher.take(idle, lead=0.1)[0] == [second]


def test_one_that_waits_for_what_it_runs_is_not_woken_again_before_there_is_a_full_batch() -> None:
    world = World(batch_limit=8, seconds=LINEAR)
    busy = FakeInstance()
    world.submit("first")
    world.batcher.take(busy)
    world.batcher.take(busy, lead=0.1)
    world.submit("second")
    assert busy.wakes == 1
    assert world.batcher.take(busy, lead=0.1) == ([], pytest.approx(0.4, abs=0.001))
    for number in range(6):
        world.submit(f"more {number}")
    assert busy.wakes == 1
    world.submit("the one that fills it")
    assert busy.wakes == 2
    assert len(world.batcher.take(busy, lead=0.1)[0]) == 8


def test_deadlines_are_foreseen_for_the_instances_that_are_left() -> None:
    world = World(batch_limit=1, seconds={1: 0.5})
    instances = [FakeInstance() for _ in range(2)]
    running = []
    for instance in instances:
        world.submit("running")
        running.append(world.batcher.take(instance)[0])
    world.submit("second of two in the queue", answer_by=1.3)
    world.submit("in time while there are two", answer_by=1.3)
    world.batcher.settle(running[0], [GONE])
    world.batcher.lose(instances[0], GONE)
    with pytest.raises(QueueTimeout, match="cannot be answered in time"):
        world.submit("third of three for one instance", answer_by=1.9)


@pytest.mark.parametrize("seed", range(60))
def test_random_walk_every_ticket_is_settled_exactly_once_with_its_own_answer(seed: int) -> None:
    """Cancels, expiries, full queues, failing batches, several instances at work, some lost, and a shutdown at the end, in any order."""
    print("seed", seed)
    rng = random.Random(seed)
    world = World(
        batch_limit=rng.choice([1, 3, 8]),
        seconds=rng.choice([NOTHING, LINEAR]),
        max_queue_size=rng.choice([0, 12]),
        max_queue_delay=rng.choice([0.0, 0.3]),
    )
    admitted: dict[str, Ticket] = {}
    expected: dict[str, object] = {}
    running: list[tuple[FakeInstance, list[Ticket]]] = []
    instances = [FakeInstance() for _ in range(3)]
    lanes = rng.choice([1, 2])

    def submit() -> None:
        id = f"r{len(expected)}"
        expected[id] = None
        expires = world.now + rng.random() * 3 if rng.random() < 0.3 else NEVER
        answer_by = world.now + rng.random() * 4 if rng.random() < 0.3 else NEVER
        try:
            admitted[id] = world.submit(id, rng.randint(1, 3), rng.choice("xy"), expires, answer_by=answer_by)
        except (QueueFull, QueueTimeout, NotReady) as error:
            expected[id] = error

    def take() -> None:
        busy = [instance for instance, _ in running]
        free = [instance for instance in instances if busy.count(instance) < lanes]
        if free:
            instance = rng.choice(free)
            tickets, _ = world.batcher.take(instance, lead=rng.random())
            assert not (tickets and instance in world.lost)
            if tickets:
                running.append((instance, tickets))

    def finish() -> None:
        if running:
            _, tickets = running.pop(rng.randrange(len(running)))
            error = BackendError("boom") if rng.random() < 0.2 else None
            for ticket in tickets:
                expected[ticket.id] = error or ticket.id.encode()
            world.batcher.settle(tickets, [error or ticket.id.encode() for ticket in tickets])

    def lose() -> None:
        """Idle, or with a batch that is still to be settled: another instance of its device has told."""
        if len(world.lost) < rng.randint(0, len(instances)):
            world.batcher.lose(rng.choice(instances), GONE)

    def cancel() -> None:
        if admitted:
            ticket = rng.choice(list(admitted.values()))
            was_queued = not ticket.is_taken and not ticket.is_settled
            assert world.batcher.cancel(ticket) == was_queued

    for _ in range(500):
        rng.choices([submit, take, finish, cancel, lose, lambda: world.advance(rng.random())], [5, 3, 3, 1, 0.02, 1])[0]()
        assert world.batcher.unsettled == len(admitted) - len(world.outlet.answers)
    drained: list[bool] = []
    world.batcher.stop_admitting(NotReady("stopping"), lambda: drained.append(True))
    for _ in range(rng.randint(0, 10)):
        take()
    world.batcher.fail_queued(NotReady("grace is over"))
    while running:
        finish()
    assert drained == [True]
    assert set(world.outlet.answers) == {ticket.reply for ticket in admitted.values()}
    for id, ticket in admitted.items():
        answer = world.outlet.answers[ticket.reply]
        if expected[id] is None:
            assert isinstance(answer, (Cancelled, QueueTimeout, NotReady)), (id, answer)
        else:
            assert answer == expected[id], id
    assert all(isinstance(error, HeadraceError) for id, error in expected.items() if id not in admitted)
