"""The model card of an ensemble: YAML for the Hugging Face Hub, Markdown for people.

https://huggingface.co/docs/hub/model-cards describes it. The YAML is written here, since it is a
dozen lines: every text in it is quoted as JSON quotes it, which YAML reads.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from unisono.evaluation.result import Evaluation

_TAGS: Final = ("unisono", "ensemble", "deep-ensemble", "uncertainty", "pytorch")
_SEAL: Final = "<!-- unisono wrote this page: crc32 "
_LISTED: Final = 50  # members in a table


def model_card(
    name: str,
    config: Mapping[str, Any],
    *,
    metrics: Evaluation | None,
    dataset: str | None,
    make_model: Callable[[], nn.Module] | None,
    license: str | None,
    tags: Sequence[str],
) -> str:
    """The text of ``README.md``.

    Args:
        name: Of the model.
        config: What ``config.json`` holds.
        metrics: What `evaluate` found.
        dataset: Name of the data that they are of.
        make_model: Makes one member; only its name is used.
        license: As the Hub names it.
        tags: More tags.
    """
    front = _front_matter(name, metrics, dataset, license, tags)
    parts = [*_what_it_is(name, config), *_how_to_load(config, make_model)]
    if metrics is not None:
        parts += _scores(metrics, dataset)
    parts += ["## Versions", "", f"unisono {config['unisono_version']}, torch {torch.__version__}."]
    return "\n".join(["---", *front, "---", "", *parts, ""])


def sealed(text: str) -> str:
    """The card with a last line by which `was_edited` tells whether it is as it was written."""
    return f"{text}\n{_seal(text)}\n"


def was_edited(text: str) -> bool:
    """Whether a card isn't what `sealed` made.

    Example:
        >>> was_edited(sealed("A card.")), was_edited(sealed("A card.").replace("A", "My"))
        (False, True)
    """
    plain = text.replace("\r\n", "\n").rstrip("\n")
    body, _, last = plain.rpartition("\n")
    return last != _seal(body)


def _seal(text: str) -> str:
    return f"{_SEAL}{zlib.crc32(text.encode()):08x}. Edit it, and it is kept as it is. -->"


def _front_matter(
    name: str,
    metrics: Evaluation | None,
    dataset: str | None,
    license: str | None,
    tags: Sequence[str],
) -> Iterator[str]:
    yield "library_name: unisono"
    if license is not None:
        yield f"license: {_quoted(license)}"
    yield "tags:"
    yield from (f"- {_quoted(tag)}" for tag in dict.fromkeys([*_TAGS, *tags]))
    known = [] if metrics is None else [m for m in metrics.combined.items() if math.isfinite(m[1])]
    if metrics is None or not known:
        return
    data = _quoted(dataset or "unnamed data")
    yield "model-index:"
    yield f"- name: {_quoted(name)}"
    yield "  results:"
    yield "  - task:"
    yield f"      type: {_quoted(metrics.task)}"
    yield "    dataset:"
    yield f"      type: {data}"
    yield f"      name: {data}"
    yield "    metrics:"
    for metric, value in known:
        yield f"    - type: {_quoted(metric)}"
        yield f"      value: {_number(value)}"
        yield f"      name: {_quoted(f'{metric}, all members together')}"


def _what_it_is(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    n, shared = config["members"], config["shared_parameters"]
    yield f"# {name}"
    yield ""
    yield (
        f"An ensemble of {n} models of one architecture, `{config['member_class']}`, with"
        f" {config['member_parameters']:,} parameters each"
        + (f", of which all members share {shared:,}" if shared else "")
        + ". unisono, a library on PyTorch, runs all of them in one forward pass; the file holds"
        " their stacked tensors, and no code."
    )
    yield ""


def _how_to_load(
    config: Mapping[str, Any], make_model: Callable[[], nn.Module] | None
) -> Iterator[str]:
    yield "## How to use it"
    yield ""
    yield "```python"
    yield "from unisono import Ensemble, combine, uncertainty"
    yield ""
    yield from _factory(config, make_model)
    yield ""
    yield 'folder = "."  # or huggingface_hub.snapshot_download("user/name")'
    yield "ens = Ensemble.load(folder, make_model).eval()"
    yield f"# ens(x): the outputs of all members, ({config['members']}, *)"
    yield "# combine.probabilities(ens(x)), uncertainty.classification(ens(x)): of logits, as one"
    yield "# ens[0]: member 0, an ordinary module"
    yield "```"
    yield ""
    yield "Without the class of the members: `unisono split . --out members` writes one state dict"
    yield "for each, `unisono inspect .` tells what is in the file."
    yield ""


def _factory(config: Mapping[str, Any], make_model: Any) -> Iterator[str]:
    """Lines that define `make_model`, as far as it has a name that can be imported."""
    module, path = (getattr(make_model, own, "") for own in ("__module__", "__qualname__"))
    if make_model is not None and module != "__main__" and path.isidentifier():
        yield f"from {module} import {path}" + (" as make_model" if path != "make_model" else "")
        return
    yield "def make_model():"
    yield f"    ...  # return a {config['member_class']}, as it was made for training"


def _scores(metrics: Evaluation, dataset: str | None) -> Iterator[str]:
    names = list(metrics.members)
    yield "## Scores"
    yield ""
    where = f"`{dataset}`" if dataset else "held-out data"
    yield f"{metrics.task.capitalize()} of {metrics.rows:,} rows of {where}, by `unisono.evaluate`."
    yield ""
    yield f"| | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    yield _row("**all together**", [metrics.combined[name] for name in names])
    yield _row("mean of the members", [float(metrics.members[name].mean()) for name in names])
    count = max(map(len, metrics.members.values()), default=0)
    for i in range(min(count, _LISTED)):
        yield _row(f"member {i}", [float(metrics.members[name][i]) for name in names])
    if count > _LISTED:
        yield _row(f"... and {count - _LISTED} more", [math.nan] * len(names)).replace("nan", "")
    yield ""
    parts = (f"{name} {value:.4g}" for name, value in metrics.uncertainty.items())
    yield f"Mean uncertainty: {', '.join(parts)}."
    yield ""


def _row(name: str, values: Sequence[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.4g}' for value in values)} |"


def _number(value: float) -> str:
    """A number as YAML, which takes none with an exponent and without a point."""
    digits, e, exponent = repr(float(value)).partition("e")
    return digits + (f"{'' if '.' in digits else '.0'}e{exponent}" if e else "")


def _quoted(text: str) -> str:
    """A text as YAML: JSON's double quotes, and none where a plain word is plain in YAML, too."""
    is_plain = text.replace("-", "").isalpha() and text.isascii() and text[0].isalpha()
    words = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
    return text if is_plain and text.lower() not in words else json.dumps(text)
