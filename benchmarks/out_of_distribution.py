"""Does the disagreement of an ensemble tell digits that it has never seen, better than a member?

Members are trained on the digits 0 to 7 of 5,000 MNIST images. Then their uncertainty on test
images of 0 to 7 is compared with that on all images of 8 and 9: the area under the ROC curve by the
ensemble's total and epistemic uncertainty, and by the entropy of every single member. Nothing is
chosen by the result: epochs and learning rate are fixed, and the table has every seed in it.

    python -m benchmarks.out_of_distribution --json build/out_of_distribution.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono import Ensemble, Evaluation, evaluate, fit, optim
from unisono.commands.data import Split, load_mnist5k
from unisono.commands.machine import describe_machine
from unisono.commands.models import SimpleCNN, SimpleMLP

KNOWN: Final = 8  # digits below it are trained on
MODELS: Final[Mapping[str, tuple[Callable[[], nn.Module], int]]] = {  # and epochs
    "MLP": (lambda: SimpleMLP(classes=KNOWN), 20),
    "CNN": (lambda: SimpleCNN(classes=KNOWN), 10),
}
BY: Final = ("total", "epistemic")
Data = tuple[Tensor, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, and print the table."""
    options = _parser().parse_args(argv)
    train, inside, outside = _data(load_mnist5k(), rows=64 if options.tiny else None)
    machine = describe_machine(torch.device("cpu")) | {"threads": torch.get_num_threads()}
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    print(
        f"{options.members} members, {len(train[1])} training images of 0 to {KNOWN - 1};"
        f" {len(inside[1])} test images of them against {len(outside)} of {KNOWN} to 9\n"
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (make, epochs) in MODELS.items():
        for seed in range(1 if options.tiny else options.seeds):
            start = time.perf_counter()
            evaluation = _run(
                make, train, inside, outside, options.members, 1 if options.tiny else epochs, seed
            )
            row = _row(evaluation) | {"seed": seed, "seconds": time.perf_counter() - start}
            found.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: " + _line(row), flush=True)
    print("\n" + _table(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        plain = {"machine": machine, "members": options.members, "models": found}
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    return 0


def _data(split: Split, rows: int | None) -> tuple[Data, Data, Tensor]:
    """Known digits to train on, known ones to test on, and unknown ones, all that there are."""
    known, tested = split.train_labels < KNOWN, split.test_labels < KNOWN
    outside = torch.cat([split.train_images[~known], split.test_images[~tested]])
    return (
        (split.train_images[known][:rows], split.train_labels[known][:rows]),
        (split.test_images[tested][:rows], split.test_labels[tested][:rows]),
        outside[:rows],
    )


def _run(
    make: Callable[[], nn.Module],
    train: Data,
    inside: Data,
    outside: Tensor,
    members: int,
    epochs: int,
    seed: int,
) -> Evaluation:
    ens = Ensemble.build(make, members, seed=1000 * seed, strategy="fused")
    fit(
        ens,
        train,
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=1e-3),
        epochs=epochs,
        sampling="shuffled",
        seed=seed,
        progress=False,
    )
    return evaluate(ens, inside, task="classification", out_of_distribution=outside)


def _row(evaluation: Evaluation) -> dict[str, Any]:
    outside = evaluation.out_of_distribution
    assert outside is not None
    assert outside.members is not None
    return {
        "accuracy": evaluation.combined["accuracy"],
        "member_accuracy": float(evaluation.members["accuracy"].mean()),
        "members": outside.members.tolist(),
        **{name: outside.auroc[name] for name in BY},
    }


def _line(row: Mapping[str, Any]) -> str:
    members = row["members"]
    return (
        f"epistemic {row['epistemic']:.4f}, total {row['total']:.4f}, one member's entropy "
        f"{np.mean(members):.4f} (best {max(members):.4f}); {row['seconds']:.1f} s"
    )


def _table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """AUROC, mean and standard deviation over the seeds."""
    head = ("model", "accuracy on 0-7: member", "ensemble", "AUROC: one member, mean")
    head += ("best member", "total", "epistemic", "epistemic above the best member")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, rows in found.items():
        beaten = sum(row["epistemic"] > max(row["members"]) for row in rows)
        cells = [
            f"{np.mean([row['member_accuracy'] for row in rows]):.4f}",
            f"{np.mean([row['accuracy'] for row in rows]):.4f}",
            _spread([float(np.mean(row["members"])) for row in rows]),
            _spread([max(row["members"]) for row in rows]),
            _spread([row["total"] for row in rows]),
            _spread([row["epistemic"] for row in rows]),
            f"{beaten} of {len(rows)} seeds",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.out_of_distribution", description=__doc__
    )
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="few images, one epoch, one seed")
    parser.add_argument("--json", type=Path, help="write all numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
