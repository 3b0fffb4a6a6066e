"""Folders for the Hugging Face Hub: read back, valid there, and no page of a user overwritten."""

import json
import math
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

from markdown_blocks import find_blocks
from unisono import CheckpointError, Ensemble, EnsembleWarning, Evaluation, evaluate, hub
from unisono.checkpoint.ensemble_file import open_ensemble
from unisono.model_card import _number, was_edited


def make_net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def ens():
    return Ensemble.build(make_net, 3)


@pytest.fixture
def metrics(ens):
    return evaluate(ens, (torch.randn(40, 4), torch.randint(3, (40,))), task="classification")


def test_a_folder_loads(tmp_path, ens):
    folder = hub.save(ens, tmp_path / "a" / "three-nets")
    assert folder == tmp_path / "a" / "three-nets"
    back = Ensemble.load(folder, make_net)
    for name, tensor in ens.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["members"], config["member_parameters"]) == (3, 51)
    assert config["member_class"] == "torch.nn.modules.container.Sequential"
    with open_ensemble(folder) as (_, facts):
        assert facts.members == 3


def test_the_hub_reads_the_card(tmp_path, ens, metrics):
    folder = hub.save(
        ens,
        tmp_path / 'odd: "name"',
        metrics=metrics,
        dataset="my data: 2026",
        license="bsd-3-clause",
        tags=["yes", "tabular", "ensemble"],
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "unisono"
    assert card.data.license == "bsd-3-clause"
    assert card.data.tags[-2:] == ["yes", "tabular"]
    assert card.data.tags.count("ensemble") == 1
    assert card.data.model_name == 'odd: "name"'
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == dict(metrics.combined)
    for result in card.data.eval_results:
        assert (result.task_type, result.dataset_name) == ("classification", "my data: 2026")
    assert not card.data.to_dict().get("pipeline_tag")


def test_a_card_without_metrics(tmp_path, ens):
    card = ModelCard.load(hub.save(ens, tmp_path / "nets") / "README.md")
    assert card.data.eval_results is None
    assert "An ensemble of 3 models" in card.text
    assert "## Scores" not in card.text


def test_scores_of_all_members_are_in_a_table(tmp_path, ens, metrics):
    text = (hub.save(ens, tmp_path / "nets", metrics=metrics) / "README.md").read_text()
    assert "Classification of 40 rows of held-out data, by `unisono.evaluate`." in text
    names = list(metrics.members)
    assert f"| | {' | '.join(names)} |" in text
    row = " | ".join(f"{metrics.members[name][2]:.4g}" for name in names)
    assert f"| member 2 | {row} |" in text
    row = " | ".join(f"{metrics.combined[name]:.4g}" for name in names)
    assert f"| **all together** | {row} |" in text


def test_numbers_that_are_not_finite_or_small(tmp_path, ens):
    many = np.linspace(0, 1, 60)
    found = Evaluation(
        *("regression", 9, {"rmse": many, "r2": many}, {"rmse": 1e-20, "r2": math.nan}),
        uncertainty={"total": 1.0, "aleatoric": 0.5, "epistemic": 0.5},
    )
    folder = hub.save(ens, tmp_path / "nets", metrics=found)
    card = ModelCard.load(folder / "README.md")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"rmse": 1e-20}
    assert "| ... and 10 more |" in card.text
    assert [_number(x) for x in (0.5, 1e-20, 1.5e20, 2)] == ["0.5", "1.0e-20", "1.5e+20", "2.0"]


def test_the_code_on_the_card_runs(tmp_path, ens, monkeypatch):
    folder = hub.save(ens, tmp_path / "nets", make_model=make_net)
    (block,) = find_blocks((folder / "README.md").read_text().partition("\n---\n")[2])
    assert f"from {__name__} import make_net as make_model\n" in block.source
    monkeypatch.chdir(folder)
    namespace = {}
    exec(block.source, namespace)
    assert len(namespace["ens"]) == 3


@pytest.mark.parametrize("make_model", [None, lambda: make_net()], ids=["none", "lambda"])
def test_the_code_asks_for_what_has_no_name(tmp_path, ens, make_model):
    folder = hub.save(ens, tmp_path / "nets", make_model=make_model)
    text = (folder / "README.md").read_text()
    assert "# return a torch.nn.modules.container.Sequential, as it was made for training" in text


def test_a_shared_part_is_told(tmp_path):
    ens = Ensemble.build(make_net, 3, shared="0.*")
    folder = hub.save(ens, tmp_path / "nets")
    assert "with 51 parameters each, of which all members share 30." in (
        folder / "README.md"
    ).read_text().replace("\n", " ")


# A card that is there -----------------------------------------------------------------------------


def test_an_edited_card_stays_and_that_is_said(tmp_path, ens):
    folder = hub.save(ens, tmp_path / "nets")
    page = folder / "README.md"
    page.write_text("# Mine\n" + page.read_text())
    edited = page.read_text()
    other = Ensemble.build(make_net, 4)
    message = f"hub.save: {page} was edited, so it stays as it is; the weights are new."
    with pytest.warns(EnsembleWarning, match=f"^{re.escape(message)}"):
        hub.save(other, folder)
    assert page.read_text() == edited
    assert len(Ensemble.load(folder, make_net)) == 4
    hub.save(other, folder, card="replace")
    assert "An ensemble of 4 models" in page.read_text()


@pytest.mark.parametrize("content", [b"", b"# Mine\n", b"\xff\xfe"], ids=["empty", "own", "bytes"])
def test_a_page_of_another_origin_stays(tmp_path, ens, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.warns(EnsembleWarning, match="was edited, so it stays"):
        hub.save(ens, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_card_as_it_was_written_is_written_anew(tmp_path, ens, metrics):
    folder = hub.save(ens, tmp_path / "nets")
    page = folder / "README.md"
    page.write_bytes(page.read_bytes().replace(b"\n", b"\r\n"))  # what git may do on Windows
    assert not was_edited(page.read_text())
    hub.save(ens, folder, metrics=metrics)
    assert "## Scores" in page.read_text()


def test_what_cannot_be(tmp_path, ens):
    with pytest.raises(ValueError, match=r"^hub\.save: card is 'keep' or 'replace'; got 'none'$"):
        hub.save(ens, tmp_path / "a", card="none")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        hub.save(ens, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# Folders of others --------------------------------------------------------------------------------


def save_sharded(folder, state):
    """As ``save_pretrained(max_shard_size=...)`` of transformers writes it."""
    folder.mkdir()
    names = list(state)
    parts = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for file, own in parts.items():
        save_file({n: state[n] for n in own}, folder / file, metadata={"format": "pt"})
    weights = {name: file for file, own in parts.items() for name in own}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def test_sharded_folders_become_an_ensemble(tmp_path):
    models = [make_net() for _ in range(3)]
    folders = [save_sharded(tmp_path / f"{i}", m.state_dict()) for i, m in enumerate(models)]
    found = Ensemble.from_checkpoints(make_net, folders)
    for i, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[i].state_dict()[name], tensor), name


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = save_sharded(tmp_path / "0", make_net().state_dict())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError), match=r"model-00002-of-00002\.safetensors"):
        Ensemble.from_checkpoints(make_net, [folder])
