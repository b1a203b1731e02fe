"""Every request of a push fails in turn: the repository stays as it was or is complete, and a repeat succeeds."""

import re

import pytest

from zoobot_hf.publishing.hub import HubPushError, push_folder

# Each request of a first push, as "METHOD /path"; a test below sees to it that none is missing.
REQUESTS = {
    "create": r"POST /api/repos/create",
    "branch": r"POST /api/models/.*/branch/",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/[^/]+)?$",
    "validate": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/.*/preupload/",
    "batch": r"POST /.*/info/lfs/objects/batch",
    "storage": r"PUT /storage/",
    "verify": r"POST /.*/info/lfs/objects/verify",
    "commit": r"POST /api/models/.*/commit/",
}
FAULTS = ("500", "503", "cut request", "cut answer")
PUSHED = {
    "README.md",
    "config.json",
    "figures/roc.png",
    "metrics.json",
    "model.safetensors",
    "preprocessor_config.json",
}


@pytest.fixture(autouse=True)
def wait_for_nothing(monkeypatch):
    """Lets the client, which waits up to 24 s for a Hub that fails, try again at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def run_folder(tmp_path, repo_id):
    """A finished run of a few bytes; the server keeps what was uploaded, so that no two tests may share content."""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    for name in PUSHED - {"README.md"}:
        is_binary = name.endswith((".safetensors", ".png"))
        (folder / name).write_bytes(b"\0\1" + f"{name} of {repo_id}".encode() if is_binary else b"{}")
    (folder / "README.md").write_text("---\nlibrary_name: zoobot_hf\n---\n\n# A model\n")
    return folder


def break_request(hub, name, fault, *, times):
    if fault.isdecimal():
        hub.fail_next(REQUESTS[name], status=int(fault), times=times)
    else:
        hub.cut_next(REQUESTS[name], during=fault.split()[1], times=times)


def state_of(hub, repo_id, revision):
    """What the Hub has of a repository: nothing, the creation's commit alone, or everything."""
    if ("models", repo_id) not in hub.repos or hub.repo(repo_id).ref(revision) is None:
        return "absent"
    names = set(hub.files(repo_id, revision=revision)) - {".gitattributes"}
    return {frozenset(): "empty", frozenset(PUSHED): "complete"}.get(frozenset(names), f"torn: {sorted(names)}")


def test_the_list_of_requests_is_complete(hub, hub_token, repo_id, run_folder):
    push_folder(run_folder, repo_id, revision="second-try", token=hub_token)
    seen = [f"{record.method} {record.target}" for record in hub.requests]
    assert [request for request in seen if not any(re.search(known, request) for known in REQUESTS.values())] == []
    assert [name for name, known in REQUESTS.items() if not any(re.search(known, request) for request in seen)] == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_push_that_fails_leaves_the_repository_whole_and_can_be_repeated(
    hub, hub_token, repo_id, run_folder, name, fault
):
    break_request(hub, name, fault, times=100)
    with pytest.raises(HubPushError) as caught:
        push_folder(run_folder, repo_id, revision="second-try", token=hub_token)
    assert "\n" not in str(caught.value)
    assert re.search(r"push again", str(caught.value))
    lost_answer = name == "commit" and fault == "cut answer"
    assert state_of(hub, repo_id, "second-try") in ({"complete"} if lost_answer else {"absent", "empty"})
    assert state_of(hub, repo_id, "main") in {"absent", "empty"}
    hub.forget()
    push_folder(run_folder, repo_id, revision="second-try", token=hub_token)
    assert state_of(hub, repo_id, "second-try") == "complete"
    assert len(hub.commits(repo_id, revision="second-try")) == 2


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_push_that_meets_one_fault_ends_whole(hub, hub_token, repo_id, run_folder, name, fault):
    push_folder(run_folder, repo_id, token=hub_token)
    before = hub.files(repo_id)
    (run_folder / "model.safetensors").write_bytes(b"\0\2" + f"new weights of {repo_id}".encode())
    (run_folder / "metrics.json").write_text('{"frozen": {}}')
    (run_folder / "figures/roc.png").unlink()
    break_request(hub, name, fault, times=1)
    try:
        push_folder(run_folder, repo_id, token=hub_token)
        expected = {3}
    except HubPushError:
        expected = {2, 3}
    commits = hub.commits(repo_id)
    assert len(commits) in expected
    is_as_before = hub.files(repo_id) == before
    assert is_as_before == (len(commits) == 2)
    hub.forget()
    push_folder(run_folder, repo_id, token=hub_token)
    assert len(hub.commits(repo_id)) == 3
    assert hub.files(repo_id)["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert hub.files(repo_id)["metrics.json"] == b'{"frozen": {}}'
    assert "figures/roc.png" not in hub.files(repo_id)


def test_a_slow_answer_is_waited_for(hub, hub_token, repo_id, run_folder):
    hub.delay_next(REQUESTS["commit"], seconds=0.5)
    push_folder(run_folder, repo_id, token=hub_token)
    assert state_of(hub, repo_id, "main") == "complete"
