import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from zoobot_hf.data.rings import load_rings
from zoobot_hf.publishing.hub import HubPushError
from zoobot_hf.publishing.hub_dataset import push_dataset

ABOUT = {"description": "Drawn galaxies.", "license": "apache-2.0", "citations": ("Somebody et al. 2026",)}


@pytest.fixture(scope="module")
def rings():
    return load_rings("simulated", count=40, size=32)


def test_a_dataset_comes_back_equal(hub_token, repo_id, rings):
    push_dataset(rings, repo_id, **ABOUT, token=hub_token)
    others = [name for name in rings["train"].column_names if name not in ("id_str", "image", "label")]
    loaded = load_rings(repo_id, keep_columns=others, label_names=None)
    assert list(loaded) == list(rings)
    for split, rows in rings.items():
        assert set(loaded[split].column_names) == set(rows.column_names)
        for column in ("id_str", "label", *others):
            assert loaded[split][column][:] == rows[column][:]
        assert loaded[split].features["label"] == rows.features["label"]
        images = zip(loaded[split]["image"][:], rows["image"][:], strict=True)
        assert all(one.tobytes() == other.tobytes() for one, other in images)


def test_a_dataset_is_streamed(hub_token, repo_id, rings):
    push_dataset(rings, repo_id, **ABOUT, token=hub_token)
    streamed = load_dataset(repo_id, "classification", split="test", streaming=True)
    assert [row["id_str"] for row in streamed] == rings["test"]["id_str"][:]


def test_a_dataset_has_a_card(hub_token, repo_id, rings):
    push_dataset(rings, repo_id, **ABOUT, token=hub_token)
    push_dataset(rings, repo_id, **{**ABOUT, "license": None}, token=hub_token)  # keeps what the card has
    card = DatasetCard.load(repo_id)
    assert (card.data.license, card.data.task_categories) == ("apache-2.0", ["image-classification"])
    for line in (f"# {repo_id.split('/')[1]}", "Drawn galaxies.", "| train | 28 |", "- Somebody et al. 2026"):
        assert line in card.text


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "^No token for the Hub: log in"),
        ("token-of-nobody", "^The Hub refused the token"),
        ("token-read", "may not write"),
    ],
)
def test_a_refusal_is_one_clear_line(hub, repo_id, rings, token, message):
    with pytest.raises(HubPushError, match=message):
        push_dataset(rings, repo_id, **ABOUT, token=token)
