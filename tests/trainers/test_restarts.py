"""How often a run is started again, and from where; the real thing is in test_end_to_end.py."""

import pytest

from rlattn.console import Console
from rlattn.rollout.cluster import ActorError, ActorLost
from rlattn.trainers.checkpoint import Checkpoints
from rlattn.trainers.run import keep_going


@pytest.fixture
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr("rlattn.trainers.run.time.sleep", waits.append)
    return waits


def attempts(tmp_path, outcomes, max_restarts=2):
    """What each attempt was started from; an outcome is (step saved or None, error raised after that or None)."""
    checkpoints, seen, left = Checkpoints(tmp_path, 5), [], iter(outcomes)

    def attempt(checkpoint, started):
        seen.append(checkpoint.name if checkpoint else None)
        saved, error = next(left)
        started()
        if saved is not None:
            checkpoints.save(saved, {}, lambda folder: None)
        if error:
            raise error

    try:
        keep_going(attempt, checkpoints, None, max_restarts, Console())
    finally:
        attempts.seen = seen
    return seen


LOST = ActorLost("update: policy rank 1 died:\n  killed")


def test_goes_on_from_the_newest_checkpoint(tmp_path, no_waiting):
    assert attempts(tmp_path, [(None, LOST), (1, LOST), (3, LOST), (None, None)]) == [None, None, "step-1", "step-3"]
    assert no_waiting == [1, 1, 1]  # each loss but the first came after a new checkpoint


def test_gives_up_where_nothing_new_is_saved(tmp_path, no_waiting):
    with pytest.raises(ActorLost, match="policy rank 1 died"):
        attempts(tmp_path, [(1, LOST), (None, LOST), (None, LOST), (None, None)])
    assert attempts.seen == [None, "step-1", "step-1"]
    assert no_waiting == [1, 2]


def test_errors_of_the_code_are_not_tried_again(tmp_path, no_waiting):
    with pytest.raises(ActorError, match="out of memory"):
        attempts(tmp_path, [(1, ActorError("score: policy rank 0 failed:\n  out of memory")), (None, None)])
    assert attempts.seen == [None]


def test_what_cannot_start_is_not_tried_again(tmp_path, no_waiting):
    def attempt(checkpoint, started):
        raise LOST

    with pytest.raises(ActorLost):
        keep_going(attempt, Checkpoints(tmp_path, 5), None, 2, Console())
    assert no_waiting == []
