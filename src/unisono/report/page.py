"""The report as one page of HTML."""

from __future__ import annotations

from importlib.resources import files

import jinja2

from unisono.engine.planning.plan import seconds
from unisono.extras import require
from unisono.report import texts
from unisono.report.answers import Answers, answers_of
from unisono.report.examples import most_uncertain
from unisono.report.figures import MOST_ROWS, draw
from unisono.report.intervals import RESAMPLES
from unisono.report.run import Run
from unisono.report.scores import ScoreTable, score_classification, score_regression


def render(run: Run) -> str:
    """Write a run as one HTML page that needs nothing else: style and pictures are inside.

    Shares of rows have Wilson's interval of 95 %, other scores that of 1000 bootstrap resamples of
    the test rows. The same run gives the same page.

    Args:
        run: What was trained, and what its members say about the test rows.

    Returns:
        The content of an HTML file, in UTF-8.

    Raises:
        ValueError: If the outputs of no member are finite.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> import numpy as np
        >>> outputs = np.random.default_rng(0).normal(size=(4, 50, 3))
        >>> page = render(Run("demo", "classification", outputs, np.arange(50) % 3, np.arange(50)))
        >>> page[:15], page.count("<img")
        ('<!doctype html>', 4)
    """
    require("matplotlib", extra="plots", purpose="a report")
    answers = answers_of(run)
    page = _environment().get_template("template.html")
    return page.render(
        run=run,
        answers=answers,
        scores=_scores(run, answers),
        pictures=draw(run, answers),
        examples=most_uncertain(run, answers),
        most_rows=MOST_ROWS,
        resamples=RESAMPLES,
        score=texts.score,
        score_difference=texts.difference,
        style=_resource("style.css"),
    )


def _scores(run: Run, answers: Answers) -> ScoreTable:
    if answers.log_p is not None:
        return score_classification(answers.log_p, run.targets, answers.members)
    assert answers.mean is not None  # of a regression
    return score_regression(answers.mean, answers.log_variance, run.targets, answers.members)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,  # names of columns and classes are anybody's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": texts.number,
        "percent": texts.percent,
        "cell": texts.cell,
        "ends": texts.ends,
        "value": texts.value,
        "seconds": seconds,
    }
    return environment


def _resource(name: str) -> str:
    return files("unisono.report").joinpath(name).read_text(encoding="utf-8")
