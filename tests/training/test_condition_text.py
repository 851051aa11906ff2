"""Another text for the condition than for the classifier: only what the denoiser reads changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from tests.training.conftest import Toy
from tests.training.toy import TEXT_DIM, toy_preset, toy_table, write_preset
from text2weight.checkpoint import read_config
from text2weight.generator import Generator
from text2weight.text_encoder import EmbeddingTable, TableTextEncoder, write_embedding_tables
from text2weight_training.baselines import pooled_text
from text2weight_training.evaluate import generate_heads, load_generator, task_requests
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.hypernetwork import describe_tasks
from text2weight_training.model_cli import fit_app
from text2weight_training.tasks import TaskData, load_task_data
from text2weight_training.train import train
from text2weight_training.zoo import check_zoo_fits


def described(noise: float = 0.5) -> EmbeddingTable:
    """Descriptions say what names say, and something else."""
    table = toy_table()
    other = noise * torch.randn(table.embeddings.shape, generator=torch.Generator().manual_seed(1))
    texts = tuple((f"what is a {name}",) for name in table.names)
    return replace(table, template="{}", embeddings=F.normalize(table.embeddings + other, dim=-1), descriptions=texts)


def load_with(toy: Toy, folder: Path, table: EmbeddingTable) -> TaskData:
    write_embedding_tables(folder / "nl.safetensors", {"nl": table})
    return load_task_data([toy.features], toy.text, condition_text=f"{folder}/nl.safetensors#nl")


def run_fit(toy: Toy, data: TaskData, folder: Path) -> Fit:
    fit = Fit(data, toy.zoo, toy_preset(fit__steps=3), folder / "state.pt", "cpu")
    fit.run()
    return fit


@pytest.fixture(scope="module")
def plain_fit(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return run_fit(toy, toy.data, tmp_path_factory.mktemp("plain"))


def test_by_default_the_condition_is_the_class_embeddings(toy: Toy) -> None:
    assert toy.data.condition_embeddings is toy.data.embeddings
    assert toy.data.condition_fingerprint == ""


def test_a_table_of_conditions_leaves_classifier_and_zoo_alone(toy: Toy, tmp_path: Path) -> None:
    data = load_with(toy, tmp_path, described())
    assert torch.equal(data.embeddings, toy.data.embeddings)
    assert data.fingerprint == toy.data.fingerprint
    check_zoo_fits(toy.zoo, data, toy.preset)
    torch.testing.assert_close(data.condition_embeddings, described().embeddings)
    assert not torch.equal(data.condition_embeddings, data.embeddings)


def test_equal_tables_train_and_generate_the_same_numbers(toy: Toy, tmp_path: Path, plain_fit: Fit) -> None:
    data = load_with(toy, tmp_path, toy_table())
    fit = run_fit(toy, data, tmp_path)
    for one, other in zip(fit.average.parameters(), plain_fit.average.parameters(), strict=True):
        assert torch.equal(one, other)
    heads = []
    for name, trained, known in (("same", fit, data), ("plain", plain_fit, toy.data)):
        trained.write_checkpoint(tmp_path / name)
        generator = load_generator(tmp_path / name, known, toy.zoo, toy.preset)
        heads.append(generate_heads(generator, known, list(toy.zoo.split.unseen[:3]), "ddim", 3))
    assert torch.equal(*heads)


def test_another_table_changes_training_and_heads_but_not_class_embeddings(
    toy: Toy, tmp_path: Path, plain_fit: Fit
) -> None:
    data = load_with(toy, tmp_path, described())
    fit = run_fit(toy, data, tmp_path)
    center = data.condition_embeddings.mean(0)
    torch.testing.assert_close(fit.denoiser.embedding_center, center)
    changed = zip(fit.average.parameters(), plain_fit.average.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in changed)
    fit.write_checkpoint(tmp_path / "checkpoint")
    generator = load_generator(tmp_path / "checkpoint", data, toy.zoo, toy.preset)
    task = toy.zoo.split.unseen[0]
    (request,) = task_requests(data, [task], "mean", 1)
    (artifact,) = generator.generate_batch([request])
    (by_names,) = generator.generate_batch([replace(request, condition_text=None)])
    assert torch.equal(artifact.class_embeddings, toy.data.embeddings[list(task)])
    assert torch.equal(artifact.class_embeddings, by_names.class_embeddings)
    # The checkpoint brings the same texts along: without any in the request it reads those.
    assert all(torch.equal(artifact.tensors[name], by_names.tensors[name]) for name in artifact.tensors)
    names_only = replace(request, condition_text=replace(request.condition_text, embeddings=request.embeddings))  # type: ignore[type-var]
    (other,) = generator.generate_batch([names_only])
    assert any(not torch.equal(artifact.tensors[name], other.tensors[name]) for name in artifact.tensors)


def test_the_checkpoint_records_and_carries_the_texts(toy: Toy, tmp_path: Path) -> None:
    data = load_with(toy, tmp_path, described())
    fit = Fit(data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu")
    fit.write_checkpoint(tmp_path / "checkpoint")
    config = read_config(tmp_path / "checkpoint")
    assert config.condition_text is not None
    assert config.condition_text.model_dump() == {
        "source": "table:condition_text/table.safetensors#nl",
        "name": "table:nl",
        "fingerprint": data.condition_fingerprint,
    }
    assert config.text_encoder.fingerprint == TableTextEncoder.from_file(*toy.text.split("#")).fingerprint
    assert "condition_text/table.safetensors" in config.files
    (tmp_path / "nl.safetensors").unlink()
    assert Generator.load(tmp_path / "checkpoint").generate(["apple", "bus"]).metadata["condition_text"] == "table:nl"


def test_a_checkpoint_is_measured_with_the_texts_it_was_trained_on(toy: Toy, tmp_path: Path, plain_fit: Fit) -> None:
    data = load_with(toy, tmp_path, described())
    plain_fit.write_checkpoint(tmp_path / "plain")
    with pytest.raises(TrainingDataError, match=r"made from the class embeddings: give the same --condition-text"):
        load_generator(tmp_path / "plain", data, toy.zoo, toy.preset)
    Fit(data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu").write_checkpoint(tmp_path / "nl")
    with pytest.raises(TrainingDataError, match=r"made from the texts of table:nl: give the same --condition-text"):
        load_generator(tmp_path / "nl", toy.data, toy.zoo, toy.preset)


def test_baselines_read_the_condition(toy: Toy, tmp_path: Path) -> None:
    data, tasks, zero = load_with(toy, tmp_path, described()), toy.zoo.split.unseen[:2], torch.zeros(TEXT_DIM)
    swapped = replace(toy.data, embeddings=data.condition_embeddings)
    for read in (pooled_text, describe_tasks):
        assert torch.equal(read(data, tasks, zero), read(swapped, tasks, zero))
        assert not torch.equal(read(data, tasks, zero), read(toy.data, tasks, zero))


def test_a_run_does_not_go_on_with_other_texts(toy: Toy, tmp_path: Path) -> None:
    data = load_with(toy, tmp_path, described())
    Fit(data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu").save()
    with pytest.raises(TrainingDataError, match="belongs to a fit with other condition texts"):
        Fit(toy.data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu").resume()
    assert Fit(data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu").resume()


def test_an_older_state_and_run_without_texts_go_on(toy: Toy, tmp_path: Path) -> None:
    fit = Fit(toy.data, toy.zoo, toy.preset, tmp_path / "state.pt", "cpu")
    fit.save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["condition_text"]
    torch.save(state, tmp_path / "state.pt")
    assert fit.resume()
    run = {"data": toy.data.fingerprint, "preset": toy.preset.run_description(), "minutes": None, "backbone": None}
    (tmp_path / "run.json").write_text(json.dumps(run))
    data = load_with(toy, tmp_path, described())
    with pytest.raises(TrainingDataError, match="holds a run with another condition_text"):
        train(data, toy.preset, tmp_path)


@pytest.mark.parametrize(
    ("names", "size", "message"),
    [
        (("pear",), TEXT_DIM, r"has nothing for 1 of 12 classes: apple; add them and run `t2w embed` again"),
        ((), TEXT_DIM + 1, r"has 9 numbers per text, the class embeddings 8: embed both with one text encoder"),
    ],
)
def test_a_table_that_does_not_fit(toy: Toy, tmp_path: Path, names: tuple[str, ...], size: int, message: str) -> None:
    table = toy_table()
    rows = F.pad(table.embeddings, (0, size - TEXT_DIM), value=0.1)
    changed = EmbeddingTable("{}", (*names, *table.names[len(names) :]), rows)
    with pytest.raises(TrainingDataError, match=message):
        load_with(toy, tmp_path, changed)


def test_a_text_encoder_is_no_condition_text(toy: Toy) -> None:
    with pytest.raises(TrainingDataError, match=r"condition text dir:tower: give a table, FILE#TABLE"):
        load_task_data([toy.features], toy.text, condition_text="dir:tower")


def test_the_option_of_the_command(toy: Toy, tmp_path: Path) -> None:
    write_embedding_tables(tmp_path / "nl.safetensors", {"nl": described()})
    preset = write_preset(tmp_path / "toy.yaml", fit__steps=1)
    arguments = ["--zoo", toy.zoo_folder, "--features", toy.features, "--text", toy.text, "--preset", preset]
    arguments += ["--condition-text", f"{tmp_path}/nl.safetensors#nl", "--out", tmp_path / "checkpoint"]
    result = CliRunner().invoke(fit_app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    condition = read_config(tmp_path / "checkpoint").condition_text
    assert condition is not None
    assert condition.name == "table:nl"


def test_scores_use_the_classifiers_texts(toy: Toy, tmp_path: Path) -> None:
    from text2weight_training.baselines import accuracies

    data, tasks = load_with(toy, tmp_path, described(noise=5.0)), list(toy.zoo.split.unseen[:3])
    measured = [
        accuracies(known, toy.preset.head, tasks, {"universal": toy.zoo.universal})["universal"]
        for known in (data, toy.data)
    ]
    np.testing.assert_array_equal(*measured)
