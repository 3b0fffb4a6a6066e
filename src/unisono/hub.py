"""Folders as the Hugging Face Hub shows them: weights, a model card, a small ``config.json``.

Nothing here talks to the Hub. A folder goes there by ``huggingface_hub.upload_folder``, and comes
back by ``huggingface_hub.snapshot_download``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from unisono.checkpoint.ensemble_file import NAME
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleWarning
from unisono.evaluation.result import Evaluation
from unisono.files import replacing
from unisono.model_card import model_card, sealed, was_edited

__all__ = ["CARD", "CONFIG", "save"]

CARD: Final = "README.md"
CONFIG: Final = "config.json"
_FORMAT: Final = 1


def save(
    ens: Ensemble,
    folder: str | os.PathLike[str],
    *,
    metrics: Evaluation | None = None,
    dataset: str | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    card: Literal["keep", "replace"] = "keep",
) -> Path:
    """Write a folder as the Hugging Face Hub shows it.

    ``Ensemble.load(folder, make_model)`` reads it. ``model.safetensors`` is what `Ensemble.save`
    writes, ``config.json`` says in a few words what it is, ``README.md`` is the model card. Each
    file is written as a whole or not at all, the weights first. Other files in the folder stay.

    Args:
        ens: The ensemble.
        folder: It is made if it is missing. Its name is that of the model on the card.
        metrics: What `evaluate` found; a table of all members on the card.
        dataset: Name of the data that the metrics are of.
        make_model: Makes one member. Only its name is used, for the code on the card.
        license: An identifier that the Hub knows, as ``"bsd-3-clause"``.
        tags: More tags for the card.
        card: What becomes of a ``README.md`` that someone has edited: ``"keep"`` leaves it as it
            is, with an `EnsembleWarning`; ``"replace"`` writes a new one. One that is as `save`
            wrote it is written anew in any case.

    Returns:
        The folder.

    Raises:
        OSError: If the disk refuses.
        TypeError: If a tensor can't be stored.
        ValueError: If an argument is none of the choices.

    Example:
        >>> import tempfile
        >>> ens = Ensemble.build(lambda: nn.Linear(3, 2), 5)
        >>> folder = save(ens, tempfile.mkdtemp() + "/five-lines", tags=["example"])
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
        >>> len(Ensemble.load(folder, lambda: nn.Linear(3, 2)))
        5
    """
    if card not in ("keep", "replace"):
        raise ValueError(f"hub.save: card is 'keep' or 'replace'; got {card!r}")
    target = Path(folder)
    config = _config(ens)
    text = model_card(
        target.resolve().name,
        config,
        metrics=metrics,
        dataset=dataset,
        make_model=make_model,
        license=license,
        tags=tags,
    )
    target.mkdir(parents=True, exist_ok=True)
    ens.save(target / NAME)
    _write(target / CONFIG, json.dumps(config, indent=2) + "\n")
    page = target / CARD
    if card == "keep" and page.exists() and was_edited(_text(page)):
        warnings.warn(
            f"hub.save: {page} was edited, so it stays as it is; the weights are new. To write the"
            f' card anew: hub.save(ens, folder, card="replace")',
            EnsembleWarning,
            stacklevel=2,
        )
    else:
        _write(page, sealed(text))
    return target


def _config(ens: Ensemble) -> dict[str, Any]:
    """What the folder holds; the Hub counts the downloads of this file."""
    from unisono import __version__  # not above: it would be a circle

    member = ens[0]
    own = [p.numel() for n, p in ens.members.named_parameters() if n not in ens.shared]
    shared = [p.numel() for n, p in ens.members.named_parameters() if n in ens.shared]
    kind = type(member)
    return {
        "library_name": "unisono",
        "format": _FORMAT,
        "members": len(ens),
        "member_class": f"{kind.__module__}.{kind.__qualname__}",
        "member_parameters": sum(own) // len(ens) + sum(shared),
        "shared_parameters": sum(shared),
        "unisono_version": __version__,
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
