from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.tiny import TINY_DIM, TINY_NAMES, tiny_table
from text2weight.errors import CheckpointError, InvalidInputError
from text2weight.text_encoder import (
    EmbeddingTable,
    OpenClipTextEncoder,
    TableTextEncoder,
    TextEncoder,
    Vocabulary,
    load_text_encoder,
    read_embedding_table,
    read_vocabulary,
    write_embedding_tables,
)

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL_CONFIG = {
    "embed_dim": TINY_DIM,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tower"
    folder.mkdir()
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**MODEL_CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    file = tmp_path / "table.safetensors"
    write_embedding_tables(file, {"tiny": tiny_table(), "other": tiny_table(("sea", "sun"), seed=4)})
    return file


class TestOpenClip:
    def test_embeddings_have_length_one_and_never_vary(self, clip_folder: Path) -> None:
        encoder = OpenClipTextEncoder.from_directory(clip_folder)
        assert isinstance(encoder, TextEncoder)
        assert encoder.embedding_dim == TINY_DIM
        texts = ["a lizard", "a \N{LIZARD}", "a \u05d7\u05ea\u05d5\u05dc", "a " + "very " * 60 + "long name"]
        embeddings = encoder.encode(texts)
        assert embeddings.shape == (4, TINY_DIM)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
        assert torch.equal(encoder.encode(texts), embeddings)
        torch.testing.assert_close(encoder.encode(texts[:1]), embeddings[:1])
        again = load_text_encoder(f"dir:{clip_folder}")
        assert torch.equal(again.encode(texts), embeddings)
        assert again.fingerprint == encoder.fingerprint

    def test_more_texts_than_one_batch(self, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = OpenClipTextEncoder.from_directory(clip_folder)
        texts = [f"a number {i}" for i in range(7)]
        expected = encoder.encode(texts)
        monkeypatch.setattr("text2weight.text_encoder.ENCODE_BATCH", 3)
        torch.testing.assert_close(encoder.encode(texts), expected)

    def test_embeddings_can_be_trained_on(self, clip_folder: Path) -> None:
        embeddings = OpenClipTextEncoder.from_directory(clip_folder).encode(["a bus"])
        layer = torch.nn.Linear(TINY_DIM, 1)
        layer(embeddings).sum().backward()
        assert layer.weight.grad is not None

    def test_the_fingerprint_tells_weights_apart(self, clip_folder: Path, tmp_path: Path) -> None:
        changed = tmp_path / "changed"
        shutil.copytree(clip_folder, changed)
        weights = load_file(changed / "open_clip_model.safetensors")
        weights["text_projection"][0, 0] += 1e-3
        save_file(weights, changed / "open_clip_model.safetensors")
        before = OpenClipTextEncoder.from_directory(clip_folder).fingerprint
        assert OpenClipTextEncoder.from_directory(changed).fingerprint != before

    def test_the_fingerprint_tells_activations_apart(self, clip_folder: Path, tmp_path: Path) -> None:
        changed = tmp_path / "changed"
        shutil.copytree(clip_folder, changed)
        config = {"model_cfg": MODEL_CONFIG | {"quick_gelu": True}, "preprocess_cfg": {}}
        (changed / "open_clip_config.json").write_text(json.dumps(config))
        one, other = (OpenClipTextEncoder.from_directory(folder) for folder in (clip_folder, changed))
        assert not torch.equal(one.encode(["apple"]), other.encode(["apple"]))
        assert one.fingerprint != other.fingerprint

    @pytest.mark.parametrize("missing", ["open_clip_config.json", "open_clip_model.safetensors"])
    def test_a_folder_must_be_whole(self, clip_folder: Path, tmp_path: Path, missing: str) -> None:
        # Without the weights open_clip would go on with random ones.
        folder = tmp_path / "tower"
        shutil.copytree(clip_folder, folder)
        (folder / missing).unlink()
        with pytest.raises(CheckpointError, match=missing):
            OpenClipTextEncoder.from_directory(folder)

    def test_damaged_or_unfitting_files_are_refused(self, clip_folder: Path, tmp_path: Path) -> None:
        for name, content in {
            "open_clip_config.json": b"{",
            "open_clip_model.safetensors": b"garbage",
        }.items():
            folder = tmp_path / name
            shutil.copytree(clip_folder, folder)
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="cannot be loaded"):
                OpenClipTextEncoder.from_directory(folder)
        folder = tmp_path / "other"
        shutil.copytree(clip_folder, folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["embed_dim"] = TINY_DIM * 2
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            OpenClipTextEncoder.from_directory(folder)

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize("source", ["open_clip:NoSuchModel/openai", "open_clip:ViT-B-32/no_such_tag"])
    def test_unknown_names_are_refused_without_a_download(self, source: str) -> None:
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_text_encoder(source)


class TestTable:
    def test_names_are_found_by_name_and_first_synonym_in_any_case(self, table_file: Path) -> None:
        encoder = TableTextEncoder.from_file(table_file, "tiny")
        assert isinstance(encoder, TextEncoder)
        assert encoder.embedding_dim == TINY_DIM
        embeddings = encoder.encode(["a bus", "a Cat", "a cat, house cat", "a MAPLE TREE", "a maple_tree"])
        expected = tiny_table().embeddings[[1, 4, 4, 5, 5]]
        torch.testing.assert_close(embeddings, expected)

    def test_a_full_name_wins_over_a_synonym(self) -> None:
        table = EmbeddingTable("a {}", ("crane, bird", "Crane"), torch.eye(2))
        assert table.rows == {"crane, bird": 0, "crane": 1}

    def test_names_match_however_their_accents_are_stored(self) -> None:
        table = EmbeddingTable("{} photo", ("cafe\u0301_bar", "bus"), torch.eye(2))
        encoder = TableTextEncoder(table, "t")
        assert torch.equal(encoder.encode(["caf\u00e9 bar photo"]), torch.eye(2)[:1])

    @pytest.mark.parametrize("text", ["a zebra", "zebra", "", "a", "a photo of a bus", "a house cat"])
    def test_unknown_names_are_refused(self, table_file: Path, text: str) -> None:
        encoder = TableTextEncoder.from_file(table_file, "tiny")
        with pytest.raises(InvalidInputError, match="choose among the names of table:tiny") as caught:
            encoder.encode(["a bus", text])
        assert caught.value.field == "classes"

    def test_changing_the_result_leaves_the_table_alone(self, table_file: Path) -> None:
        encoder = TableTextEncoder.from_file(table_file, "tiny")
        encoder.encode(["a bus"]).zero_()
        assert float(encoder.encode(["a bus"]).norm()) == pytest.approx(1)

    def test_the_fingerprint_tells_tables_apart(self, table_file: Path) -> None:
        fingerprints = {
            TableTextEncoder(table, "t").fingerprint
            for table in (
                tiny_table(),
                tiny_table(seed=1),
                tiny_table(tuple(reversed(TINY_NAMES))),
                EmbeddingTable("one {}", TINY_NAMES, tiny_table().embeddings),
            )
        }
        assert len(fingerprints) == 4
        assert TableTextEncoder.from_file(table_file, "tiny").fingerprint in fingerprints

    def test_the_fingerprint_is_of_what_the_file_holds(self, tmp_path: Path) -> None:
        # Normalising rounds differently on other processors; a checkpoint must know its table everywhere.
        stored = EmbeddingTable("a {}", TINY_NAMES, 7 * tiny_table().embeddings)
        write_embedding_tables(tmp_path / "t", {"t": stored})
        assert TableTextEncoder.from_file(tmp_path / "t", "t").fingerprint == TableTextEncoder(stored, "t").fingerprint


class TestTableFiles:
    def test_round_trip(self, table_file: Path) -> None:
        table = read_embedding_table(f"{table_file}#tiny")
        assert (table.template, table.names) == ("a {}", TINY_NAMES)
        torch.testing.assert_close(table.embeddings, tiny_table().embeddings)
        assert read_embedding_table(f"{table_file}#other").names == ("sea", "sun")
        assert not list(table_file.parent.glob("*.tmp"))

    def test_the_only_table_needs_no_name(self, tmp_path: Path) -> None:
        write_embedding_tables(tmp_path / "one.safetensors", {"only": tiny_table()})
        assert read_embedding_table(str(tmp_path / "one.safetensors")).names == TINY_NAMES

    def test_rows_get_length_one(self, tmp_path: Path) -> None:
        table = tiny_table()
        half = EmbeddingTable(table.template, table.names, (7 * table.embeddings).half())
        write_embedding_tables(tmp_path / "half.safetensors", {"t": half})
        read = read_embedding_table(f"{tmp_path}/half.safetensors#t").embeddings
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, table.embeddings, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("name", ["#nothing", "", "#"])
    def test_a_missing_table_is_named_with_those_there_are(self, table_file: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match="it holds other, tiny"):
            read_embedding_table(f"{table_file}{name}")

    def test_files_that_cannot_be_read_are_refused(self, tmp_path: Path, table_file: Path) -> None:
        data = table_file.read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) // 2])
        (tmp_path / "text").write_text("apple,bus")
        (tmp_path / "empty").write_bytes(b"")
        for name in ("absent", "cut", "text", "empty", "."):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read_embedding_table(f"{tmp_path / name}#tiny")

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            (None, "lacks its list of names"),
            ("{", "cannot be read"),
            ("[]", "lacks its list of names"),
            ('{"template": "a {}", "names": ["a", "b"], "encoder": 3}', "has encoder 3"),
            ('{"template": "a {}"}', "lacks its list of names"),
            ('{"template": "a {}", "names": "ab"}', "lacks its list of names"),
            ('{"template": "a {}", "names": ["a", 2]}', "lacks its list of names"),
            ('{"names": ["a", "b"]}', "one {} must stand for the name"),
            ('{"template": "a", "names": ["a", "b"]}', "one {} must stand for the name"),
            ('{"template": "a {} {}", "names": ["a", "b"]}', "one {} must stand for the name"),
            ('{"template": "a {} {0}", "names": ["a", "b"]}', "one {} must stand for the name"),
            ('{"template": "a {}", "names": ["a", "b", "c"]}', r"3 names for a \(2, 8\) tensor"),
        ],
    )
    def test_metadata_must_fit(self, tmp_path: Path, description: str | None, message: str) -> None:
        metadata = {} if description is None else {"t": description}
        save_file({"t": torch.ones(2, TINY_DIM)}, tmp_path / "t", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            read_embedding_table(f"{tmp_path}/t#t")

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.tensor([[1.0, float("nan")], [1.0, 0.0]]), "zero or not finite"),
            (torch.tensor([[1.0, float("inf")], [1.0, 0.0]]), "zero or not finite"),
            (torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "zero or not finite"),
            (torch.ones(2), r"2 names for a \(2,\) tensor"),
        ],
    )
    def test_rows_must_be_directions(self, tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
        metadata = {"t": json.dumps({"template": "a {}", "names": ["a", "b"]})}
        save_file({"t": tensor}, tmp_path / "t", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            read_embedding_table(f"{tmp_path}/t#t")


def test_sources_name_their_kind(table_file: Path) -> None:
    assert load_text_encoder(f"table:{table_file}#tiny").name == "table:tiny"
    for source in ("", "ViT-B-32/openai", "open_clip:ViT-B-32", "https://example.org", f"file:{table_file}"):
        with pytest.raises(CheckpointError, match="give open_clip:ARCH/TAG, dir:PATH or table:FILE#TABLE"):
            load_text_encoder(source)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no development data at {REAL_DATA}")
class TestRealTables:
    def test_every_table_has_its_size(self) -> None:
        file = REAL_DATA / "clip_vitb32_text.safetensors"
        sizes = {"cifar100.a": 100, "tiny_imagenet.a": 200, "tiny_imagenet.photo": 200, "imagenet1k.photo": 1000}
        for name, size in sizes.items():
            table = read_embedding_table(f"{file}#{name}")
            assert table.embeddings.shape == (size, 512)
            torch.testing.assert_close(table.embeddings.norm(dim=-1), torch.ones(size))

    def test_related_names_are_closer_than_unrelated_ones(self) -> None:
        encoder = load_text_encoder(f"table:{REAL_DATA / 'clip_vitb32_text.safetensors'}#cifar100.a")
        embeddings = encoder.encode(["a apple", "a pear", "a motorcycle", "a Maple_Tree"])
        centred = F.normalize(embeddings - embeddings.mean(0), dim=-1)
        assert float(centred[0] @ centred[1]) > float(centred[0] @ centred[2]) + 0.3

    def test_imagenet_names_are_found_by_their_first_synonym(self) -> None:
        table = read_embedding_table(f"{REAL_DATA / 'clip_vitb32_text.safetensors'}#imagenet1k.photo")
        assert table.names[table.rows["tench"]] == "tench, Tinca tinca"
        assert table.names[table.rows["tench, tinca tinca"]] == "tench, Tinca tinca"


class TestVocabulary:
    def test_names_are_known_in_any_case_and_by_their_first_synonym(self) -> None:
        vocabulary = Vocabulary(("a {}",), ("cat, house cat", "Maple tree"))
        assert all(name in vocabulary for name in ("cat", "CAT", "cat, house cat", "maple_tree"))
        assert all(name not in vocabulary for name in ("house cat", "maple", ""))

    def test_a_folder_states_it_and_need_not(self, clip_folder: Path, tmp_path: Path) -> None:
        assert OpenClipTextEncoder.from_directory(clip_folder).vocabulary is None
        folder = tmp_path / "tower"
        shutil.copytree(clip_folder, folder)
        (folder / "vocabulary.json").write_text('{"templates": ["a {}"], "names": ["apple"]}')
        encoder = OpenClipTextEncoder.from_directory(folder)
        assert encoder.vocabulary == Vocabulary(("a {}",), ("apple",))
        assert encoder.fingerprint == OpenClipTextEncoder.from_directory(clip_folder).fingerprint

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", '{"names": ["a"]}', '{"templates": "a {}", "names": ["a"]}', '{"templates": [], "names": [1]}'],
    )
    def test_a_damaged_one_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(CheckpointError, match="vocabulary"):
            read_vocabulary(tmp_path / "vocabulary.json")

    def test_a_table_knows_its_names(self, table_file: Path) -> None:
        assert TableTextEncoder.from_file(table_file, "other").vocabulary == Vocabulary(("a {}",), ("sea", "sun"))
