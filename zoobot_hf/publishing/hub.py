"""A finished run on the Hub: model, processor, card, table and figures in one commit."""

import warnings
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP client's own: httpx with huggingface_hub 1, httpx2 from 2 on
    OfflineModeIsEnabled,
)

# What a finished run consists of.
MODEL_CARD = "README.md"
METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"
FIGURES = "figures"
REQUIRED_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", MODEL_CARD)
OPTIONAL_FILES = (METRICS, PREDICTIONS)

TOKEN_ADVICE = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


class HubPushError(RuntimeError):
    """A push that the Hub did not take, in one line that says what to do."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """The URL of the model's repository, after one commit with the run's model, processor, card, table and figures.

    Checkpoints, optimizer states and logs stay where they are, and a push of what is already there makes no commit.

    Args:
        folder: A finished run, with at least config.json, model.safetensors, preprocessor_config.json and README.md;
            metrics.json, predictions.parquet and figures/*.png go along.
        repo_id: "owner/name", or "name" for a repository of one's own; made where it doesn't exist.
        private: Whether a repository that is made now is private; None leaves it to the owner's default.
        revision: The branch that the commit goes to, made where it doesn't exist; None is the main one.
        create_pr: Whether to open a pull request with the commit, where one may not write oneself.
        commit_message: The commit's first line; None names zoobot_hf.
        token: A token of the Hub that may write; None takes the one that is logged in, or that of HF_TOKEN.

    Returns:
        The URL of the repository, or of the pull request when one was asked for.

    Raises:
        FileNotFoundError: When the folder is not a finished run; the message names what is missing.
        HubPushError: When there is no token, when the Hub refuses it or its rights, when the repository's name is not
            valid, or when the Hub can't be reached.
    """
    operations = _operations(Path(folder))
    token = token or get_token()
    if token is None:
        raise HubPushError(f"No token for the Hub: {TOKEN_ADVICE}, then push again.")
    api = HfApi(token=token, library_name="zoobot_hf")
    message = commit_message or "Push a model finetuned with zoobot_hf"
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        with warnings.catch_warnings():
            # A table of predictions belongs to its model, but huggingface_hub suspects it of being a lost dataset.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            commit = api.create_commit(
                repository.repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr
            )
    except HFValidationError as error:
        raise HubPushError(f"repo_id is {repo_id!r}, which the Hub doesn't allow: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise HubPushError(_refusal(error, repo_id=repo_id)) from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise HubPushError(f"The Hub at {api.endpoint} can't be reached: {_first_line(error)}") from error
    return str(commit.pr_url or repository)


def _operations(folder: Path) -> list[CommitOperationAdd]:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder {str(folder)!r} is not a finished run: {', '.join(missing)} missing; "
            "pass the output_dir of a finetuning that has ended."
        )
    there = [folder / name for name in (*REQUIRED_FILES, *OPTIONAL_FILES) if (folder / name).is_file()]
    files = [*there, *sorted(folder.glob(f"{FIGURES}/*.png"))]
    return [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]


def _refusal(error: HfHubHTTPError, *, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The Hub refused the token: {TOKEN_ADVICE}, then push again."
    if status == 403:
        return (
            f"The token may not write to {repo_id!r}: use one with the right to write there, push to a repository of "
            "your own, or ask for a pull request with create_pr=True."
        )
    return f"The Hub refused the push to {repo_id!r} (HTTP {status}): {error.server_message or _first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
