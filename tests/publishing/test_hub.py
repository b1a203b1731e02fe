import json
import logging
import shutil

import pytest
from hub_store import Repo
from huggingface_hub import HfApi

from zoobot_hf.cli import main
from zoobot_hf.publishing.hub import HubPushError, check_push, push_folder

PUSHED = {
    "README.md",
    "config.json",
    "figures/most_wrong.png",
    "figures/training_curves.png",
    "metrics.json",
    "model.safetensors",
    "predictions.parquet",
    "preprocessor_config.json",
}
NOT_PUSHED = (
    "checkpoints/frozen/checkpoint-5/model.safetensors",
    "checkpoints/frozen/checkpoint-5/optimizer.pt",
    "events.out.tfevents.1",
    "figures/notes.txt",
    "training_args.bin",
    ".secret",
)
CARD = """---
library_name: zoobot_hf
model_name: run
---

# run

## How to use it

Load it from path/to/run.

## Limits

- It is small.
"""
CONFIGURATION = {
    "model_type": "zoobot",
    "_name_or_path": "/home/astronomer/rings",
    "encoder_config": {"model_type": "resnet", "_name_or_path": "/home/astronomer/encoder"},
    "auto_map": {"AutoModel": "code.that.is.not.there"},
}


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of a few bytes, with all that must stay at home beside it."""
    folder = tmp_path / "run"
    for name in (*PUSHED, *NOT_PUSHED):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0\1" + name.encode() if file.suffix in (".safetensors", ".png", ".parquet") else b"{}")
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    return folder


def test_one_commit_holds_the_run_and_nothing_else(hub, hub_token, repo_id, run_folder):
    url = push_folder(run_folder, repo_id, token=hub_token)
    assert url == f"{hub.url}/{repo_id}"
    assert set(hub.files(repo_id)) - {".gitattributes"} == PUSHED
    assert hub.files(repo_id)["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert len(hub.commits(repo_id)) == 2  # the second one is the repository's creation
    assert hub.commits(repo_id)[0].title == "Push a model finetuned with zoobot_hf"


def test_no_local_path_travels(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token)
    settings = json.loads(hub.files(repo_id)["config.json"])
    assert settings == {"model_type": "zoobot", "encoder_config": {"model_type": "resnet"}}
    assert not any(b"/home/astronomer" in content for content in hub.files(repo_id).values())


def test_the_card_gets_the_name_of_the_repository(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token)
    card, name = hub.files(repo_id)["README.md"].decode(), repo_id.split("/")[1]
    assert f"model_name: {name}\n" in card
    assert f"\n# {name}\n" in card
    assert f"Load it from {repo_id}." in card
    assert (run_folder / "README.md").read_text() == CARD


def test_a_name_without_an_owner_is_a_repository_of_ones_own(hub, hub_token, repo_id, run_folder):
    name = repo_id.split("/")[1]
    assert push_folder(run_folder, name, token=hub_token) == f"{hub.url}/{repo_id}"
    assert f"Load it from {repo_id}." in hub.files(repo_id)["README.md"].decode()


def test_what_the_run_no_longer_has_is_deleted_in_the_same_commit(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token)
    HfApi(token=hub_token).upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo_id)
    (run_folder / "predictions.parquet").unlink()
    (run_folder / "figures/most_wrong.png").unlink()
    push_folder(run_folder, repo_id, token=hub_token)
    left = PUSHED - {"predictions.parquet", "figures/most_wrong.png"}
    assert set(hub.files(repo_id)) == {*left, ".gitattributes", "notes.txt"}
    assert len(hub.commits(repo_id)) == 4


def test_a_push_deletes_nothing_that_no_push_wrote(hub, hub_token, repo_id, run_folder):
    own = ("handler.py", "scripts/heads.py", "figures/paper.png", "figures/rocks.png", "figures/supplement/roc.png")
    (run_folder / "figures/roc_smooth_or_not.png").write_bytes(b"\0")
    push_folder(run_folder, repo_id, token=hub_token, include_code=True)
    for name in own:
        HfApi(token=hub_token).upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id=repo_id)
    (run_folder / "figures/roc_smooth_or_not.png").unlink()
    push_folder(run_folder, repo_id, token=hub_token)
    assert set(hub.files(repo_id)) == {*PUSHED, *own, ".gitattributes"}


def test_a_pull_request_deletes_nothing_of_another_library(hub, hub_token, repo_id, run_folder):
    theirs = {"README.md": b"---\nlibrary_name: timm\n---\n", "heads.py": b"theirs", "figures/roc.png": b"theirs"}
    hub.add_repo(Repo("models", repo_id), {"config.json": b"{}", **theirs})
    push_folder(run_folder, repo_id, token=hub_token, create_pr=True)
    assert set(hub.files(repo_id, revision="refs/pr/1")) == {*PUSHED, *theirs}


def test_the_models_code_travels_only_when_asked_to(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token, include_code=True)
    files = hub.files(repo_id)
    assert {"configuration_zoobot.py", "modeling_zoobot.py", "heads.py", "image_processing_zoobot.py"} < set(files)
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_zoobot.ZoobotModel"
    assert json.loads(files["preprocessor_config.json"])["auto_map"] == {
        "AutoImageProcessor": "image_processing_zoobot.ZoobotImageProcessor"
    }
    card = files["README.md"].decode()
    assert card.index("trust_remote_code=True") < card.index("## Limits")
    push_folder(run_folder, repo_id, token=hub_token, include_code=True)
    assert len(hub.commits(repo_id)) == 2
    push_folder(run_folder, repo_id, token=hub_token)
    assert set(hub.files(repo_id)) - {".gitattributes"} == PUSHED
    assert "auto_map" not in json.loads(hub.files(repo_id)["config.json"])


def test_a_second_push_of_the_same_makes_no_commit(hub, hub_token, repo_id, run_folder):
    first = push_folder(run_folder, repo_id, token=hub_token)
    assert push_folder(run_folder, repo_id, token=hub_token) == first
    assert len(hub.commits(repo_id)) == 2


def test_a_changed_file_is_pushed_again(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token)
    (run_folder / "metrics.json").write_text('{"frozen": {}}')
    push_folder(run_folder, repo_id, token=hub_token, commit_message="Measure again")
    assert hub.files(repo_id)["metrics.json"] == b'{"frozen": {}}'
    assert hub.commits(repo_id)[0].title == "Measure again"


def test_table_and_figures_need_not_be_there(hub, hub_token, repo_id, run_folder):
    for name in PUSHED - {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}:
        (run_folder / name).unlink()
    push_folder(run_folder, repo_id, token=hub_token)
    assert len(set(hub.files(repo_id)) - {".gitattributes"}) == 4


def test_a_repository_is_private_when_asked(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, private=True, token=hub_token)
    assert HfApi(endpoint=hub.url, token=hub_token).model_info(repo_id).private


def test_a_new_branch_takes_the_commit(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, revision="second-try", token=hub_token)
    assert set(hub.files(repo_id, revision="second-try")) >= PUSHED
    assert set(hub.files(repo_id)) <= {".gitattributes"}


def test_a_pull_request_leaves_the_main_branch_alone(hub, hub_token, repo_id, run_folder):
    url = push_folder(run_folder, repo_id, create_pr=True, token=hub_token)
    assert url == f"{hub.url}/{repo_id}/discussions/1"
    assert set(hub.files(repo_id)) <= {".gitattributes"}


def test_a_visitor_may_open_a_pull_request(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, token=hub_token)
    (run_folder / "metrics.json").write_text('{"frozen": {}}')
    url = push_folder(run_folder, repo_id, create_pr=True, token=hub.tokens["visitor"])
    assert url == f"{hub.url}/{repo_id}/discussions/1"
    assert hub.files(repo_id)["metrics.json"] == b"{}"


def test_a_pull_request_takes_a_second_push(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, create_pr=True, token=hub_token)
    (run_folder / "metrics.json").write_text('{"frozen": {}}')
    push_folder(run_folder, repo_id, revision="refs/pr/1", token=hub_token)
    assert hub.files(repo_id, revision="refs/pr/1")["metrics.json"] == b'{"frozen": {}}'
    assert set(hub.files(repo_id)) <= {".gitattributes"}


def test_a_push_warns_of_nothing(hub_token, repo_id, run_folder, recwarn):
    push_folder(run_folder, repo_id, token=hub_token)
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


def test_the_token_of_the_environment_is_used(hub, hub_token, repo_id, run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_token)
    push_folder(run_folder, repo_id)
    assert set(hub.files(repo_id)) >= PUSHED


def test_a_folder_that_is_not_a_finished_run_is_named(hub_token, repo_id, run_folder):
    (run_folder / "README.md").unlink()
    (run_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a finished run: config.json, README.md missing"):
        push_folder(run_folder, repo_id, token=hub_token)


def test_no_token_is_one_clear_line(hub, repo_id, run_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubPushError, match=r"^No token for the Hub: log in with `hf auth login`.*$"):
        push_folder(run_folder, repo_id)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token_name", "repo_id", "message"),
    [
        ("read", "astronomer/refused", r"^The token may not write to 'astronomer/refused': .*$"),
        ("visitor", "astronomer/refused", r"^The token may not write to 'astronomer/refused': .*$"),
        ("write", "astronomer/not a name", r"^repo_id is 'astronomer/not a name', which the Hub doesn't allow: .*$"),
        ("write", "a/b/c", r"^repo_id is 'a/b/c', which the Hub doesn't allow: .*$"),
    ],
)
def test_a_refusal_is_one_clear_line(hub, run_folder, token_name, repo_id, message):
    with pytest.raises(HubPushError, match=message):
        push_folder(run_folder, repo_id, token=hub.tokens[token_name])
    assert ("models", repo_id) not in hub.repos


def test_a_wrong_token_is_one_clear_line(hub, repo_id, run_folder):
    with pytest.raises(HubPushError, match=r"^The Hub refused the token: log in with `hf auth login`.*$"):
        push_folder(run_folder, repo_id, token="token-of-nobody")


def test_a_name_that_is_taken_is_one_clear_line(hub, hub_token, repo_id, run_folder):
    card = b"---\nlibrary_name: transformers\n---\n"
    hub.add_repo(Repo("models", repo_id), {"config.json": b"{}", "README.md": card})
    with pytest.raises(
        HubPushError, match=r"^The name '.*' is taken by another model \(library transformers\); choose"
    ):
        push_folder(run_folder, repo_id, token=hub_token)
    assert hub.files(repo_id)["config.json"] == b"{}"
    push_folder(run_folder, repo_id, token=hub_token, create_pr=True)


def test_a_revision_that_does_not_exist_is_one_clear_line(hub_token, repo_id, run_folder):
    with pytest.raises(HubPushError, match=r"^'.*' has no revision 'refs/pr/9'; give the name of a branch or .*$"):
        push_folder(run_folder, repo_id, token=hub_token, revision="refs/pr/9")


@pytest.mark.parametrize("name", ["README.md", "config.json", "metrics.json"])
def test_a_token_in_a_file_never_travels(hub, repo_id, run_folder, name, hub_token):
    for secret in (hub_token, "hf_" + "a" * 34):
        (run_folder / name).write_text(json.dumps({"hub_token": secret}))
        with pytest.raises(HubPushError, match=rf"^.*{name} holds a token of the Hub; take it out") as caught:
            push_folder(run_folder, repo_id, token=hub_token)
        assert secret not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "---\ntags: [\n---\n", "metadata on top of the model card can't be read.*correct README.md"),
        ("README.md", "---\n- a\n---\n", "metadata on top of the model card can't be read.*correct README.md"),
        ("config.json", "{", "config.json is not JSON"),
        ("preprocessor_config.json", "", "preprocessor_config.json is not JSON"),
    ],
)
def test_a_damaged_file_is_one_clear_line(hub_token, repo_id, run_folder, name, text, message):
    (run_folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        push_folder(run_folder, repo_id, token=hub_token)


def test_any_other_refusal_says_what_the_hub_said(hub, hub_token, repo_id, run_folder):
    hub.fail_next(r"POST /api/models/.*/commit/", status=422)
    with pytest.raises(
        HubPushError, match=r"^The Hub refused the push to '.*' \(HTTP 422\): Failed as the test wanted$"
    ):
        push_folder(run_folder, repo_id, token=hub_token)
    assert len(hub.commits(repo_id)) == 1  # the repository's creation


def test_a_hub_that_hangs_up_is_one_clear_line(hub, hub_token, repo_id, run_folder):
    hub.cut_next(r"POST /api/repos/create", times=10)
    with pytest.raises(
        HubPushError, match=rf"^The Hub at {hub.url} can't be reached \(.+\); check the network, then push again.$"
    ):
        push_folder(run_folder, repo_id, token=hub_token)


def test_offline_mode_is_one_clear_line(hub, hub_token, repo_id, run_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubPushError, match=r"^The Hub at .* can't be reached \(.*offline.*$"):
        push_folder(run_folder, repo_id, token=hub_token)


def test_the_token_is_never_shown(hub, repo_id, run_folder, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(HubPushError) as caught:
        push_folder(run_folder, repo_id, token="token-of-nobody")
    assert "token-of-nobody" not in str(caught.value) + caplog.text


# Before a training


def test_a_push_that_would_work_passes_the_check(hub, hub_token):
    for repo_id in ("astronomer/rings", "galaxyzoo/rings", "rings"):
        check_push(repo_id, token=hub_token)


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "astronomer/rings", r"^No token for the Hub to push with: log in with .*$"),
        ("token-of-nobody", "astronomer/rings", r"^The Hub refused the token: log in with .*$"),
        ("token-read", "astronomer/rings", r"^The token may not write to 'astronomer/rings': .*$"),
        ("token-visitor", "astronomer/rings", r"^The token may not write to 'astronomer/rings': .*$"),
        ("token-write", "astronomer/not a name", r"^repo_id is 'astronomer/not a name', which the Hub doesn't allow"),
    ],
)
def test_a_push_that_would_fail_is_refused_before_the_training(hub, token, repo_id, message):
    with pytest.raises(HubPushError, match=message):
        check_push(repo_id, token=token)


def test_a_check_without_the_hub_is_one_clear_line(hub, hub_token):
    hub.cut_next(r"GET /api/whoami", times=10)
    with pytest.raises(HubPushError, match=rf"^The Hub at {hub.url} can't be reached"):
        check_push("astronomer/rings", token=hub_token)


# The command


def test_the_command_pushes_as_it_is_told(hub, hub_token, repo_id, run_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub_token)
    options = ["--private", "--branch", "second-try", "--message", "Try again"]
    assert main(["push", str(run_folder), repo_id, *options]) == 0
    assert capsys.readouterr().out == f"pushed to {hub.url}/{repo_id}\n"
    assert hub.repo(repo_id).private
    assert hub.commits(repo_id, revision="second-try")[0].title == "Try again"
    assert main(["push", str(run_folder), repo_id, "--pull_request", "--include_code"]) == 0
    assert capsys.readouterr().out == f"pushed to {hub.url}/{repo_id}/discussions/1\n"
    assert "modeling_zoobot.py" in hub.files(repo_id, revision="refs/pr/1")


def test_the_command_complains_in_one_line(hub, repo_id, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shutil.rmtree(run_folder / "figures")
    for folder, complaint in ((run_folder, "No token for the Hub"), (tmp_path / "nothing", "not a finished run")):
        assert main(["push", str(folder), repo_id]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("zoobot-hf: ")
        assert errors.count("\n") == 1
        assert complaint in errors
