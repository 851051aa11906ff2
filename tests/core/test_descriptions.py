"""Descriptions in place of names: the files, the embeddings, and heads generated from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import TINY_DIM, TINY_NAMES, save_tiny_checkpoint, tiny_table
from text2weight import Generator, HeadArtifact, read_head
from text2weight.checkpoint import TextEncoderConfig, read_config
from text2weight.descriptions import (
    ConditionText,
    embed_descriptions,
    match_descriptions,
    read_descriptions,
)
from text2weight.errors import CheckpointError, InvalidInputError
from text2weight.generator import GenerationRequest
from text2weight.text_encoder import (
    EmbeddingTable,
    TableTextEncoder,
    copy_embedding_table,
    read_embedding_table,
    write_embedding_tables,
)

CLASSES = ("apple", "bus", "lizard")
TEXTS = {"apple": "a round fruit", "bus": ["a long vehicle", "a van for many"], "lizard": "a reptile"}


class WordEncoder:
    """Embeds any text, as a random direction of its own."""

    name = "words"
    fingerprint = ""
    embedding_dim = TINY_DIM

    def encode(self, texts: list[str]) -> torch.Tensor:
        rows = [torch.randn(TINY_DIM, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        return F.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("described") / "checkpoint"
    save_tiny_checkpoint(folder, text_encoder=TextEncoderConfig(source="dir:none", name="words"))
    return Generator.load(folder, text_encoder=WordEncoder())


def assert_equal_heads(one: HeadArtifact, other: HeadArtifact) -> None:
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def weights_differ(one: HeadArtifact, other: HeadArtifact) -> bool:
    return any(not torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not JSON"),
            ("[]", "must be one JSON object of class names and texts, not a empty list"),
            ("{}", "no class is described"),
            ('{"bus": ""}', "a description of 'bus' is empty"),
            ('{"bus": "  "}', "a description of 'bus' is '  ': write a text"),
            ('{"bus": []}', "'bus' must be a text or a list of at least one, not empty list"),
            ('{"bus": ["a van", ""]}', "a description of 'bus' is empty"),
            ('{"bus": 3}', "'bus' must be a text or a list of at least one, not int"),
            ('{"bus": {"is": "a van"}}', "'bus' must be a text or a list of at least one, not object"),
            ('{"bus": "a van", "Bus ": "a long car"}', "repeats"),
            ('{"bus": "a van", "bus": "a long car"}', "repeats"),
            ('{"": "nothing"}', r"classes\[0\] is empty"),
            ('{"bus": "a \\ud800"}', "a description of 'bus' holds control characters"),
            (json.dumps({"bus": "x" * 2001}), "'bus' has 2001 characters: at most 2000"),
        ],
    )
    def test_unusable_files_say_what_is_wrong(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(InvalidInputError, match=message):
            read_descriptions(tmp_path / "d.json")

    def test_a_missing_file_and_one_that_is_not_text(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"absent.json cannot be read"):
            read_descriptions(tmp_path / "absent.json")
        (tmp_path / "d.json").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(InvalidInputError, match=r"d.json are not JSON"):
            read_descriptions(tmp_path / "d.json")

    def test_white_space_and_spelling_are_brought_into_one_form(self, tmp_path: Path) -> None:
        (tmp_path / "d.json").write_text('{"maple_tree": " a  tree\\nwith leaves ", "bus": ["a van", "a coach"]}')
        described = read_descriptions(tmp_path / "d.json")
        assert described == {"maple tree": ("a tree with leaves",), "bus": ("a van", "a coach")}


def test_every_class_needs_a_description_and_no_other_has_one() -> None:
    assert match_descriptions({"Bus": "a van", "apple": ["a", "b"]}, ("apple", "bus")) == (("a", "b"), ("a van",))
    with pytest.raises(InvalidInputError, match="no description of 'lizard', 'sea': describe every class") as caught:
        match_descriptions({"bus": "a van"}, ("lizard", "bus", "sea"))
    assert caught.value.field == "descriptions"
    with pytest.raises(InvalidInputError, match="descriptions of 'sea', which are not among the classes"):
        match_descriptions({"bus": "a van", "sea": "water"}, ("bus",))
    with pytest.raises(InvalidInputError, match="must be a dict"):
        match_descriptions([("bus", "a van")], ("bus",))  # type: ignore[arg-type]


def test_several_descriptions_are_averaged_and_brought_back_to_length_one() -> None:
    encoder = WordEncoder()
    one, two = encoder.encode(["a long vehicle", "a van for many"])
    rows = embed_descriptions([["a long vehicle"], ["a long vehicle", "a van for many"]], encoder)
    assert torch.equal(rows[0], one)
    torch.testing.assert_close(rows[1], (one + two) / (one + two).norm())


def test_descriptions_change_the_head_but_not_the_class_embeddings(generator: Generator) -> None:
    plain = generator.generate(CLASSES, seed=4)
    described = generator.generate(CLASSES, seed=4, descriptions=TEXTS)
    assert weights_differ(plain, described)
    assert torch.equal(described.class_embeddings, plain.class_embeddings)
    assert described.metadata["condition_text"].startswith("descriptions sha256:")
    assert "class_text" not in described.metadata
    assert plain.metadata == {k: v for k, v in described.metadata.items() if k != "condition_text"}
    assert read_head(described.to_bytes()).metadata == described.metadata
    other = generator.generate(CLASSES, seed=4, descriptions=TEXTS | {"apple": "a green fruit"})
    assert weights_differ(described, other)
    assert other.metadata["condition_text"] != described.metadata["condition_text"]


def test_descriptions_can_be_the_classifiers_texts_too(generator: Generator) -> None:
    condition = generator.generate(CLASSES, descriptions=TEXTS)
    both = generator.generate(CLASSES, descriptions=TEXTS, describe_classifier=True)
    assert_equal_heads(both, condition)
    expected = embed_descriptions(match_descriptions(TEXTS, CLASSES), WordEncoder())
    assert torch.equal(both.class_embeddings, expected)
    assert both.metadata["class_text"] == both.metadata["condition_text"] == condition.metadata["condition_text"]
    with pytest.raises(InvalidInputError, match="describe_classifier needs descriptions"):
        generator.generate(CLASSES, describe_classifier=True)


def test_the_prompts_as_descriptions_give_the_same_head_to_the_last_bit(generator: Generator) -> None:
    prompts = {name: f"a {name}" for name in CLASSES}
    assert_equal_heads(generator.generate(CLASSES, descriptions=prompts), generator.generate(CLASSES))


def test_a_table_of_names_cannot_embed_descriptions(tiny_checkpoint: Path) -> None:
    with pytest.raises(InvalidInputError, match="table:tiny cannot embed descriptions") as caught:
        Generator.load(tiny_checkpoint).generate(CLASSES, descriptions=TEXTS)
    assert caught.value.field == "descriptions"


def test_condition_embeddings_of_another_size_are_refused(generator: Generator) -> None:
    rows = torch.ones(3, TINY_DIM)
    request = GenerationRequest(CLASSES, rows, condition_text=ConditionText(rows[:2], "two"))
    with pytest.raises(InvalidInputError, match=r"embeddings of the condition are \(2, 8\), expected \(3, 8\)"):
        generator.generate_batch([request])


def described_table(names: tuple[str, ...] = TINY_NAMES, seed: int = 9) -> EmbeddingTable:
    return replace(tiny_table(names, seed), template="{}", descriptions=tuple((f"what is {name}",) for name in names))


def described_checkpoint(folder: Path, table: EmbeddingTable) -> Path:
    """A tiny checkpoint whose condition comes from a table of descriptions inside it."""
    (folder / "texts").mkdir(parents=True)
    write_embedding_tables(folder / "texts" / "table.safetensors", {"nl": table})
    config = TextEncoderConfig(source="table:condition_text/table.safetensors#nl", name="table:nl")
    parts = {"condition_text": folder / "texts"}
    save_tiny_checkpoint(folder / "checkpoint", condition_text=config, parts=parts)
    return folder / "checkpoint"


def test_a_checkpoint_brings_the_texts_of_its_condition(tmp_path: Path, tiny_checkpoint: Path) -> None:
    plain = Generator.load(tiny_checkpoint).generate(CLASSES)
    same = Generator.load(described_checkpoint(tmp_path / "same", replace(tiny_table(), template="{}")))
    assert_equal_heads(same.generate(CLASSES), plain)
    generator = Generator.load(described_checkpoint(tmp_path / "other", described_table()))
    made = generator.generate(CLASSES)
    assert weights_differ(made, plain)
    assert torch.equal(made.class_embeddings, plain.class_embeddings)
    assert made.metadata["condition_text"] == "table:nl"
    few = Generator.load(described_checkpoint(tmp_path / "few", described_table(TINY_NAMES[:2])))
    with pytest.raises(InvalidInputError, match="no embedding for") as caught:
        few.generate(CLASSES)
    assert caught.value.field == "classes"


def test_a_checkpoint_without_such_texts_does_not_mention_them(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """So the hash of checkpoints that were written before the field existed still fits."""
    assert "condition_text" not in json.loads((tiny_checkpoint / "config.json").read_text())
    folder = described_checkpoint(tmp_path, described_table())
    assert json.loads((folder / "config.json").read_text())["condition_text"]["name"] == "table:nl"
    assert read_config(folder).sha256 != read_config(tiny_checkpoint).sha256


class TestTable:
    def test_a_table_says_that_it_holds_descriptions(self, tmp_path: Path) -> None:
        write_embedding_tables(tmp_path / "t.safetensors", {"nl": described_table(), "names": tiny_table()})
        table = read_embedding_table(f"{tmp_path}/t.safetensors#nl")
        assert table.descriptions[1] == ("what is bus",)
        assert read_embedding_table(f"{tmp_path}/t.safetensors#names").descriptions == ()
        encoder = TableTextEncoder(table, "t")
        assert torch.equal(encoder.encode(["Bus"]), table.embeddings[1:2])
        copy_embedding_table(f"{tmp_path}/t.safetensors#nl", tmp_path / "copy.safetensors")
        copy = read_embedding_table(f"{tmp_path}/copy.safetensors")
        assert (copy.descriptions, copy.fingerprint) == (table.descriptions, table.fingerprint)

    def test_the_fingerprint_covers_the_descriptions(self, tmp_path: Path) -> None:
        table = described_table()
        reworded = replace(table, descriptions=(("something else",), *table.descriptions[1:]))
        prints = set()
        for i, either in enumerate((table, reworded)):
            write_embedding_tables(tmp_path / f"{i}.safetensors", {"nl": either})
            prints.add(read_embedding_table(f"{tmp_path}/{i}.safetensors#nl").fingerprint)
        assert len(prints) == 2

    @pytest.mark.parametrize(
        ("descriptions", "message"),
        [([["one"]], "1 descriptions for 10 names"), ([[]] * 10, "a list of texts"), ([[3]] * 10, "a list of texts")],
    )
    def test_descriptions_that_do_not_fit_are_refused(self, tmp_path: Path, descriptions: Any, message: str) -> None:
        write_embedding_tables(tmp_path / "t.safetensors", {"t": replace(tiny_table(), descriptions=descriptions)})
        with pytest.raises(CheckpointError, match=message):
            read_embedding_table(f"{tmp_path}/t.safetensors")
