"""A step is one process's at a time, whoever dies, sleeps or comes late."""

import multiprocessing
import os
import time

import pytest

from llm_jax.checkpoint.claims import Claims

SHORT = 0.5


def age(claims, seconds):
    """Makes every claim as old as that."""
    for path in claims.folder.iterdir():
        then = time.time() - seconds
        os.utime(path, (then, then))


def test_one_has_it_until_it_is_given_free(tmp_path):
    first, second = Claims(tmp_path, "a"), Claims(tmp_path, "b")
    claim = first.take(5)
    assert claim.is_mine()
    assert second.take(5) is None
    assert second.holder(5) == "a"
    assert second.take(6) is not None
    with claim.held():
        assert second.take(5) is None
    assert second.holder(5) is None
    assert second.take(5) is not None


def test_a_dead_one_is_taken_over_and_a_slow_one_notices(tmp_path):
    first, second, third = (Claims(tmp_path, name) for name in "abc")
    slow = first.take(5)
    age(first, 1000)
    assert second.holder(5) is None
    new = second.take(5)
    assert new is not None
    assert not slow.is_mine()
    assert third.take(5) is None
    with slow.held():  # it does not give free what is another's
        pass
    assert new.is_mine()
    with new.held():
        pass
    assert not slow.is_mine()  # nor does the old claim come to life again
    assert list(first.folder.iterdir()) == []


def test_who_beats_lives(tmp_path):
    first, second = (Claims(tmp_path, name, patience=SHORT) for name in "ab")
    with first.take(1).held() as claim:
        until = time.monotonic() + 4 * SHORT
        while time.monotonic() < until:
            assert second.take(1) is None
            time.sleep(SHORT / 20)
        assert claim.is_mine()


def test_claims_of_what_is_gone_are_forgotten(tmp_path):
    claims = Claims(tmp_path, "a")
    for step in (1, 2, 3):
        claims.take(step)
    claims.forget([2])
    assert [path.name for path in claims.folder.iterdir()] == ["2.0"]
    Claims(tmp_path / "nowhere", "a").forget([1])


def race(folder, barrier, won):
    claims = Claims(folder, f"process {os.getpid()}")
    for step in range(40):
        barrier.wait()
        if claims.take(step) is not None:
            won.put(step)


@pytest.mark.parametrize("dead", [False, True], ids=["new", "dead"])
def test_of_many_one_wins_each(tmp_path, dead):
    claims = Claims(tmp_path, "dead")
    if dead:
        for step in range(40):
            claims.take(step)
        age(claims, 1000)
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path, barrier, won)) for _ in range(4)]
    for process in processes:
        process.start()
    winners = sorted(won.get(timeout=60) for _ in range(40))
    for process in processes:
        process.join()
    assert winners == list(range(40))
    assert won.empty()
