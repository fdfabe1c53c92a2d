"""The watch of the ranks over each other: who is named as missing, and who only has much to do."""

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from involution.engine import peers


class Watched(peers.Peers):
    """Notes why it would leave."""

    words = ""

    def _leave(self, status: int, message: str) -> None:
        self.words = message
        self._done.set()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watched]]:
    monkeypatch.setattr(peers, "INTERVAL", 0.2)
    store = dist.HashStore()
    both = [Watched(rank, 2, store, timeout=1.0) for rank in range(2)]
    yield both
    for rank in both:
        rank.stop()


def test_ranks_that_stand_still_together_are_left_alone(ranks: list[Watched]) -> None:
    time.sleep(3)
    assert [rank.words for rank in ranks] == ["", ""]


def test_a_rank_that_is_behind_but_gets_on_is_waited_for(ranks: list[Watched]) -> None:
    ranks[0].progress = 100
    for _ in range(30):
        ranks[1].progress += 1
        time.sleep(0.1)
    assert [rank.words for rank in ranks] == ["", ""]


def test_a_rank_that_stops_behind_the_others_is_named(ranks: list[Watched]) -> None:
    ranks[0].progress = 1
    time.sleep(3)
    assert all("is busy with something else" in rank.words for rank in ranks)
    assert all("rank 1 on " in rank.words for rank in ranks)


def test_a_rank_that_no_longer_reports_is_named(ranks: list[Watched]) -> None:
    time.sleep(0.5)
    ranks[1].stop()
    time.sleep(3)
    assert "rank 1 on " in ranks[0].words
    assert "no longer reports" in ranks[0].words
