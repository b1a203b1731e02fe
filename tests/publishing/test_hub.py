import logging

import pytest
from huggingface_hub import HfApi

from zoobot_hf.publishing.hub import HubPushError, push_folder

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


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of a few bytes, with all that must stay at home beside it."""
    folder = tmp_path / "run"
    for name in (*PUSHED, *NOT_PUSHED):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\0\1" + name.encode() if file.suffix in (".safetensors", ".png", ".parquet") else b"{}")
    (folder / "README.md").write_text("---\nlibrary_name: zoobot_hf\n---\n\n# A model\n")
    return folder


def test_one_commit_holds_the_run_and_nothing_else(hub, hub_token, repo_id, run_folder):
    url = push_folder(run_folder, repo_id, token=hub_token)
    assert url == f"{hub.url}/{repo_id}"
    assert set(hub.files(repo_id)) - {".gitattributes"} == PUSHED
    assert hub.files(repo_id)["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert len(hub.commits(repo_id)) == 2  # the second one is the repository's creation
    assert hub.commits(repo_id)[0].title == "Push a model finetuned with zoobot_hf"


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


def test_any_other_refusal_says_what_the_hub_said(hub, hub_token, repo_id, run_folder):
    hub.fail_next(r"POST /api/models/.*/commit/", status=422)
    with pytest.raises(
        HubPushError, match=r"^The Hub refused the push to '.*' \(HTTP 422\): Failed as the test wanted$"
    ):
        push_folder(run_folder, repo_id, token=hub_token)
    assert len(hub.commits(repo_id)) == 1  # the repository's creation


def test_a_hub_that_hangs_up_is_one_clear_line(hub, hub_token, repo_id, run_folder):
    hub.cut_next(r"POST /api/repos/create", times=10)
    with pytest.raises(HubPushError, match=rf"^The Hub at {hub.url} can't be reached: .+$"):
        push_folder(run_folder, repo_id, token=hub_token)


def test_offline_mode_is_one_clear_line(hub, hub_token, repo_id, run_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubPushError, match=r"^The Hub at .* can't be reached: .*offline.*$"):
        push_folder(run_folder, repo_id, token=hub_token)


def test_the_token_is_never_shown(hub, repo_id, run_folder, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(HubPushError) as caught:
        push_folder(run_folder, repo_id, token="token-of-nobody")
    assert "token-of-nobody" not in str(caught.value) + caplog.text
