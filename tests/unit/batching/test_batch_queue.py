from __future__ import annotations

import random

import pytest
from headrace.batching.batch_queue import LEVEL, NEVER, PATIENCE, BatchQueue
from headrace.batching.latency import BATCH_OVERHEAD, LatencyTable
from headrace.requests import Answer, Outlet, Reply, Ticket


class Sink:
    def deliver(self, answers: list[tuple[Reply, Answer]]) -> None:
        raise AssertionError("the pure queue never delivers")


SINK: Outlet = Sink()  # type: ignore[assignment]


def ticket(rows: int = 1, key: object = (), priority: int = 0, expires: float = NEVER, id: str = "", answer_by: float = NEVER) -> Ticket:
    expires = min(expires, answer_by)
    return Ticket(Reply(SINK), rows, key, (), (), id=id, priority=priority, expires=expires, answer_by=answer_by)  # type: ignore[arg-type]


def table(*, is_stepped: bool = False) -> LatencyTable:
    """A second, and a tenth for each row."""
    seconds = {rows: 1.0 + 0.1 * rows - BATCH_OVERHEAD for rows in (1, 2, 4, 8, 16)}
    return LatencyTable(seconds, 16, is_stepped=is_stepped)


def push_all(queue: BatchQueue, *tickets: Ticket) -> None:
    for each in tickets:
        queue.push(each)


def test_takes_rows_up_to_the_limit_not_requests() -> None:
    queue = BatchQueue(limit=4)
    a, b, c = ticket(3), ticket(1), ticket(1)
    push_all(queue, a, b, c)
    assert queue.take() == [a, b]
    assert queue.take() == [c]
    assert queue.take() == []


def test_a_request_that_does_not_fit_waits_for_the_next_batch_and_is_not_overtaken() -> None:
    queue = BatchQueue(limit=4)
    a, big, c = ticket(3), ticket(4), ticket(1)
    push_all(queue, a, big, c)
    assert queue.take() == [a]
    assert queue.take() == [big]


def test_priority_comes_before_deadline_and_deadline_before_arrival() -> None:
    queue = BatchQueue(limit=1)
    late, soon, urgent, never = ticket(expires=0.9), ticket(expires=0.5), ticket(priority=-1, expires=20), ticket()
    push_all(queue, never, late, soon, urgent)
    assert [queue.take()[0] for _ in range(4)] == [urgent, soon, late, never]


@pytest.mark.parametrize("deadline", [0.3, 30.0])
def test_a_request_without_deadline_does_not_starve_beside_others_that_have_one(deadline: float) -> None:
    queue = BatchQueue(limit=1)
    patient = ticket()
    queue.push(patient)
    for step in range(1, 200):
        now = step * 0.01
        other = ticket(expires=now + deadline)
        other.enqueued = now
        queue.push(other)
        if queue.take() == [patient]:
            break
    assert patient.is_taken
    assert now <= PATIENCE


def test_a_low_priority_is_passed_over_for_a_while_and_no_longer() -> None:
    queue = BatchQueue(limit=1)
    low = ticket(priority=2)
    queue.push(low)
    for step in range(1, 1000):
        now = step * 0.01
        urgent = ticket(priority=1, expires=now + 30)
        urgent.enqueued = now
        queue.push(urgent)
        if queue.take() == [low]:
            break
    assert low.is_taken
    assert LEVEL - PATIENCE <= now <= LEVEL


def test_different_keys_never_share_a_batch() -> None:
    queue = BatchQueue(limit=8)
    a, b, c = ticket(key="x"), ticket(key="y"), ticket(key="x")
    push_all(queue, a, b, c)
    assert queue.take() == [a, c]
    assert queue.take() == [b]


def test_the_bound_counts_rows_and_an_empty_queue_takes_anything() -> None:
    queue = BatchQueue(limit=8, max_queue_rows=4)
    assert not queue.is_full_for(8)
    queue.push(ticket(3))
    assert queue.is_full_for(2)
    assert not queue.is_full_for(1)


def test_expire_takes_out_exactly_those_whose_time_has_passed() -> None:
    queue = BatchQueue(limit=8)
    a, b, c = ticket(expires=1), ticket(expires=2), ticket(expires=3)
    push_all(queue, c, a, b)
    assert queue.expire(2) == [a, b]
    assert queue.next_expiry() == 3
    assert queue.take() == [c]
    assert queue.next_expiry() == NEVER


def test_tickets_that_left_are_not_kept_until_their_far_deadline() -> None:
    queue = BatchQueue(limit=1)
    for number in range(10_000):
        queue.push(ticket(expires=1e9 + number))
        queue.take()
    assert len(queue._expiries) < 100


def test_remove_knows_a_taken_ticket_from_a_queued_one() -> None:
    queue = BatchQueue(limit=1)
    a, b = ticket(), ticket()
    push_all(queue, a, b)
    queue.take()
    assert not queue.remove(a)
    assert queue.remove(b)
    assert not queue.remove(b)
    assert (queue.rows, queue.requests) == (0, 0)


def test_is_batch_full_when_the_next_one_does_not_fit() -> None:
    queue = BatchQueue(limit=4)
    assert not queue.is_batch_full()
    queue.push(ticket(3))
    assert not queue.is_batch_full()
    queue.push(ticket(2))
    assert queue.is_batch_full()


def test_a_batch_is_no_larger_than_its_earliest_deadline_lets_it_be() -> None:
    queue = BatchQueue(limit=16)
    tickets = [ticket(answer_by=11.55 + 0.1 * number) for number in range(10)]
    push_all(queue, *tickets)
    assert queue.take(table(), now=10.0) == tickets[:5]
    assert queue.take(table(), now=10.0) == tickets[5:]


def test_a_deadline_behind_the_head_is_not_broken_by_joining_a_batch_that_takes_too_long() -> None:
    queue = BatchQueue(limit=16)
    first, hurried, last = ticket(priority=-1, rows=4), ticket(answer_by=1.2), ticket()
    push_all(queue, first, hurried, last)
    assert queue.take(table(), now=0.0) == [first]
    assert queue.take(table(), now=0.0) == [hurried, last]


def test_a_head_that_cannot_be_answered_in_time_is_dropped_while_others_wait() -> None:
    queue = BatchQueue(limit=16)
    hopeless, other = ticket(answer_by=0.9), ticket(answer_by=5)
    push_all(queue, hopeless, other)
    assert queue.drop_late(table(), now=0.0) == [hopeless]
    assert queue.drop_late(table(), now=4.5) == []
    assert queue.take(table(), now=4.5) == [other]


def test_heads_that_keep_the_batch_below_what_keeps_up_are_dropped() -> None:
    queue = BatchQueue(limit=16)
    hurried, others = [ticket(answer_by=1.15) for _ in range(2)], [ticket(answer_by=5) for _ in range(8)]
    push_all(queue, *hurried, *others)
    assert queue.drop_late(table(), now=0.0, sustaining=1) == []
    assert queue.drop_late(table(), now=0.0, sustaining=8) == hurried
    assert queue.take(table(), now=0.0) == others


def test_of_restricted_batch_sizes_the_smaller_is_run_where_padding_costs_more() -> None:
    queue = BatchQueue(limit=16)
    push_all(queue, *[ticket() for _ in range(9)])
    assert len(queue.take(table(is_stepped=True))) == 8
    push_all(queue, *[ticket() for _ in range(14)])
    assert len(queue.take(table(is_stepped=True))) == 15


def test_rows_ahead_are_those_that_are_more_urgent() -> None:
    queue = BatchQueue(limit=16)
    push_all(queue, *[ticket(expires=0.1 * number) for number in range(1, 9)], ticket(key="other", expires=0.05))
    assert queue.rows_ahead(ticket(expires=0.35)) == 4
    assert queue.rows_ahead(ticket(priority=-1)) == 0
    assert queue.rows_ahead(ticket()) == 9


@pytest.mark.parametrize("seed", range(40))
def test_random_walk_every_ticket_leaves_once_and_in_order(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    queue = BatchQueue(limit=rng.choice([1, 4, 8]), max_queue_rows=0)
    known = rng.choice([None, table(), table(is_stepped=True)])
    pushed = 0
    waiting: list[Ticket] = []
    left: list[Ticket] = []
    now = 0.0
    for _ in range(400):
        now += rng.random()
        action = rng.random()
        if action < 0.5:
            expires = now + rng.random() * 8 if rng.random() < 0.4 else NEVER
            answer_by = now + rng.random() * 8 if rng.random() < 0.4 else NEVER
            new = ticket(rng.randint(1, 4), rng.choice("xyz"), rng.randint(0, 2), expires, answer_by=answer_by)
            new.enqueued = now
            pushed += new.rows
            queue.push(new)
            waiting.append(new)
        elif action < 0.65 and waiting:
            victim = rng.choice(waiting)
            assert queue.remove(victim)
            waiting.remove(victim)
            left.append(victim)
        elif action < 0.8:
            gone = queue.expire(now)
            assert set(gone) == {t for t in waiting if t.expires <= now}
            waiting = [t for t in waiting if t not in gone]
            left += gone
        elif action < 0.85 and known is not None:
            dropped = queue.drop_late(known, now, rng.randint(1, 8))
            assert not dropped or len(dropped) < len(waiting)
            waiting = [t for t in waiting if t not in dropped]
            left += dropped
        else:
            batch = queue.take(known, now)
            assert bool(batch) == bool(waiting)
            if batch:
                urgency = [t.priority * LEVEL + min(t.expires, t.enqueued + PATIENCE) for t in waiting]
                assert urgency[waiting.index(batch[0])] == min(urgency)
                assert len({t.key for t in batch}) == 1
                assert len(batch) == 1 or sum(t.rows for t in batch) <= queue.limit
            waiting = [t for t in waiting if t not in batch]
            left += batch
        assert queue.rows == sum(t.rows for t in waiting)
        assert queue.rows + queue.left_rows == pushed
        assert queue.requests == len(waiting)
    left += queue.clear()
    assert len(left) == len(set(map(id, left)))
    assert queue.requests == 0
