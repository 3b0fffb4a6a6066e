"""Fixtures of the tests of stored files."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture
def in_time():
    """A file that is waited for, or read without end, is an error, and the next test runs."""

    def late(*_):
        raise TimeoutError("still reading after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
