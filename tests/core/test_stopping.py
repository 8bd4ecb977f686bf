"""SIGTERM between and in steps."""

import os
import signal
import threading

import pytest

from rlattn.stopping import stoppable


def test_the_first_sigterm_asks_and_the_second_interrupts():
    said = []
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(said.append) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        assert "asked to stop" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_change_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stoppable(print) as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert seen == [(False, before)]
