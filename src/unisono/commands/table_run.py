"""The files of a run on a table."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from unisono.commands.machine import package_versions
from unisono.commands.plain_preprocessing import pack_plain, to_plain
from unisono.commands.preprocessing import to_skops
from unisono.commands.run_folder import (
    CURVES,
    METRICS,
    MODEL,
    PIPELINE,
    PLAN,
    PREPROCESSING,
    TEST_OUTPUTS,
    TEST_TABLE,
    Description,
    TestOutputs,
    pack,
    pack_outputs,
    to_json,
)
from unisono.commands.table_data import TableData
from unisono.commands.table_estimator import pack_estimator
from unisono.commands.table_files import to_parquet

_PLANNED: Final = 512  # rows of the call that the plan is of


def table_run(
    model: str,
    target: str,
    data: TableData,
    estimator: Any,
    outputs: Tensor,
    metrics: dict[str, Any],
    title: str,
) -> dict[str, bytes]:
    """Gather the files of a run on a table.

    Args:
        model: As on the command line.
        target: Name of the target's column.
        data: The table.
        estimator: The trained one.
        outputs: Of every member for the test rows.
        metrics: What ``metrics.json`` holds.
        title: Above the picture of the losses.

    Returns:
        File name -> content.

    Shape:
        - outputs: ``(N, B, outputs)``
    """
    config, tensors = pack_estimator(estimator)
    found = TestOutputs(
        outputs=outputs.float(),
        targets=torch.from_numpy(data.target.values[data.test]),
        rows=torch.from_numpy(data.test + 1),
    )
    description = Description(
        kind="table",
        task=metrics["task"],
        data=metrics["data"],
        classes=data.target.classes,
        target=target,
        columns=data.choice.columns,
        dropped=data.choice.dropped,
        model=model,
        estimator=config,
        versions=package_versions("torch", "numpy", "scikit-learn", "pyarrow", "skops"),
    )
    contents = {
        METRICS: to_json(metrics),
        MODEL: tensors,
        PREPROCESSING: pack_plain(to_plain(data.preprocessing, data.choice.columns)),
        PIPELINE: to_skops(data.preprocessing),
        TEST_OUTPUTS: pack_outputs(found),
        TEST_TABLE: to_parquet(data.test_table),
        PLAN: to_json(_plan(data, estimator)),
        CURVES: _curves(estimator.history_, title),
    }
    return pack(description, contents)


def _plan(data: TableData, estimator: Any) -> dict[str, Any]:
    parameter = next(estimator.ensemble_.parameters())
    rows = torch.from_numpy(data.features[:_PLANNED]).to(parameter)
    with torch.no_grad():
        plan: dict[str, Any] = estimator.ensemble_.explain(rows).to_dict()
    return plan


def _curves(history: Any, title: str) -> bytes:
    # Imported here: matplotlib is an extra, and `require` has made sure of it by now.
    from unisono.plots import learning_curves, to_png

    axes = learning_curves(history.loss, validation_loss=history.validation_loss, title=title)
    return to_png(axes)
