"""The page: valid, alone, escaped, the same each time, and with all its parts."""

import re
import sys
from html import escape

import html5lib
import numpy as np
import pyarrow as pa
import pytest

from unisono.report import render

NOTHING = "\N{EN DASH}"
HTML = "{http://www.w3.org/1999/xhtml}"
IMAGES = np.random.default_rng(0).integers(256, size=(60, 1, 6, 5), dtype=np.uint8)


def parse(page):
    """The page as a tree; any breach of the standard raises."""
    return html5lib.HTMLParser(strict=True).parse(page)


def texts(tree, tag):
    return [" ".join(" ".join(found.itertext()).split()) for found in tree.iter(HTML + tag)]


def table_of(hostile):
    values = {hostile["column"]: [hostile["value"]] * 60, hostile["target"]: range(60)}
    return pa.table(values | {f"x{k}": [None, *range(59)] for k in range(20)})


@pytest.fixture(
    scope="module",
    params=["images", "table", "regression", "one member", "bare", "a broken member"],
)
def page(request, make_run, hostile):
    outputs = make_run().outputs
    broken = np.where(np.arange(4)[:, None, None] == 1, np.nan, outputs)
    run = {
        "images": lambda: make_run(images=IMAGES, columns=()),
        "table": lambda: make_run(table=table_of(hostile)),
        "regression": lambda: make_run("regression", table=table_of(hostile)),
        "one member": lambda: make_run(members=1, images=IMAGES.repeat(3, axis=1)),
        "bare": lambda: make_run(
            columns=(), classes=(), plan=None, loss=None, validation_loss=None, target=""
        ),
        "a broken member": lambda: make_run(outputs=broken),
    }[request.param]()
    return render(run)


def test_the_page_keeps_to_the_standard(page):
    tree = parse(page)
    assert tree.get("lang") == "en"
    assert texts(tree, "h2")[:4] == [
        "Scores",
        "Plots",
        "Most uncertain test examples",
        "Data and settings",
    ]
    for image in tree.iter(HTML + "img"):
        assert image.get("alt")
    for found in tree.iter():
        assert found.get("id") is None


def test_the_page_needs_no_network_and_no_script(page):
    tree = parse(page)
    for found in tree.iter():
        assert found.tag not in (HTML + "script", HTML + "link", HTML + "iframe", HTML + "object")
        for name, value in found.attrib.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith("data:image/png;base64,")
    (style,) = texts(tree, "style")
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?:|//", page.replace("<!doctype html>", "").split("base64,")[0])


def test_what_users_name_is_text(page, hostile):
    assert "<script" not in page
    assert f"<h1>Report of {escape(hostile['name'])}</h1>" in page


def test_the_same_run_gives_the_same_page(make_run):
    assert render(make_run()) == render(make_run())


def test_all_names_are_told(make_run, hostile):
    tree = parse(render(make_run(table=table_of(hostile))))
    told = " ".join("".join(tree.itertext()).split())
    for name in hostile.values():
        assert name in told
    cells = texts(tree, "td")
    assert "B & C" in cells
    assert texts(tree, "dd")[:3] == ["99 values from 0.001 to 0.001", hostile["setting"], NOTHING]


def test_plots_of_a_classification(make_run):
    assert texts(parse(render(make_run())), "h3") == [
        "Learning curves",
        "Reliability",
        "Accuracy by number of members",
        "Disagreement",
        "Uncertainty of right and wrong answers",
    ]


def test_plots_of_a_regression(make_run):
    assert texts(parse(render(make_run("regression"))), "h3") == [
        "Learning curves",
        "Predictions against true values",
        "RMSE by number of members",
        "Correlation of errors",
        "Uncertainty of small and large errors",
    ]


def test_one_member_has_nobody_to_disagree_with(make_run):
    tree = parse(render(make_run(members=1)))
    assert texts(tree, "h3")[1:] == ["Reliability", "Uncertainty of right and wrong answers"]
    assert texts(tree, "th")[:5] == ["accuracy", "NLL (nats)", "Brier", "ECE", "the one member"]
    assert "member is" not in texts(tree, "p")[0]


def test_a_perfect_run_has_no_wrong_answers_to_draw(make_run):
    targets = np.arange(60) % 3
    outputs = np.stack([20.0 * np.eye(3)[targets]] * 2)
    tree = parse(render(make_run(members=2, outputs=outputs)))
    assert "Uncertainty of right and wrong answers" not in texts(tree, "h3")
    ensemble = next(row for row in texts(tree, "tr") if row.startswith("ensemble"))
    assert ensemble.startswith("ensemble 100.00 % 93.98 to 100.00 ")


def test_a_member_that_is_not_finite_is_left_out_and_named(make_run):
    outputs = make_run().outputs.copy()
    outputs[1, 7, 0] = np.inf
    tree = parse(render(make_run(outputs=outputs)))
    (warning,) = [text for text in texts(tree, "p") if text.startswith("Left out")]
    assert "member 1." in warning
    rows = texts(tree, "th")
    assert {"member 0", "member 2", "member 3"} <= set(rows)
    assert "member 1" not in rows


def test_no_finite_member_is_an_error(make_run):
    run = make_run(outputs=np.full((2, 60, 3), np.nan), name="spiral")
    message = (
        "the run spiral can't be reported on: each of its 2 members has outputs that aren't "
        "finite; train it with a lower learning rate"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        render(run)


def test_the_plan_is_a_table(make_run):
    tree = parse(render(make_run()))
    assert texts(tree, "h2")[-1] == "How the members run"
    assert "(member) linear rule of unisono 100.00 %" in texts(tree, "tr")


def test_numbers_far_out_are_survived(make_run):
    outputs = np.array([[[1e30, 300.0]] * 60, [[-1e30, -300.0]] * 60])
    parse(render(make_run("regression", outputs=outputs, targets=np.zeros(60))))
    outputs = np.array([[[1e30, -1e30, 0.0]] * 60] * 2)
    parse(render(make_run(outputs=outputs)))


def test_constant_targets_have_no_explained_variance(make_run):
    outputs = make_run("regression").outputs[..., :1]
    tree = parse(render(make_run("regression", outputs=outputs, targets=np.ones(60))))
    assert [head for head in texts(tree, "th") if head in ("RMSE", "R²", "NLL (nats)")][:2] == [
        "RMSE",
        "R²",
    ]
    ensemble = next(row for row in texts(tree, "tr") if row.startswith("ensemble"))
    assert ensemble.endswith(f" {NOTHING}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": np.ones((4, 60))}, "outputs must be (members, rows, outputs), none of them 0"),
        ({"outputs": np.ones((0, 60, 3))}, "none of them 0, got (0, 60, 3)"),
        ({"targets": np.zeros(59, dtype=int)}, "targets must be (60,) as there are outputs of 60"),
        ({"targets": np.full(60, 3)}, "targets must be from 0 to 2, got 3 to 3"),
        ({"classes": ("a", "b")}, "2 classes are named, but outputs have 3"),
        ({"outputs": np.ones((4, 60, 1))}, "a classification has two outputs at least, got 1"),
        ({"task": "regression"}, "a regression has a mean and a log-variance, got 3 outputs"),
        ({"task": "ranking"}, "task must be classification or regression, got 'ranking'"),
        ({"images": IMAGES[:9]}, "images must be (60, 1 or 3, height, width), got (9, 1, 6, 5)"),
        ({"table": pa.table({"x": [1]})}, "the table has 1 rows, but there are outputs of 60"),
        ({"plan": {"strategy": "loop"}}, "the plan has no candidates, chunk_size, ops, reason"),
    ],
)
def test_a_run_that_does_not_fit_together_is_refused(make_run, fields, message):
    given = {"outputs": np.ones((4, 60, 3)), "targets": np.zeros(60, dtype=int)} | fields
    with pytest.raises(ValueError, match=r"^the run mine can't be reported on: ") as caught:
        make_run(**{"name": "mine", "classes": (), **given})
    assert message in str(caught.value)


def test_the_most_uncertain_rows_come_first(make_run):
    targets = np.arange(60) % 3
    outputs = np.stack([20.0 * np.eye(3)[targets]] * 2)
    outputs[:, 17] = 0.0  # of all classes alike
    outputs[:, 4] = [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]  # each sure, of different classes
    tree = parse(render(make_run(members=2, outputs=outputs, classes=("a", "b", "c"))))
    heads = [row for row in texts(tree, "tr") if re.match(r"\d+ [abc] [abc] ", row)]
    assert len(heads) == 20
    assert heads[0].startswith("85 c a 33.33 % 2 of 2 1.099 1.099 ")
    assert heads[1].startswith("20 b a 49.99 % 1 of 2 0.6943 0.002")


def test_without_matplotlib_the_extra_is_named(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = (
        "a report needs the package matplotlib, from the extra `plots`: pip install "
        '"unisono[plots]"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        render(make_run())
