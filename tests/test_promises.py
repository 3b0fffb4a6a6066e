"""The page of promises names tests that exist, and the promises that no other file tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "| tests |" not in line]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_promise_has_a_test() -> None:
    assert len(ROWS) > 30
    assert [row for row in ROWS if "::test_" not in row] == []


def run(code: str) -> None:
    """Run code in a process of its own, where nothing of unisono has been called yet."""
    folders = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_plain_vmap_gives_the_same_bits_as_before() -> None:
    run(
        """
        from concurrent.futures import ThreadPoolExecutor
        import torch
        from neighbours import results_of_plain_vmap
        before = results_of_plain_vmap()
        assert all(map(torch.equal, before, results_of_plain_vmap()))
        from unisono import Ensemble
        inside = []

        class Asks(torch.nn.Module):  # another thread, while a call of ours runs
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(4, 2)

            def forward(self, x):
                with ThreadPoolExecutor() as pool:
                    inside.append(pool.submit(results_of_plain_vmap).result())
                return self.linear(x)

        for make in (lambda: torch.nn.Linear(4, 2), Asks):
            for strategy in ("fused", "vmap", "loop"):
                ens = Ensemble([make() for _ in range(3)], strategy=strategy)
                ens(torch.randn(5, 4)).sum().backward()
        assert all(map(torch.equal, before, results_of_plain_vmap()))
        assert len(inside) == 5
        for results in inside:
            assert all(map(torch.equal, before, results))
        """
    )


def test_building_an_ensemble_registers_nothing() -> None:
    run(
        """
        import torch
        key = "FuncTorchDynamicLayerFrontMode"
        before = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        from unisono import Ensemble
        ens = Ensemble([torch.nn.Linear(4, 2) for _ in range(3)])
        ens.state_dict(), ens[1], repr(ens)
        assert torch._C._dispatch_get_registrations_for_dispatch_key(key) == before
        ens(torch.randn(5, 4))
        assert torch._C._dispatch_get_registrations_for_dispatch_key(key) != before
        """
    )
