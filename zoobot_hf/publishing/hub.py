"""A finished run on the Hub: model, processor, card, table and figures in one commit."""

import contextlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP client's own: httpx with huggingface_hub 1, httpx2 from 2 on
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.dynamic_module_utils import get_relative_import_files

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification

from .model_card import LIBRARY, address_model_card

# What a finished run consists of.
CONFIGURATION = "config.json"
PROCESSOR = "preprocessor_config.json"
MODEL_CARD = "README.md"
METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"
FRIENDLY = "predictions-friendly.parquet"  # of a decision tree, like the next
ADVANCED = "predictions-advanced.parquet"
FIGURES = "figures"
REQUIRED_FILES = (CONFIGURATION, "model.safetensors", PROCESSOR, MODEL_CARD)
OPTIONAL_FILES = (METRICS, PREDICTIONS, FRIENDLY, ADVANCED)
# The figures of `draw_figures`: those of a label's probabilities end in its name where several labels have them.
FIGURE_OF_RUN = re.compile(
    rf"{FIGURES}/(training_curves|confusion|most_wrong|vote_fractions"
    r"|(reliability|completeness_and_purity|roc)(_\w*)?)\.png"
)

# Where the Auto classes of transformers find the code that travels along.
CODE = {
    "AutoConfig": "configuration_zoobot.ZoobotConfig",
    "AutoImageProcessor": "image_processing_zoobot.ZoobotImageProcessor",
    "AutoModel": "modeling_zoobot.ZoobotModel",
    "AutoModelForImageClassification": "modeling_zoobot.ZoobotForImageClassification",
}
CODE_ENTRIES = (ZoobotForImageClassification, ZoobotImageProcessor)

TOKEN_ADVICE = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


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
    include_code: bool = False,
    token: str | None = None,
) -> str:
    """The URL of the model's repository, after one commit with the run's model, processor, card, table and figures.

    Checkpoints, optimizer states and logs stay where they are, and so do local paths. The card gets the repository's
    name. In a repository of zoobot_hf the same commit deletes metrics.json, tables, figures and modules that this run
    doesn't have, known by the names that zoobot_hf gives them; it deletes nothing else. A push of what is already there
    makes no commit; one that failed can be repeated.

    Args:
        folder: A finished run, with at least config.json, model.safetensors, preprocessor_config.json and README.md;
            metrics.json, predictions*.parquet and figures/*.png go along.
        repo_id: "owner/name", or "name" for a repository of one's own; made where it doesn't exist.
        private: Whether a repository that is made now is private; None leaves it to the owner's default.
        revision: The branch that the commit goes to, made where it doesn't exist; None is the main one.
        create_pr: Whether to open a pull request with the commit, where one may not write oneself.
        commit_message: The commit's first line; None names zoobot_hf.
        include_code: Whether the modules of the model travel along, so that it loads with `trust_remote_code=True`
            where zoobot_hf is not installed.
        token: A token of the Hub that may write; None takes the one that is logged in, or that of HF_TOKEN.

    Returns:
        The URL of the repository, or of the pull request when one was asked for.

    Raises:
        FileNotFoundError: When the folder is not a finished run; the message names what is missing.
        HubPushError: When there is no token, when the Hub refuses it or its rights, when the repository's name is not
            valid or taken by another model, when a file holds a token, or when the Hub can't be reached.
        ValueError: When the card's metadata or a configuration can't be read, or when the code of a model that answers
            a decision tree was to travel along.
    """
    token = token or get_token()
    contents = _read_run(Path(folder), include_code=include_code, token=token)
    if token is None:
        raise HubPushError(f"No token for the Hub: {TOKEN_ADVICE}, then push again.")
    api = HfApi(token=token, library_name="zoobot_hf")
    message = commit_message or "Push a model finetuned with zoobot_hf"
    with clear_refusals(api, repo_id, revision=revision):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repository.repo_id, revision=revision)
        if revision is None and not create_pr:
            _check_is_free_or_ours(before)
        card = str(contents[MODEL_CARD])
        contents[MODEL_CARD] = address_model_card(card, repository.repo_id, with_code=include_code)
        with warnings.catch_warnings():
            # A table of predictions belongs to its model, but huggingface_hub suspects it of being a lost dataset.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            commit = api.create_commit(
                repository.repo_id,
                [*_additions(contents), *_deletions(contents, before)],
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            )
    return str(commit.pr_url or repository)


def check_push(repo_id: str, *, token: str | None = None) -> None:
    """Finds out before a training, which may take hours, what would stop its push.

    Args:
        repo_id: As in `push_folder`.
        token: As in `push_folder`.

    Raises:
        HubPushError: There is no token, the Hub doesn't know it, it may not write there, the name is not valid, or
            the Hub can't be reached.
    """
    token = token or get_token()
    if token is None:
        raise HubPushError(f"No token for the Hub to push with: {TOKEN_ADVICE}.")
    api = HfApi(token=token, library_name="zoobot_hf")
    with clear_refusals(api, repo_id):
        validate_repo_id(repo_id)
        account = api.whoami()
    owners = {account["name"], *(organization["name"] for organization in account.get("orgs", []))}
    owner = repo_id.split("/")[0] if "/" in repo_id else account["name"]
    if owner not in owners or account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubPushError(_no_right(repo_id))


@contextlib.contextmanager
def clear_refusals(api: HfApi, repo_id: str, *, revision: str | None = None) -> Iterator[None]:
    """Turns whatever the Hub or the way to it may refuse into one line that says what to do.

    Args:
        api: The client.
        repo_id: As in `push_folder`.
        revision: As in `push_folder`.

    Raises:
        HubPushError: The Hub refused something, or could not be reached.
    """
    try:
        yield
    except HFValidationError as error:
        raise HubPushError(_invalid_name(error, repo_id=repo_id)) from error
    except HfHubHTTPError as error:
        raise HubPushError(_refusal(error, repo_id=repo_id, revision=revision)) from error
    except (OfflineModeIsEnabled, HTTPError, ConnectionError) as error:
        raise HubPushError(_unreachable(api, error)) from error
    except RuntimeError as error:
        # What huggingface_hub raises for a single file that could not be uploaded; the reason is its cause.
        if not isinstance(error.__cause__, (HfHubHTTPError, HTTPError, ConnectionError)):
            raise
        reason = f"{_first_line(error)} {_first_line(error.__cause__)}"
        raise HubPushError(
            f"The Hub at {api.endpoint} broke off the push ({reason}); push again in a while."
        ) from error


def _read_run(folder: Path, *, include_code: bool, token: str | None) -> dict[str, Path | str]:
    """What travels by its path in the repository: text where it is read or changed here, the file's path otherwise."""
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder {str(folder)!r} is not a finished run: {', '.join(missing)} missing; "
            "pass the output_dir of a finetuning that has ended."
        )
    there = [folder / name for name in (*REQUIRED_FILES, *OPTIONAL_FILES) if (folder / name).is_file()]
    files = [*there, *sorted(folder.glob(f"{FIGURES}/*.png"))]
    contents: dict[str, Path | str] = {file.relative_to(folder).as_posix(): file for file in files}
    contents |= {
        name: _publishable_settings(folder / name, with_code=include_code) for name in (CONFIGURATION, PROCESSOR)
    }
    contents |= {
        name: (folder / name).read_text(encoding="utf-8") for name in (MODEL_CARD, METRICS) if name in contents
    }
    for name, content in contents.items():
        if isinstance(content, str) and (SECRET.search(content) or (token is not None and token in content)):
            raise HubPushError(f"{folder / name} holds a token of the Hub; take it out, then push again.")
    return contents | (_read_code() if include_code else {})


def _publishable_settings(path: Path, *, with_code: bool) -> str:
    """A configuration as text, without the paths of this machine, and with or without the way to the code."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); take it from the finetuning again.") from error
    settings = _without_paths(settings)
    settings.pop("auto_map", None)
    if with_code and settings.get("decision_tree"):
        # The Auto classes have none for votes: they would build a classifier.
        raise ValueError(f"include_code is for classifiers, and {path} has a decision tree; leave it out.")
    if with_code:
        names = ("AutoImageProcessor",) if path.name == PROCESSOR else tuple(CODE)
        settings["auto_map"] = {name: CODE[name] for name in names}
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _without_paths(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {name: _without_paths(value) for name, value in settings.items() if name != "_name_or_path"}
    return settings


def _read_code() -> dict[str, Path | str]:
    """The modules of model and processor, and those that they import."""
    entries = [inspect.getfile(entry) for entry in CODE_ENTRIES]
    files = {Path(file) for entry in entries for file in (entry, *get_relative_import_files(entry))}
    return {file.name: file for file in sorted(files)}


def _additions(contents: dict[str, Path | str]) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
        for name, content in contents.items()
    ]


def _deletions(contents: dict[str, Path | str], before: ModelInfo) -> list[CommitOperationDelete]:
    """Of what an earlier push can have left, all that the run no longer has."""
    if before.library_name != LIBRARY:
        return []
    there = [file.rfilename for file in before.siblings or []]
    of_any_run = {*OPTIONAL_FILES, *_read_code()}
    left = [name for name in there if name in of_any_run or FIGURE_OF_RUN.fullmatch(name)]
    return [CommitOperationDelete(name, is_folder=False) for name in left if name not in contents]


def _check_is_free_or_ours(repository: ModelInfo) -> None:
    names = [file.rfilename for file in repository.siblings or []]
    if CONFIGURATION in names and repository.library_name != LIBRARY:
        raise HubPushError(
            f"The name {repository.id!r} is taken by another model (library {repository.library_name}); choose another "
            "name, another branch of it, or a pull request."
        )


def _invalid_name(error: HFValidationError, *, repo_id: str) -> str:
    return f"repo_id is {repo_id!r}, which the Hub doesn't allow: {_first_line(error)}"


def _no_right(repo_id: str) -> str:
    return (
        f"The token may not write to {repo_id!r}: use one with the right to write there, push to a repository of "
        "your own, or ask for a pull request (create_pr=True, --pull_request)."
    )


def _unreachable(api: HfApi, error: Exception) -> str:
    return f"The Hub at {api.endpoint} can't be reached ({_first_line(error)}); check the network, then push again."


def _refusal(error: HfHubHTTPError, *, repo_id: str, revision: str | None = None) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The Hub refused the token: {TOKEN_ADVICE}, then push again."
    if status == 403:
        return _no_right(repo_id)
    if status == 404 and revision is not None:
        return f"{repo_id!r} has no revision {revision!r}; give the name of a branch or of an open pull request."
    said = error.server_message or _first_line(error)
    if status >= 500:
        return f"The Hub failed during the push to {repo_id!r} (HTTP {status}: {said}); push again in a while."
    return f"The Hub refused the push to {repo_id!r} (HTTP {status}): {said}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
