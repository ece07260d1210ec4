from __future__ import annotations

import os
import signal

from megatron_pbsd.stopping import STOP, StopRequest


def test_a_signal_asks(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest(tmp_path).listening() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_file_asks_once(tmp_path):
    """Also one that was there before the run listened: it may have been asked while it started."""
    (tmp_path / STOP).touch()
    with StopRequest(tmp_path).listening() as stop:
        assert stop
    with StopRequest(tmp_path).listening() as stop:
        assert not stop
        (tmp_path / STOP).touch()
        assert stop
    assert not (tmp_path / STOP).exists()
