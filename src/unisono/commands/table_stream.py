"""The rows of a table on their way from a file to results, batch by batch, on several threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unisono.commands.features import Finding, TooLargeError, encode, merge, too_large
from unisono.commands.outcome import ArgumentError
from unisono.commands.plain_preprocessing import PlainPreprocessing
from unisono.commands.run_folder import Description
from unisono.estimators.stored import StoredMembers

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema


@dataclass(frozen=True, eq=False)
class Model:
    """From rows to results.

    Args:
        run: What the columns and the classes are.
        preprocessing: Columns to features.
        members: Features to predictions.
    """

    run: Description
    preprocessing: PlainPreprocessing
    members: StoredMembers

    def schema(self, example: list[Any]) -> Schema:
        """The columns of the results, as wide as the arrays of an example."""
        import pyarrow as pa

        shares = [f"probability_{label}" for label in self.run.classes]
        names = ["prediction", *shares, "total", "aleatoric", "epistemic"]
        unit = "nats" if self.run.classes else "standard deviation, in the unit of the target"
        fields = [pa.field(*own) for own in zip(names, (a.type for a in example), strict=True)]
        return pa.schema(fields, metadata={"uncertainty": unit})

    def predict(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> list[Any]:
        """Return the arrays of the results for encoded rows.

        Raises:
            TooLargeError: If there are numbers that float32 has no room for.

        Shape:
            - values: ``(B, columns)``
        """
        import pyarrow as pa

        inputs = self.preprocessing.transform(values)
        try:
            found = self.members.predict_uncertainty(inputs)
        except ValueError:
            places: NDArray[np.bool_] = np.logical_not(np.isfinite(inputs).all(axis=1))
            if not places.any():
                raise
            raise TooLargeError(places) from None
        parts = [found.total, found.aleatoric, found.epistemic]
        if self.run.classes:
            best = pa.array(found.prediction.argmax(1))
            columns = [pa.array(self.run.classes).take(best), *map(pa.array, found.prediction.T)]
        else:
            columns = [pa.array(found.prediction)]
            parts = [np.sqrt(variance) for variance in parts]
        return [*columns, *map(pa.array, parts)]


@dataclass(frozen=True, eq=False)
class Part:
    """What became of a part of a stream.

    Args:
        rows: How many rows it had.
        findings: What in them training never saw.
        results: The columns of the output; None if there won't be any.
    """

    rows: int
    findings: list[Finding]
    results: RecordBatch | None


class Stream:
    """The rows of one file; they may be predicted on several threads.

    After the first row that can't be predicted, the rest is only looked through, so that one
    message names everything.

    Args:
        model: What predicts.
        schema: Of the output.
        keep: The columns of the input in it.
        refuse: Whether values that training never saw are an error.
        rows_before: How many rows of the file come before those of the stream.
    """

    def __init__(
        self,
        model: Model,
        schema: Schema,
        keep: Sequence[str],
        *,
        refuse: bool,
        rows_before: int = 0,
    ) -> None:
        self.rows = 0
        self.findings: list[Finding] = []
        self._model = model
        self._schema = schema
        self._keep = keep
        self._refuse = refuse
        self._rows_before = rows_before

    def numbered(self, batches: Iterable[RecordBatch]) -> Iterator[tuple[int, RecordBatch]]:
        """Give each batch with the number of rows before it."""
        for batch in batches:
            before = self._rows_before + self.rows
            self.rows += batch.num_rows
            yield before, batch

    def predict(self, numbered: tuple[int, RecordBatch]) -> Part:
        """Predict one batch; changes nothing."""
        import pyarrow as pa

        before, batch = numbered
        values, found = encode(batch, self._model.run.columns, rows_before=before)
        if self._refused() or self._refused(found):
            return Part(batch.num_rows, found, None)
        kept = [batch.column(name).cast(self._schema.field(name).type) for name in self._keep]
        try:
            columns = [*kept, *self._model.predict(values)]
        except TooLargeError as error:
            known = self._model.run.columns
            found += too_large(values, known, error.places, rows_before=before)
            return Part(batch.num_rows, found, None)
        return Part(batch.num_rows, found, pa.record_batch(columns, schema=self._schema))

    def collect(self, part: Part) -> RecordBatch | None:
        """Take in the parts in their order; returns what is to be written."""
        self.findings = merge([*self.findings, *part.findings])
        return None if self._refused() else part.results

    def check_rows(self, name: str) -> None:
        """Raise if there were no rows.

        Raises:
            ArgumentError: Then.
        """
        if not self.rows:
            raise ArgumentError(f"{name} has no rows")

    def check(self, name: str) -> None:
        """Raise if there were rows that can't be predicted.

        Raises:
            ArgumentError: With every column of them.
        """
        refused = self._refused()
        if refused:
            ignore = all(not finding.is_hopeless for finding in refused)
            remedy = "; add --unseen ignore to predict nevertheless" if ignore else ""
            facts = "; ".join(str(finding) for finding in refused)
            raise ArgumentError(f"{name} has values that training never saw: {facts}{remedy}")

    def _refused(self, findings: list[Finding] | None = None) -> list[Finding]:
        """Those of the findings that can't be predicted."""
        known = self.findings if findings is None else findings
        return [finding for finding in known if self._refuse or finding.is_hopeless]
