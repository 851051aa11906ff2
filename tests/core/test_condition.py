from __future__ import annotations

import math
import re
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TINY_DIM, pad_embeddings, tiny_condition
from text2weight.condition import (
    MAX_CLASSES,
    MAX_NAME_LENGTH,
    condition_on_classes,
    normalise_class_names,
    prior_attention,
    union_of_tasks,
)
from text2weight.errors import InvalidInputError


def test_names_take_one_form() -> None:
    names = normalise_class_names(["  golden   retriever ", "sea_lion", "caf" + "e\u0301", "tab\there\n"])
    assert names == ("golden retriever", "sea lion", "caf\u00e9", "tab here")


@pytest.mark.parametrize(
    "name",
    [
        "\N{LIZARD}",
        "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
        "\N{REGIONAL INDICATOR SYMBOL LETTER D}\N{REGIONAL INDICATOR SYMBOL LETTER E}",
        "\u05d7\u05ea\u05d5\u05dc",
        "\u0642\u0637\u0629 \u0635\u063a\u064a\u0631\u0629",
        "\u8d64\u3044\u30ea\u30f3\u30b4",
        "n\u00e4\u00efve r\u00e9sum\u00e9",
        "x" * MAX_NAME_LENGTH,
    ],
    ids=["emoji", "joined emoji", "flag", "hebrew", "arabic", "japanese", "accents", "longest"],
)
def test_names_in_any_script_are_kept(name: str) -> None:
    assert normalise_class_names([name, "bus"]) == (name, "bus")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("apple", "must be a list"),
        (None, "must be a list"),
        ({"apple", "bus"}, "must be a list"),
        (iter(["apple", "bus"]), "must be a list"),
        ([], "0 class names given: allowed are 2 to 256"),
        (["apple"], "1 class names given"),
        ([f"class {i}" for i in range(MAX_CLASSES + 1)], "257 class names given"),
        (["apple", 3], r"classes\[1\] is a int: names must be strings"),
        (["apple", None], r"classes\[1\] is a NoneType"),
        ([["apple"], "bus"], r"classes\[0\] is a list"),
        ([b"apple", "bus"], r"classes\[0\] is a bytes"),
        (["apple", ""], r"classes\[1\] is empty"),
        ([" \t\n", "bus"], r"classes\[0\] is empty"),
        (["apple", "___"], r"classes\[1\] is empty"),
        (["apple", "\u3000\u00a0"], r"classes\[1\] is empty"),
        (["apple", "\u200b\u200f"], r"classes\[1\] is empty"),
        (["apple", "x" * (MAX_NAME_LENGTH + 1)], r"classes\[1\] has 201 characters: at most 200"),
        (["apple", "x" * 100_000], r"classes\[1\] has 100000 characters"),
        (["apple", "b\x00us"], r"classes\[1\] holds control characters"),
        (["apple", "\x1b[31mbus"], r"classes\[1\] holds control characters"),
        (["apple", "b\x7fus"], r"classes\[1\] holds control characters"),
        (["apple", "b\ud800us"], r"classes\[1\] holds control characters"),
        (["apple", "bus", "apple"], r"classes\[2\] 'apple' repeats classes\[0\]"),
        (["sea lion", "Sea_Lion"], r"classes\[1\] 'Sea Lion' repeats classes\[0\]"),
        (["stra\u00dfe", "STRASSE"], r"repeats"),
        (["caf\u00e9", "cafe\u0301"], r"repeats"),
    ],
)
def test_bad_names_are_refused_with_their_place(names: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        normalise_class_names(names)  # type: ignore[arg-type]
    place = re.match(r"classes\[\d\]", str(caught.value))
    assert caught.value.field == (place[0] if place else "classes")
    assert len(str(caught.value)) < 1000


def test_bounds_can_be_set() -> None:
    assert normalise_class_names(["apple"], minimum=1) == ("apple",)
    with pytest.raises(InvalidInputError, match="allowed are 2 to 3"):
        normalise_class_names(["a", "b", "c", "d"], maximum=3)


@given(st.lists(st.text(max_size=20), max_size=6))
def test_any_text_is_normalised_once_and_for_all_or_refused(names: list[str]) -> None:
    try:
        normalised = normalise_class_names(names)
    except InvalidInputError:
        return
    assert len(normalised) == len(names)
    assert normalise_class_names(normalised) == normalised
    for name in normalised:
        assert name == name.strip()
        assert unicodedata.is_normalized("NFC", name)
        name.encode()


def test_union_keeps_each_class_once_in_order() -> None:
    assert union_of_tasks([["cat", "dog"], ["Dog", "bus"], [], ["CAT", "sea"]]) == ("cat", "dog", "bus", "sea")


def test_prior_attention_by_hand() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    # mu = (0.8, 0.4), |mu| = sqrt(0.8): cos(e_1, mu) = cos(e_2, mu) = 0.8 / sqrt(0.8), so both weigh 1/2.
    pooled = prior_attention(embeddings, torch.tensor([[True, True]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.8, 0.4]]))


def test_prior_attention_prefers_the_class_closest_to_the_mean() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    # mu = (2, 1) / 3: cosines 2 / sqrt(5), 2 / sqrt(5), 1 / sqrt(5).
    near, far = math.exp(2 / math.sqrt(5)), math.exp(1 / math.sqrt(5))
    expected = torch.tensor([[2 * near, far]]) / (2 * near + far)
    torch.testing.assert_close(prior_attention(embeddings, torch.ones(1, 3, dtype=torch.bool)), expected)


def test_padding_changes_nothing() -> None:
    rows = [torch.randn(count, TINY_DIM) for count in (2, 6, 1)]
    padded, mask = pad_embeddings(rows)
    assert padded.shape == (3, 6, TINY_DIM)
    assert mask.sum(1).tolist() == [2, 6, 1]
    assert bool((padded[~mask] == 0).all())
    together = prior_attention(padded, mask)
    for i, row in enumerate(rows):
        alone = prior_attention(row[None], torch.ones(1, len(row), dtype=torch.bool))
        torch.testing.assert_close(together[i], alone[0])


def test_values_behind_the_mask_are_not_read() -> None:
    padded, mask = pad_embeddings([torch.randn(2, TINY_DIM), torch.randn(4, TINY_DIM)])
    spoiled = torch.where(mask[..., None], padded, torch.full_like(padded, 9.0))
    expected, actual = condition_on_classes(padded, mask), condition_on_classes(spoiled, mask)
    torch.testing.assert_close(actual.pooled, expected.pooled)
    assert torch.equal(actual.tokens, expected.tokens)


def test_a_condition_counts_selects_and_moves_its_items() -> None:
    condition = tiny_condition((2, 5, 3))
    assert condition.count.tolist() == [2, 5, 3]
    chosen = condition.select(torch.tensor([2, 0])).to("cpu")
    assert chosen.count.tolist() == [3, 2]
    assert torch.equal(chosen.pooled, condition.pooled[[2, 0]])
    assert torch.equal(chosen.tokens, condition.tokens[[2, 0]])
