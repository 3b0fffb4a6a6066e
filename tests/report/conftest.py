"""Runs to report on, of every kind, with names that are markup."""

import numpy as np
import pytest
import torch

from unisono import Ensemble
from unisono.report import Run

SCRIPT = "<script>alert(1)</script>"
# Text of the user that must never become markup: by where it stands.
HOSTILE = {
    "class": f"{SCRIPT}class",
    "column": f"{SCRIPT}column",
    "value": f"{SCRIPT}value",
    "target": f"\"{SCRIPT}'target",
    "setting": f"{SCRIPT}setting",
    "name": f"{SCRIPT}name",
    "reason": f"{SCRIPT}reason",
}


@pytest.fixture(scope="session")
def hostile():
    return HOSTILE


@pytest.fixture(scope="session")
def plan():
    ens = Ensemble([torch.nn.Linear(3, 2) for _ in range(3)], strategy="fused")
    with torch.no_grad():
        return ens.explain(torch.zeros(4, 3)).to_dict()


@pytest.fixture(scope="session")
def make_run(plan):
    def make(task="classification", members=4, rows=60, outputs=None, **fields):
        generator = np.random.default_rng(0)
        loss = np.exp(-np.arange(5.0))[:, None] + generator.random((5, members))
        loss[3:, 0] = np.nan  # this member stopped early
        if task == "classification":
            targets = np.arange(rows) % 3
            own = generator.normal(size=(members, rows, 3)) + 2 * np.eye(3)[targets]
        else:
            targets = generator.normal(size=rows)
            mean = targets + 0.3 * generator.normal(size=(members, rows))
            own = np.stack([mean, np.full_like(mean, -2.0)], -1)
        given = {
            "name": HOSTILE["name"],
            "classes": (HOSTILE["class"], "B & C", "c") if task == "classification" else (),
            "settings": {"lr": [1e-3] * 99, "file": HOSTILE["setting"], "patience": None},
            "columns": [{"column": HOSTILE["column"], "used as": "number"}],
            "target": HOSTILE["target"],
            "targets": targets,
            "loss": loss,
            "validation_loss": loss + 0.1,
            "plan": {**plan, "reason": HOSTILE["reason"]},
        }
        found = own.astype(np.float32) if outputs is None else outputs
        return Run(task=task, outputs=found, rows=np.arange(rows) * 5, **given | fields)

    return make
