"""Signals while it trains: the first one is remembered until the step is done, a second interrupt stops at once."""

import signal

import pytest

from involution.engine.errors import Preempted
from involution.engine.signals import REQUEUE, SIGNALS, StopRequest


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_counts_and_the_handlers_come_back(number, caplog):
    before = handlers()
    with StopRequest() as stop:
        assert stop.received is None
        for each in (number, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(each)
        assert stop.received == number.name
        assert stop.requeue == (number == REQUEUE)
    assert caplog.messages == [f"{number.name} received: finishing the step, then saving"]
    assert handlers() == before


def test_a_second_interrupt_stops_at_once():
    before = handlers()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
    assert handlers() == before


def test_who_leaves_with_the_state_saved_is_not_disturbed():
    before = handlers()
    try:
        with pytest.raises(Preempted), StopRequest():
            raise Preempted("stopped after step 1")
        assert handlers() == [signal.SIG_IGN] * len(SIGNALS)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
