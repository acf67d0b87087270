from __future__ import annotations

import random

import pytest
from headrace.batching.batch_queue import NEVER, PATIENCE, BatchQueue
from headrace.requests import Answer, Outlet, Reply, Ticket


class Sink:
    def deliver(self, answers: list[tuple[Reply, Answer]]) -> None:
        raise AssertionError("the pure queue never delivers")


SINK: Outlet = Sink()  # type: ignore[assignment]


def ticket(rows: int = 1, key: object = (), priority: int = 0, expires: float = NEVER, id: str = "") -> Ticket:
    return Ticket(Reply(SINK), rows, key, (), (), id=id, priority=priority, expires=expires)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("seed", range(40))
def test_random_walk_every_ticket_leaves_once_and_in_order(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    queue = BatchQueue(limit=rng.choice([1, 4, 8]), max_queue_rows=0)
    waiting: list[Ticket] = []
    left: list[Ticket] = []
    now = 0.0
    for _ in range(400):
        now += rng.random()
        action = rng.random()
        if action < 0.5:
            expires = now + rng.random() * 8 if rng.random() < 0.4 else NEVER
            new = ticket(rng.randint(1, 4), rng.choice("xyz"), rng.randint(0, 2), expires)
            new.enqueued = now
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
        else:
            batch = queue.take()
            assert bool(batch) == bool(waiting)
            if batch:
                urgency = [(t.priority, min(t.expires, t.enqueued + PATIENCE)) for t in waiting]
                assert urgency[waiting.index(batch[0])] == min(urgency)
                assert len({t.key for t in batch}) == 1
                assert len(batch) == 1 or sum(t.rows for t in batch) <= queue.limit
            waiting = [t for t in waiting if t not in batch]
            left += batch
        assert queue.rows == sum(t.rows for t in waiting)
        assert queue.requests == len(waiting)
    left += queue.clear()
    assert len(left) == len(set(map(id, left)))
    assert queue.requests == 0
