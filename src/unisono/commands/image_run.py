"""What a run on images keeps for later commands, beside its scores and pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from unisono.commands.data import Split
from unisono.commands.learning import Trained
from unisono.commands.machine import package_versions
from unisono.commands.outcome import CommandError
from unisono.commands.run_folder import (
    ENSEMBLE,
    PLAN,
    TEST_OUTPUTS,
    Description,
    TestOutputs,
    pack,
    pack_outputs,
    to_json,
)
from unisono.ensemble import Ensemble

_PLANNED: Final = 64  # images of the call that the plan is of


def image_run(
    data: str, model: str, split: Split, trained: Trained, contents: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Complete the files of a run on images.

    Args:
        data: Name of the set of images.
        model: As on the command line.
        split: The images.
        trained: What the training left.
        contents: File name -> content of scores and pictures.

    Returns:
        All files of the run, with the ensemble, the members' logits and the images of the test.
    """
    outputs = TestOutputs(
        outputs=trained.logits.float(),
        targets=split.test_labels,
        rows=torch.arange(len(split.test_labels)),
        inputs=(split.test_images * 255).round().to(torch.uint8),
    )
    device = next(trained.ensemble.parameters()).device
    with torch.no_grad():
        plan = trained.ensemble.explain(split.test_images[:_PLANNED].to(device))
    description = Description(
        kind="images",
        task="classification",
        data=data,
        classes=tuple(range(split.classes)),
        model=model,
        image_shape=split.image_shape,
        versions=package_versions("torch", "numpy"),
    )
    more = {
        ENSEMBLE: _content(trained.ensemble),
        TEST_OUTPUTS: pack_outputs(outputs),
        PLAN: to_json(plan.to_dict()),
    }
    return pack(description, {**contents, **more})


def _content(ensemble: Ensemble) -> bytes:
    """What `Ensemble.save` writes: all files of a run are put in place together, at the end."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ENSEMBLE
            ensemble.save(path)
            return path.read_bytes()
    except OSError as error:
        raise CommandError(f"can't write {ENSEMBLE} for now: {error.strerror}") from error
