"""Class names to embedding tables and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from text2weight.errors import InvalidInputError
from text2weight.text_encoder import TableTextEncoder, read_embedding_table
from text2weight_training.embed import collect_descriptions, collect_names, embed, embed_descriptions, save_table
from text2weight_training.files import TrainingDataError


class LetterEncoder:
    """A text encoder that counts letters."""

    name = "letters"
    fingerprint = "0"
    embedding_dim = 26

    def encode(self, texts: list[str]) -> torch.Tensor:
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return F.normalize(torch.tensor(counts).float(), dim=-1)


def test_round_trip_through_the_table_encoder(tmp_path: Path) -> None:
    names = ("apple", "maple tree", "bus")
    save_table(tmp_path / "e.safetensors", "fruit.a", embed(names, "a {}", LetterEncoder()))
    table = read_embedding_table(f"{tmp_path}/e.safetensors#fruit.a")
    assert (table.names, table.template, table.encoder) == (names, "a {}", "letters")
    expected = LetterEncoder().encode(["a bus", "a apple"])
    looked_up = TableTextEncoder.from_file(tmp_path / "e.safetensors", "fruit.a").encode(["a bus", "a apple"])
    torch.testing.assert_close(looked_up, expected)


def test_other_tables_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_table(path, "one", embed(("cat", "dog"), "a {}", LetterEncoder()))
    save_table(path, "two", embed(("bus",), "a photo of a {}", LetterEncoder()))
    save_table(path, "one", embed(("owl",), "the {}", LetterEncoder()))
    assert read_embedding_table(f"{path}#one").names == ("owl",)
    assert read_embedding_table(f"{path}#two").template == "a photo of a {}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.safetensors"]


def test_descriptions_become_a_table_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"maple_tree": "leaves", "Bus": ["a van", "a coach"]}')
    described = collect_descriptions(tmp_path / "d.json")
    save_table(tmp_path / "e.safetensors", "nl", embed_descriptions(described, LetterEncoder()))
    save_table(tmp_path / "e.safetensors", "names", embed(("bus",), "a {}", LetterEncoder()))  # the first one stays
    table = read_embedding_table(f"{tmp_path}/e.safetensors#nl")
    assert (table.names, table.template) == (("maple tree", "Bus"), "{}")
    assert table.descriptions == (("leaves",), ("a van", "a coach"))
    mean = LetterEncoder().encode(["a van", "a coach"]).mean(0)
    expected = torch.stack([LetterEncoder().encode(["leaves"])[0], mean / mean.norm()])
    torch.testing.assert_close(table.embeddings, expected)


def test_named_classes_must_be_the_described_ones(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"bus": "a van", "owl": "a bird"}')
    assert list(collect_descriptions(tmp_path / "d.json", ("owl", "bus"))) == ["owl", "bus"]
    with pytest.raises(InvalidInputError, match="no description of 'cat': describe every class"):
        collect_descriptions(tmp_path / "d.json", ("owl", "cat"))
    with pytest.raises(InvalidInputError, match="descriptions of 'bus', which are not among the classes"):
        collect_descriptions(tmp_path / "d.json", ("owl",))


def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("important")
    with pytest.raises(TrainingDataError, match="no embedding table file"):
        save_table(path, "one", embed(("cat",), "a {}", LetterEncoder()))
    assert path.read_text() == "important"


def test_names_come_from_files_and_arguments_once_each(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("maple_tree\n\n  bus \nCat\n", encoding="utf-8")
    assert collect_names([str(file), "cat", "قطة", "maple  tree"]) == ("maple tree", "bus", "Cat", "قطة")


def test_unusable_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="no class name"):
        collect_names([])
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(TrainingDataError, match="is not UTF-8"):
        collect_names([str(tmp_path / "names.txt")])
    with pytest.raises(InvalidInputError):
        collect_names(["cat\x00"])


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {name}", "{", "a {} {0}"])
def test_templates_need_one_place_for_the_name(template: str) -> None:
    with pytest.raises(TrainingDataError, match="exactly one"):
        embed(("cat",), template, LetterEncoder())
