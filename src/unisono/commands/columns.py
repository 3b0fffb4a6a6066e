"""Which columns of a table are features, and of which kind; decided once, by the training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from unisono.commands.outcome import ArgumentError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, DataType, Table

Kind: TypeAlias = Literal["number", "category"]

MOST_CATEGORIES: Final = 255
_TYPES: Final = ("double", "int64", "bool", "string")
_ID_ROWS: Final = 20  # below it, texts that all differ may be chance


@dataclass(frozen=True)
class Column:
    """A column that is a feature.

    Args:
        name: As in the file.
        kind: ``"number"`` or ``"category"``.
        type: How its values are read: ``"double"``, ``"int64"``, ``"bool"`` or ``"string"``.
        missing: Whether values were missing in the training rows.
        categories: The values in the training rows as texts, sorted; empty for numbers.

    Example:
        >>> column = Column("colour", "category", "string", False, ("blue", "red"))
        >>> Column.from_json(column.to_json()) == column
        True
    """

    name: str
    kind: Kind
    type: str
    missing: bool
    categories: tuple[str, ...] = ()

    @property
    def num_codes(self) -> int:
        """Codes of a category: one for each value, and one more if values were missing."""
        return len(self.categories) + self.missing

    def to_json(self) -> dict[str, Any]:
        """Return the column as plain values."""
        return {**vars(self), "categories": list(self.categories)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Column:
        """Make a column of what `to_json` gave.

        Raises:
            ValueError: If a value is unknown.
            KeyError: If one is missing.
        """
        kind, type_ = values["kind"], values["type"]
        if kind not in ("number", "category") or type_ not in _TYPES:
            raise ValueError(f"column {values['name']!r} is of unknown kind {kind!r}, {type_!r}")
        categories = tuple(str(value) for value in values["categories"])
        return cls(str(values["name"]), kind, type_, bool(values["missing"]), categories)


@dataclass(frozen=True)
class Choice:
    """The columns of a table, sorted out.

    Args:
        columns: The features.
        dropped: Column that is no feature -> why, in a few words.
    """

    columns: tuple[Column, ...]
    dropped: dict[str, str]


def choose_columns(
    table: Table, *, target: str, categorical: Collection[str] = (), drop: Collection[str] = ()
) -> Choice:
    """Decide for every column what it is; from the training rows alone.

    Numbers are numbers, unless named in ``categorical``; texts and booleans are categories.
    Left out, with a reason, are dates and other kinds, columns without or with only one value,
    texts that differ in every row, and texts with more than `MOST_CATEGORIES` values.

    Args:
        table: The training rows.
        target: The column to predict.
        categorical: Columns of numbers that are categories.
        drop: Columns to leave out.

    Raises:
        ArgumentError: If a named column isn't there or can't be a category, or no feature is left.

    Example:
        >>> import pyarrow as pa
        >>> table = pa.table({"x": [1.0, 2.0], "colour": ["red", None], "y": [0, 1]})
        >>> [(c.name, c.kind, c.missing) for c in choose_columns(table, target="y").columns]
        [('x', 'number', False), ('colour', 'category', True)]
    """
    others = [name for name in table.column_names if name != target]
    for option, names in (("--categorical", categorical), ("--drop", drop)):
        unknown = [name for name in names if name not in others]
        if unknown:
            raise ArgumentError(f"{option} {unknown[0]}: {_no_feature(unknown[0], target, others)}")
    columns: list[Column] = []
    dropped: dict[str, str] = {}
    for name in others:
        found = (
            "--drop"
            if name in drop
            else _as_category(name, table[name], chosen=True)
            if name in categorical
            else _as_feature(name, table[name])
        )
        if isinstance(found, Column):
            columns.append(found)
        else:
            dropped[name] = found
    if not columns:
        reasons = "; ".join(f"{name}: {why}" for name, why in dropped.items())
        raise ArgumentError(f"no column is left as a feature ({reasons or 'there is no other'})")
    return Choice(tuple(columns), dropped)


def _no_feature(name: str, target: str, others: Sequence[str]) -> str:
    if name == target:
        return "that is the target"
    return f"there is no such column; there are {list_names(others)}"


def list_names(names: Sequence[str], most: int = 10) -> str:
    """List the first names.

    Example:
        >>> list_names(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _as_feature(name: str, values: ChunkedArray) -> Column | str:
    import pyarrow.types as is_type

    kind = value_type(values.type)
    if is_type.is_null(kind) or values.null_count == len(values):
        return "no values"
    if is_type.is_boolean(kind) or is_text(kind):
        return _as_category(name, values, chosen=False)
    if not is_number(kind):
        return f"{kind} is neither number nor text nor boolean"
    return _as_number(name, values)


def _as_number(name: str, values: ChunkedArray) -> Column | str:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = values.cast(pa.float64())
    missing = bool(pc.any(pc.is_null(numbers, nan_is_null=True)).as_py())
    span = pc.min_max(pc.drop_null(pc.if_else(pc.is_nan(numbers), None, numbers))).as_py()
    if span["min"] is None:
        return "no values"
    if span["min"] == span["max"] and not missing:
        return f"always {span['min']:g}"
    return Column(name, "number", "double", missing)


def _as_category(name: str, values: ChunkedArray, *, chosen: bool) -> Column | str:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as is_type

    kind = value_type(values.type)
    type_ = "string" if is_text(kind) else "bool" if is_type.is_boolean(kind) else "int64"
    try:
        texts = values.cast(kind).cast(type_).cast(pa.string())
    except pa.ArrowInvalid as error:
        raise ArgumentError(f"--categorical {name}: its numbers aren't whole") from error
    except pa.ArrowNotImplementedError as error:
        raise ArgumentError(f"--categorical {name}: {kind} can't be categories") from error
    found = sorted(pc.unique(pc.drop_null(texts)).to_pylist())
    missing = texts.null_count > 0
    if len(found) + missing < 2:
        return f"always {found[0]}" if found else "no values"
    if not chosen and len(found) == len(texts) >= _ID_ROWS:
        return "another text in every row, like an identifier"
    if len(found) > MOST_CATEGORIES:
        return f"{len(found):,} different values, more than {MOST_CATEGORIES}"
    return Column(name, "category", type_, missing, tuple(found))


def value_type(kind: DataType) -> DataType:
    """The type of the values behind a dictionary, or the type itself."""
    import pyarrow.types as is_type

    return kind.value_type if is_type.is_dictionary(kind) else kind


def is_text(kind: DataType) -> bool:
    """Say whether a type of Arrow holds text."""
    import pyarrow.types as is_type

    return bool(
        is_type.is_string(kind) or is_type.is_large_string(kind) or is_type.is_string_view(kind)
    )


def is_number(kind: DataType) -> bool:
    """Say whether a type of Arrow holds numbers."""
    import pyarrow.types as is_type

    return bool(is_type.is_integer(kind) or is_type.is_floating(kind) or is_type.is_decimal(kind))
