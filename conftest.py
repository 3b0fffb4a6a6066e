"""What every test gets: the tests in tests/, the doctests in src/ and the blocks in Markdown files.

It lies at the root because pytest asks a conftest.py only about what lies beneath it.
"""

import random
import signal

import numpy as np
import pytest
import torch

from markdown_blocks import MarkdownFile

# The settings of Sphinx have no doctests; --doctest-modules would import them.
collect_ignore = ["docs/conf.py"]


def pytest_configure():
    """Make ctrl-C known again: what a shell starts in the background ignores it.

    The processes that tests start would inherit that, and those that are interrupted by a test
    would go on for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collect_file(file_path, parent):
    """Collect README.md and the pages in docs/; other Markdown files aren't published."""
    root = parent.config.rootpath
    if file_path == root / "README.md" or (
        file_path.suffix == ".md" and file_path.is_relative_to(root / "docs")
    ):
        return MarkdownFile.from_parent(parent, path=file_path)
    return None


@pytest.fixture(autouse=True)
def _seed():
    """Start each test and each doctest from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
