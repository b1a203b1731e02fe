"""A dataset of galaxies on the Hub: images, labels, catalog columns and splits as Parquet, with a card."""

from collections.abc import Sequence

from datasets import ClassLabel, DatasetDict
from huggingface_hub import DatasetCard, HfApi, get_token

from .hub import TOKEN_ADVICE, HubPushError, clear_refusals


def push_dataset(
    dataset: DatasetDict,
    repo_id: str,
    *,
    description: str,
    license: str | None = None,
    citations: Sequence[str] = (),
    configuration: str = "classification",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """The URL of the dataset's repository, after its splits and then its card were sent there.

    Images travel inside the Parquet files, byte for byte as they were read. `load_rings` and `load_galaxy_dataset`
    load the dataset again.

    Args:
        dataset: Splits with `id_str`, `image`, `label` and any further columns.
        repo_id: "owner/name"; made where it doesn't exist.
        description: What the galaxies are, how they were chosen and who labelled them, for the card.
        license: The Hub's short name of the licence, such as "cc-by-nc-sa-4.0"; what the card has when absent.
        citations: What to cite, a reference each.
        configuration: Name of the configuration; `load_rings` takes this one.
        private: As in `push_folder`.
        token: As in `push_folder`.

    Raises:
        HubPushError: What `push_folder` refuses.
    """
    token = token or get_token()
    if token is None:
        raise HubPushError(f"No token for the Hub: {TOKEN_ADVICE}, then push again.")
    api = HfApi(token=token, library_name="zoobot_hf")
    with clear_refusals(api, repo_id):
        repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        dataset.push_to_hub(repository.repo_id, configuration, token=token, commit_message="Push a dataset of galaxies")
        # datasets itself has put the features and the paths of the splits on top of the card.
        card = DatasetCard.load(repository.repo_id, token=token)
        card.data.license = license or card.data.license
        card.data.task_categories = ["image-classification"]
        card.data.tags = ["astronomy", "galaxies"]
        name = repository.repo_id.split("/")[-1]
        card.text = _card_text(dataset, name, description=description, citations=citations)
        # Its own push_to_hub asks huggingface.co, whatever HF_ENDPOINT is, up to huggingface_hub 2.0.0.
        api.upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo="README.md",
            repo_id=repository.repo_id,
            repo_type="dataset",
            commit_message="Describe the dataset",
        )
    return str(repository)


def _card_text(dataset: DatasetDict, name: str, *, description: str, citations: Sequence[str]) -> str:
    lines = [f"\n# {name}\n", f"{description}\n", "| split | galaxies |", "|---|---|"]
    lines += [f"| {split} | {len(rows)} |" for split, rows in dataset.items()]
    features = next(iter(dataset.values())).features
    lines += ["", f"Columns: {', '.join(features)}.\n"]
    if isinstance(features.get("label"), ClassLabel):
        lines += [f"Labels, in the order of their numbers: {', '.join(features['label'].names)}.\n"]
    if citations:
        lines += ["## Citation\n", *(f"- {citation}" for citation in citations)]
    return "\n".join(lines).rstrip() + "\n"
