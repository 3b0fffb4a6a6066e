"""Settings of the tests of the commands."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only wait for each other's threads, the longer the busier the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
