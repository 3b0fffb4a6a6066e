"""What a training shows: a bar in a terminal, lines elsewhere."""

import io

from rich.console import Console

from unisono.commands.progress import report_progress


def show(terminal, width=80):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    with report_progress(console, epochs=2) as reporter:
        for k, losses in enumerate(([0.5, 0.7], [0.25, 0.35])):
            reporter.epoch(k + 1, losses)
    return text.getvalue()


def test_lines_for_a_log():
    assert show(terminal=False) == (
        "epoch 1/2  loss 0.600 (0.500 to 0.700)\nepoch 2/2  loss 0.300 (0.250 to 0.350)\n"
    )


def test_a_bar_for_a_terminal():
    text = show(terminal=True)
    assert "epoch 2/2" in text
    assert "2/2" in text
    assert "loss 0.300 (0.250 to 0.350)" in text


def test_one_member_has_no_spread():
    text = io.StringIO()
    with report_progress(Console(file=text), epochs=1) as reporter:
        reporter.epoch(1, [0.5])
    assert text.getvalue() == "epoch 1/1  loss 0.500\n"
