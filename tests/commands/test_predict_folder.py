"""`unisono predict` on folders: pieces, resuming, processes; everything that can be wrong."""

import json
import os
import re
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import unisono.files
from small_tables import cancer_frame
from unisono import cli
from unisono.commands import piece_worker
from unisono.commands.finished import STATE, Finished
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.commands.piece_worker import FolderRequest
from unisono.commands.pieces import Identity, InputFile, Piece, cut, order_of_work, read_file
from unisono.commands.predict import PredictRequest, run_predict
from unisono.commands.predict_folder import predict_folder
from unisono.commands.ranks import Alone, StoreRanks
from unisono.commands.run_model import Wishes
from unisono.distributed.meeting import name_of_this_start

KEEP = ("id",)


def exactly(message):
    return f"^{re.escape(message)}$"


@pytest.fixture
def folder(tables, tmp_path):
    """Files of every kind: of several row groups, without rows, CSV, in a folder, no tables."""
    table = pq.read_table(tables / "cancer.parquet")
    out = tmp_path / "in"
    (out / "year=2024").mkdir(parents=True)
    pq.write_table(table, out / "large.parquet", row_group_size=60)
    pq.write_table(table.slice(100, 50), out / "year=2024" / "small.parquet")
    pq.write_table(table.slice(0, 0), out / "empty.parquet")
    table.slice(200, 30).to_pandas().to_csv(out / "rows.csv", index=False)
    (out / "_SUCCESS").touch()
    (out / ".hidden.parquet").write_text("junk")
    return out


NAMES = ("empty.parquet", "large.parquet", "rows.csv", "year=2024/small.parquet")


def predict(run, source, output, ranks=None, **options):
    """By one process, in pieces of 100 rows."""
    wishes = Wishes(options.pop("keep", KEEP), options.pop("unseen", "error"))
    request = FolderRequest(run, source, output, wishes, device="cpu", piece_rows=100, **options)
    return predict_folder(request, ranks or Alone(), Console(quiet=True))


def contents(output):
    """Name -> bytes of the results."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in files
        if path.relative_to(output).parts[0] != STATE
    }


def frame_of(path):
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


# The results --------------------------------------------------------------------------------------


def test_each_file_has_its_predictions_at_the_same_place(cancer_run, folder, tmp_path):
    report = predict(cancer_run, folder, tmp_path / "out")
    assert (report.rows, report.notes) == (569 + 50 + 30, [])
    assert sorted(contents(tmp_path / "out")) == sorted(NAMES)
    for name in NAMES[1:]:
        single = tmp_path / f"single{Path(name).suffix}"
        run_predict(
            PredictRequest(cancer_run, str(folder / name), str(single), KEEP, device="cpu"),
            Console(quiet=True),
        )
        found, expected = frame_of(tmp_path / "out" / name), frame_of(single)
        # Other rows share a batch: equal up to float32.
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)
        assert found["id"].tolist() == frame_of(folder / name)["id"].tolist()
    schemas = [pq.read_schema(tmp_path / "out" / name) for name in NAMES[:2]]
    assert schemas[0].equals(schemas[1], check_metadata=True)
    assert pq.read_metadata(tmp_path / "out" / "empty.parquet").num_rows == 0


def test_the_command(cancer_run, folder, tmp_path, capsys):
    (folder / "readme.txt").touch()
    words = ["predict", str(cancer_run), "--input", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--device", "cpu"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "passed over, neither .csv nor .parquet: readme.txt"
    assert second.startswith("predicted 649 rows in ")
    assert third == f"wrote {tmp_path / 'out'}"
    assert cli.main([*words, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"649 rows of {tmp_path / 'out'} were finished before"
    assert lines[2].startswith("predicted 0 rows in ")


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 100))
def test_pieces_cover_every_row_group_once(rows, least):
    pieces = list(cut(rows, least))
    covered = [k for piece in pieces for k in range(*piece.groups)]
    assert covered == list(range(len(rows)))
    assert [piece.rows for piece in pieces] == [sum(rows[slice(*p.groups)]) for p in pieces]
    assert [p.rows_before for p in pieces] == [sum(rows[: p.groups[0]]) for p in pieces]
    assert all(piece.rows >= least for piece in pieces[:-1])
    assert pieces


def test_the_largest_pieces_come_first():
    about = Identity(5_000, 0, "")
    files = [
        InputFile("a", about, (Piece((0, 1), 10), Piece((1, 2), 90, 10))),
        InputFile("b.csv", about, (Piece(None, None),)),
        InputFile("c", None, (), "can't be read"),
        InputFile("d", about, (Piece((0, 1), 60),)),
    ]
    assert order_of_work(files) == [(0, 1), (3, 0), (1, 0), (0, 0)]


def test_a_plan_passes_through_json(folder):
    for name in NAMES:
        file = read_file(folder, name, 100)
        assert InputFile.from_json(json.loads(json.dumps(file.to_json()))) == file


# Killed and resumed -------------------------------------------------------------------------------


class Killed(BaseException):
    """As `SIGKILL`, nothing catches it."""


@pytest.fixture
def predictions(monkeypatch):
    """The pieces that were predicted, as source and row groups."""
    seen = []

    def counted(loaded, source, *arguments, **options):
        seen.append((source, options["groups"]))
        return piece_worker_predict(loaded, source, *arguments, **options)

    piece_worker_predict = piece_worker.predict_rows
    monkeypatch.setattr(piece_worker, "predict_rows", counted)
    return seen


@pytest.mark.slow
def test_killed_at_every_rename_and_resumed(cancer_run, folder, tmp_path, monkeypatch, predictions):
    predict(cancer_run, folder, tmp_path / "whole")
    pieces = len(predictions)
    assert pieces == 5 + 3  # `large` has ten row groups
    expected, replace = contents(tmp_path / "whole"), os.replace
    renames = 0

    def kill_before(source, target):
        nonlocal renames
        if renames == after:
            raise Killed
        renames += 1
        replace(source, target)

    monkeypatch.setattr(unisono.files.os, "replace", kill_before)
    ends = 0
    for after in range(100):
        output = tmp_path / f"killed{after}"
        predictions.clear()
        renames = 0
        try:
            predict(cancer_run, folder, output)
        except Killed:
            renames = -1000
            predict(cancer_run, folder, output)
        else:
            ends = after
        assert contents(output) == expected, after
        # What was under way is done again, nothing else.
        assert len(predictions) <= pieces + 1, after
        assert not list(output.rglob("*.parts"))
        if ends:
            break
    # One for the job, two for each piece, two for the one file that is joined.
    assert ends == 1 + 2 * pieces + 2


def test_nothing_is_done_twice(cancer_run, folder, tmp_path, predictions):
    output = tmp_path / "out"
    predict(cancer_run, folder, output)
    predictions.clear()
    before = contents(output)
    report = predict(cancer_run, folder, output)
    assert (report.rows, predictions) == (0, [])
    assert report.notes == [f"649 rows of {output} were finished before"]
    assert contents(output) == before


def test_a_changed_input_is_predicted_anew(cancer_run, folder, tables, tmp_path, predictions):
    output = tmp_path / "out"
    predict(cancer_run, folder, output)
    predictions.clear()
    path = folder / "year=2024" / "small.parquet"
    before = path.stat()
    table = pq.read_table(tables / "cancer.parquet")
    pq.write_table(table.slice(300, 50), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing but the rows tells
    predict(cancer_run, folder, output)
    assert predictions == [(str(path), range(1))]
    ids = frame_of(output / "year=2024" / "small.parquet")["id"]
    assert ids.tolist() == [f"p{k}" for k in range(300, 350)]


def test_a_file_that_grew_to_several_pieces_and_shrank(cancer_run, folder, tables, tmp_path):
    table, path = pq.read_table(tables / "cancer.parquet"), folder / "year=2024" / "small.parquet"
    for rows in (50, 400, 120):
        pq.write_table(table.slice(0, rows), path, row_group_size=50)
        predict(cancer_run, folder, tmp_path / "out")
        found = frame_of(tmp_path / "out" / "year=2024" / "small.parquet")
        assert found["id"].tolist() == frame_of(path)["id"].tolist()
        assert not list((tmp_path / "out").rglob("*.parts"))


def test_results_that_somebody_changed_are_made_again(cancer_run, folder, tmp_path, predictions):
    output = tmp_path / "out"
    predict(cancer_run, folder, output)
    expected = contents(output)
    for damage in (
        lambda: (output / "rows.csv").write_text("mine"),
        lambda: (output / "rows.csv").unlink(),
        lambda: (output / STATE / "rows.csv.json").write_text("{"),
        lambda: (output / STATE / "rows.csv.json").write_text("[]"),
    ):
        damage()
        predictions.clear()
        predict(cancer_run, folder, output)
        assert len(predictions) == 1
        assert contents(output) == expected


def test_a_folder_of_another_job_is_refused(cancer_run, diabetes_run, folder, tmp_path):
    output = tmp_path / "out"
    predict(cancer_run, folder, output)
    before = contents(output)
    message = (
        f"--output {output} holds results of another job: keep ['id'], now []; unseen 'error', "
        "now 'ignore'; give another folder, or remove that one"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(cancer_run, folder, output, keep=(), unseen="ignore")
    shutil.copytree(folder, tmp_path / "other")
    for run, source in ((diabetes_run, folder), (cancer_run, tmp_path / "other")):
        with pytest.raises(ArgumentError, match=r"^--output .* holds results of another job: "):
            predict(run, source, output)
    (output / STATE / "job.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"job\.json can't be used: .*; remove .*\.unisono, "):
        predict(cancer_run, folder, output)
    assert contents(output) == before


def test_results_without_their_input_are_told(cancer_run, folder, tmp_path):
    predict(cancer_run, folder, tmp_path / "out")
    (folder / "rows.csv").unlink()
    report = predict(cancer_run, folder, tmp_path / "out")
    assert report.notes[0] == (
        f"{tmp_path / 'out'} holds results of files that aren't in the input: rows.csv"
    )


def test_two_jobs_in_one_folder(cancer_run, folder, tmp_path):
    finished = Finished(tmp_path / "out")
    predict(cancer_run, folder, tmp_path / "out")
    message = f"another unisono predict is writing to {tmp_path / 'out'}"
    with finished.locked(), pytest.raises(ArgumentError, match=exactly(message)):
        predict(cancer_run, folder, tmp_path / "out")
    predict(cancer_run, folder, tmp_path / "out")


def test_ctrl_c_keeps_what_is_finished(cancer_run, folder, tmp_path, monkeypatch, predictions):
    def interrupt(loaded, source, *arguments, **options):
        if len(predictions) == 2:
            raise KeyboardInterrupt
        return counted(loaded, source, *arguments, **options)

    counted = piece_worker.predict_rows
    monkeypatch.setattr(piece_worker, "predict_rows", interrupt)
    request = PredictRequest(cancer_run, str(folder), str(tmp_path / "out"), KEEP, device="cpu")
    message = "interrupted; what is finished is kept, and the same command goes on from there"
    with pytest.raises(Interrupted, match=exactly(message)):
        run_predict(request, Console(quiet=True))
    monkeypatch.setattr(piece_worker, "predict_rows", counted)
    run_predict(request, Console(quiet=True))
    assert len(predictions) == 4  # each once


def test_an_input_that_changes_meanwhile(cancer_run, folder, tmp_path, monkeypatch, predictions):
    counted = piece_worker.predict_rows

    def append(loaded, source, *arguments, **options):
        found = counted(loaded, source, *arguments, **options)
        if source.endswith(".csv"):
            with open(source, "a") as file:
                file.write("\n")
        return found

    monkeypatch.setattr(piece_worker, "predict_rows", append)
    path = folder / "rows.csv"
    with pytest.raises(ArgumentError, match=rf"the others are finished: {path} changed while it"):
        predict(cancer_run, folder, tmp_path / "out")
    monkeypatch.setattr(piece_worker, "predict_rows", counted)
    predictions.clear()
    predict(cancer_run, folder, tmp_path / "out")
    assert [source for source, _ in predictions] == [str(path)]


# What can't be predicted --------------------------------------------------------------------------


def test_bad_files_are_named_and_the_others_finished(cancer_run, folder, tmp_path, predictions):
    (folder / "junk.parquet").write_text("junk")
    (folder / "b.csv").write_text("a,b\n1,2\n")
    output = tmp_path / "out"
    message = (
        "2 of 6 files can't be predicted, the others are finished: "
        f"{folder / 'b.csv'} lacks 4 of the 4 columns of the training: mean radius, mean texture, "
        f"size, marked; it has a, b; {folder / 'junk.parquet'} isn't a Parquet file that can be "
        "read: "
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        predict(cancer_run, folder, output)
    assert sorted(contents(output)) == sorted(NAMES)
    (folder / "junk.parquet").unlink()
    (folder / "b.csv").unlink()
    predictions.clear()
    assert predict(cancer_run, folder, output).rows == 0
    assert predictions == []


def test_many_bad_files_are_counted(cancer_run, folder, tmp_path):
    for k in range(13):
        (folder / f"bad{k:02}.parquet").touch()
    message = (
        r"^13 of 17 files can't .*: .*bad00\.parquet is empty; .*bad09.* is empty; and 3 more$"
    )
    with pytest.raises(ArgumentError, match=message):
        predict(cancer_run, folder, tmp_path / "out")


def test_what_training_never_saw_is_told_with_its_row(cancer_run, folder, tmp_path):
    frame = cancer_frame().fillna({"size": "tiny", "mean radius": 10.0})
    frame.loc[[250, 260], "size"] = "giant"
    frame.loc[500, "size"] = "dwarf"
    frame.to_parquet(folder / "large.parquet", row_group_size=60)
    path = folder / "large.parquet"
    with pytest.raises(
        ArgumentError,
        match=rf"^1 of 4 files .*: {path} has values that training never saw: column 'size': ",
    ):
        predict(cancer_run, folder, tmp_path / "out")
    assert "large.parquet" not in contents(tmp_path / "out")
    what = "column 'size': 'giant', 'dwarf' in 3 rows (first: row 251)"
    notes = [f"large.parquet: training never saw: {what}"]
    output = tmp_path / "ignored"
    assert predict(cancer_run, folder, output, unseen="ignore").notes == notes
    again = predict(cancer_run, folder, output, unseen="ignore").notes
    assert again == [*notes, f"649 rows of {output} were finished before"]


def test_paths_that_cannot_be(cancer_run, tables, folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "none").mkdir()
    table = str(tables / "cancer.csv")
    wrong = [
        (folder, tmp_path / "file", {}, "--output {output} is a file; give a folder"),
        (folder, folder / "out", {}, "--output {output} and --input {source}: one lies in the "),
        (folder, folder, {}, "--output {output} and --input {source}: one lies in the other; "),
        (folder, tmp_path, {}, "--output {output} and --input {source}: one lies in the other; "),
        (tmp_path / "none", tmp_path / "out", {}, "--input {source} has no file that ends in "),
        ("absent", tmp_path / "out", {"launch": 2}, "can't read absent: No such file or "),
        (folder, tmp_path / "out", {"launch": 0}, "--launch must be at least 1, got 0"),
        (table, "-", {"launch": 2}, "--output -: several processes write a folder; give the name"),
        (table, "out.csv", {"launch": 2}, "--output out.csv: several processes write a folder; "),
    ]
    for source, output, options, message in wrong:
        request = PredictRequest(cancer_run, str(source), str(output), device="cpu", **options)
        text = message.format(output=output, source=source)
        with pytest.raises(ArgumentError, match=f"^{re.escape(text)}"):
            run_predict(request, Console(quiet=True))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    request = PredictRequest(cancer_run, str(folder), "out", launch=2)
    with pytest.raises(ArgumentError, match=r"^--launch 2: this process was started by torchrun "):
        run_predict(request, Console(quiet=True))
    request = PredictRequest(cancer_run, str(folder), str(tmp_path / "out"))
    with pytest.raises(ArgumentError, match=r"^RANK is set, but the other processes aren't there"):
        run_predict(request, Console(quiet=True))
    assert sorted(os.listdir(tmp_path)) == ["file", "in", "none"]


def test_a_damaged_run_ends_the_job(cancer_run, folder, tmp_path):
    run = shutil.copytree(cancer_run, tmp_path / "run")
    (run / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"model\.safetensors can't be used: it isn't the file"):
        predict(run, folder, tmp_path / "out")


def test_a_full_disk_ends_the_job(cancer_run, folder, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 10:
            raise OSError(28, os.strerror(28))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    message = r"^can't write to .*: No space left on device; what is finished is kept, and the same"
    with pytest.raises(CommandError, match=message):
        predict(cancer_run, folder, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", fsync)
    report = predict(cancer_run, folder, tmp_path / "out")
    assert 0 < report.rows < 649


# Several ranks ------------------------------------------------------------------------------------


def in_threads(function, num_ranks, store=None):
    """What each rank returns or raises."""
    store = store or dist.HashStore()
    found = [None] * num_ranks

    def work(rank):
        try:
            name = name_of_this_start("predict", store, rank, num_ranks, timedelta(seconds=60))
            found[rank] = function(StoreRanks(dist.PrefixStore(name, store), rank, num_ranks))
        except CommandError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_ranks_share_out_the_pieces(cancer_run, folder, tmp_path, predictions):
    predict(cancer_run, folder, tmp_path / "one")
    once = sorted(predictions, key=str)
    predictions.clear()
    found = in_threads(lambda ranks: predict(cancer_run, folder, tmp_path / "two", ranks), 3)
    assert [None if own is None else own.rows for own in found] == [649, None, None]
    assert sorted(predictions, key=str) == once
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_error_of_rank_0_reaches_all(cancer_run, folder, tmp_path):
    def work(ranks):
        return predict(cancer_run, tmp_path / "absent", tmp_path / "out", ranks)

    (tmp_path / "absent").mkdir()
    texts = [str(own) for own in in_threads(work, 2)]
    assert texts == [f"--input {tmp_path / 'absent'} has no file that ends in .csv or .parquet"] * 2


def test_processes_that_are_started_anew_begin_with_nothing_claimed():
    store = dist.HashStore()
    store.set("word/1", "that of a process that died before it got its name")

    def work(ranks):
        return ranks.share(lambda: "plan"), sorted(ranks.add("claimed") for _ in range(3))

    for _ in range(3):
        found = in_threads(work, 2, store)
        assert [plan for plan, _ in found] == ["plan", "plan"]
        assert sorted(k for _, claimed in found for k in claimed) == [1, 2, 3, 4, 5, 6]


def test_a_rank_that_does_nothing_is_named():
    store = dist.HashStore()
    ranks = StoreRanks(store, 0, 3, patience=timedelta(seconds=0.3))
    StoreRanks(store, 1, 3).gather("done", lambda: None)
    message = r"^ranks 2 of 3 have done nothing for 0\.005 minutes; what is finished is kept, and "
    with pytest.raises(CommandError, match=message):
        ranks.gather("done", lambda: None)


def test_row_counts_are_those_of_all():
    seen = []
    ranks = Alone()
    count = piece_worker.RowCount(ranks, seen.append)
    count.add(3)
    ranks.add("rows", 4)  # another one
    count.look()
    assert seen == [3, 4]
    assert np.sum(seen) == ranks.add("rows", 0)
