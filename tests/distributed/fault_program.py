"""One rank of a training that something happens to: the program that a user would write.

``FAULT`` in the environment is what happens to it, once in the life of a job: ``KIND:RANK:EPOCH``
with the kinds ``kill`` and ``stop`` in the middle of an epoch, ``write``, a kill while the
checkpoint of that epoch is written, and ``end``, a kill after the training. ``SECONDS`` is how long
ranks wait for each other, ``PAUSE`` how much longer an epoch takes, ``DATA`` how many replicas.
What came of it is in the file ``OUT/RANK``, the checkpoint in ``OUT/training``.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from unisono import Ensemble, distributed, files, fit, optim

MEMBERS, EPOCHS = 5, 12
OUT = Path(os.environ.get("OUT", ""))  # absent when pytest looks for doctests


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Fault:
    """Does to this process what ``FAULT`` says, once in the life of a job."""

    def __init__(self):
        self.kind, rank, epoch = os.environ.get("FAULT", "none:0:0").split(":")
        self.is_mine = rank == os.environ["RANK"]
        self.epoch, self.steps = int(epoch), 0

    def at_step(self):
        self.steps += 1
        if self.kind in ("kill", "stop") and self.steps == 4 * self.epoch + 2:
            self.strike(signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)

    def at_write(self):
        if self.kind == "write" and self.steps == 4 * (self.epoch + 1):
            self.strike(signal.SIGKILL)

    def strike(self, number):
        mark = OUT / "fault"
        if self.is_mine and not mark.exists():
            mark.write_text(str(time.time()))
            os.kill(os.getpid(), number)


def main():
    fault = Fault()
    (OUT / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    timeout = timedelta(seconds=float(os.environ["SECONDS"]))
    mesh = distributed.make_mesh(data=int(os.environ.get("DATA", "1")), timeout=timeout)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator)
    y = x[:, :3].argmax(1)

    def loss(output, target):
        if torch.is_grad_enabled():  # not that of the validation
            fault.at_step()
        return F.cross_entropy(output, target)

    sync = files._sync

    def sync_with_fault(path):
        if path.name.endswith(".tmp"):  # written, and not yet in the place of the old one
            fault.at_write()
        sync(path)

    files._sync = sync_with_fault
    ens = Ensemble.build(make_model, MEMBERS, strategy="fused")
    optimizer = optim.Adam(ens, lr=[0.1, 0.03, 0.01, 0.003, 0.001])
    history = fit(
        ens,
        (x[:64], y[:64]),
        loss=loss,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        epochs=EPOCHS,
        batch_size=16,
        sampling="shuffled",
        validation=(x[64:], y[64:]),
        patience=3,
        checkpoint=OUT / "training",
        resume=True,
        callbacks=[lambda end: time.sleep(float(os.environ.get("PAUSE", "0")))],
        progress=False,
        mesh=mesh,
    )
    if fault.kind == "end":
        fault.strike(signal.SIGKILL)
    curves = {name: values for name, values in history.to_dict().items() if name != "seconds"}
    found = {"weights": ens.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    torch.save({**found, "curves": repr(curves)}, OUT / os.environ["RANK"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
