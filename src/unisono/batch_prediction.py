"""A run of ``unisono train`` as a callable for batches of rows, as Ray Data and the like take it.

Ray Data builds one in each of its actors and hands it batches::

    ray.data.read_parquet("rows").map_batches(Predictor, fn_constructor_args=["runs/people"])

``unisono predict`` is the same for files, without Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unisono import extras
from unisono.commands import columns, features, run_folder, run_model

Batch = Mapping[str, NDArray[Any]]


class Predictor:
    """Predicts batches of rows with their uncertainty, by the ensemble of a run.

    The run is loaded once, when the object is made. Nothing in it is executed. The results are
    those of ``unisono predict``, up to float rounding: which rows meet in a batch decides their
    last digits.

    Args:
        run: The folder that ``unisono train`` wrote, of a run on a table.
        keep: Columns of the batch to put before the results.
        unseen: ``"error"`` or ``"ignore"``: what to do with categories, and missing values in
            columns, that training never saw.
        model: The ``package.module:factory`` of the training, if it had one; it is imported.
        device: A name of a device; ``auto`` for CUDA where there is one.

    Raises:
        ValueError: If the run can't be used; the message says why.
        MissingExtraError: If pyarrow isn't installed, from the extra ``tables``.

    Shape:
        - batch: each column ``(B,)``; kept ones may have more axes
        - results: each column ``(B,)``

    Example:
        >>> Predictor("runs/none")
        Traceback (most recent call last):
        unisono.commands.outcome.ArgumentError: runs/none doesn't exist; give the folder that ...
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        keep: Sequence[str] = (),
        unseen: Literal["error", "ignore"] = "error",
        model: str | None = None,
        device: str = "auto",
    ) -> None:
        extras.require("pyarrow", extra="tables", purpose="Predictor")
        if unseen not in ("error", "ignore"):
            raise ValueError(f'Predictor: unseen is "error" or "ignore", got {unseen!r}')
        if isinstance(keep, str):
            raise ValueError(f"Predictor: keep is a sequence of names, got {keep!r}")
        folder = run_folder.RunFolder(Path(run))
        run_model.open_run(folder)
        self._keep = tuple(dict.fromkeys(keep))
        self._refuse = unseen == "error"
        self._loaded = run_model.load_model(folder, model, device)
        self._names = self._loaded.model.schema(self._loaded.example).names
        both = [name for name in self._keep if name in self._names]
        if both:
            raise ValueError(
                f"Predictor: keep has names of results: {columns.list_names(both)}; rename the "
                "columns"
            )

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Predict the rows of a batch.

        Args:
            batch: Name -> values, with the columns of the training and those to keep; others
                are passed over. None and NaN are missing values.

        Returns:
            The kept columns as they are, then ``prediction``, for classes ``probability_<class>``,
            ``total``, ``aleatoric`` and ``epistemic``.

        Raises:
            ValueError: If columns are missing or of the wrong types, or hold values that training
                never saw.
        """
        import pyarrow as pa

        known = self._loaded.model.run.columns
        wanted = [*(column.name for column in known), *self._keep]
        missing = [name for name in dict.fromkeys(wanted) if name not in batch]
        if missing:
            raise ValueError(
                f"Predictor: the batch lacks {columns.list_names(missing)}; it has "
                f"{columns.list_names(list(batch))}"
            )
        arrays = {c.name: pa.array(batch[c.name], from_pandas=True) for c in known}
        rows = pa.record_batch(arrays)
        wrong = features.wrong_types(rows.schema, known)
        if wrong:
            raise ValueError(f"Predictor: {'; '.join(wrong)}")
        values, findings = features.encode(rows, known)
        _raise_for([own for own in findings if self._refuse or own.is_hopeless])
        try:
            return {**{name: batch[name] for name in self._keep}, **self._predict(values)}
        except features.TooLargeError as error:
            _raise_for(features.too_large(values, known, error.places))
            raise

    def _predict(self, values: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        example, model = self._loaded.example, self._loaded.model
        results = model.predict(values) if len(values) else [own.slice(0, 0) for own in example]
        return {
            name: own.to_numpy(zero_copy_only=False)
            for name, own in zip(self._names, results, strict=True)
        }


def _raise_for(findings: Sequence[features.Finding]) -> None:
    """Raise if there are any."""
    if findings:
        hopeless = any(own.is_hopeless for own in findings)
        remedy = "" if hopeless else '; unseen="ignore" predicts nevertheless'
        facts = "; ".join(map(str, findings))
        raise ValueError(
            f"Predictor: the batch has values that training never saw: {facts}{remedy}"
        )
