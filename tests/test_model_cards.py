from pathlib import Path

import pytest
from huggingface_hub import ModelCard

CARDS = sorted((Path(__file__).resolve().parents[1] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_published_card_parses_and_its_figures_open(path):
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results
    figures = [line.split("](")[1].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert figures
    assert all((path.parent / figure).read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_there_is_a_card():
    assert CARDS
