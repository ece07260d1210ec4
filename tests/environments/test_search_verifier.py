import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.environments.search_qa.verifier import exact_match, f1, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Hague! ", "hague"),
        ("Asunción", "asuncion"),
        ("St. John's", "st johns"),
        ("an apple a day", "apple day"),
        ("Theodore", "theodore"),
        (".fr", "fr"),
        ("Guinea-Bissau", "guineabissau"),
        ("", ""),
        ("the", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("paris.", ("Paris",), True),
        ("Algerian dinar", ("Algerian dinars", "Algerian dinar"), True),
        ("Paris France", ("Paris",), False),
        ("", ("Paris",), False),
        ("the", ("The",), False),
        ("euro", (), False),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Mont Blanc", ("Mont Blanc",), 1.0),
        ("Mont Ventoux", ("Mont Blanc",), 0.5),
        ("Blanc", ("Mont Blanc",), 2 / 3),  # precision 1, recall 1/2
        ("Mont Mont", ("Mont Blanc",), 0.5),  # a repeated word counts once
        ("Blanc", ("Mont Blanc", "the Blanc"), 1.0),
        ("", ("Mont Blanc",), 0.0),
        ("x", (), 0.0),
    ],
)
def test_f1(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_exact_match_implies_full_f1(prediction, answers):
    assert 0.0 <= f1(prediction, answers) <= 1.0
    if exact_match(prediction, answers):
        assert f1(prediction, answers) == 1.0
    assert normalise(normalise(prediction)) == normalise(prediction)
