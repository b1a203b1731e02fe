"""The test Hub, as the real clients see it."""

import socket
import subprocess
import sys
import time

import datasets
import huggingface_hub
import pytest
from hub_store import Repo
from huggingface_hub import HfApi, HfFileSystem, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, ResNetConfig

WEIGHTS = bytes(range(256)) * 40  # not text, so the server asks for LFS
CARD = b"---\nlicense: apache-2.0\npipeline_tag: image-classification\n---\n# Rings\n"


@pytest.fixture
def api(hub_token):
    return HfApi(token=hub_token)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "figures").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "figures/curves.txt").write_bytes(b"0.5 0.4 0.3")
    return folder


@pytest.fixture
def published(api, repo_id, model_folder):
    """A public repository with the files of `model_folder`."""
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=model_folder, commit_message="publish")
    return repo_id


# Upload


def test_an_uploaded_folder_is_one_commit_with_its_bytes(hub, published):
    assert [commit.title for commit in hub.commits(published)] == ["publish", "initial commit"]
    files = hub.files(published)
    assert files["model.safetensors"] == WEIGHTS
    assert files["README.md"] == CARD
    assert files["figures/curves.txt"] == b"0.5 0.4 0.3"
    assert hub.count("POST", "/commit/main") == 1


def test_binary_files_travel_by_lfs_to_another_origin_without_a_token(hub, api, published):
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="new.bin", repo_id=published)
    uploads = [seen for seen in hub.requests if seen.method == "PUT"]
    assert [seen.has_token for seen in uploads] == [False]
    blobs = hub.repo(published).commit_at("main").files
    assert {path for path, blob in blobs.items() if blob.is_lfs} == {"model.safetensors", "new.bin"}


def test_a_second_identical_upload_makes_no_commit(hub, api, published, model_folder):
    hub.forget()
    api.upload_folder(repo_id=published, folder_path=model_folder)
    assert len(hub.commits(published)) == 2
    assert hub.count("POST", "/commit/") == hub.count("PUT") == 0


def test_a_changed_file_alone_is_sent_again(hub, api, published, model_folder):
    (model_folder / "README.md").write_bytes(CARD + b"More.\n")
    hub.forget()
    api.upload_folder(repo_id=published, folder_path=model_folder)
    assert hub.files(published)["README.md"] == CARD + b"More.\n"
    assert hub.count("PUT") == 0


def test_files_and_folders_are_deleted(hub, api, published):
    api.delete_file("model.safetensors", published)
    api.delete_folder("figures", published)
    assert set(hub.files(published)) == {".gitattributes", "README.md"}


def test_a_file_that_is_not_there_can_not_be_deleted(api, published):
    with pytest.raises(EntryNotFoundError, match="404"):
        api.delete_file("nothing.txt", published)


def test_a_file_is_copied_within_a_repository(hub, api, published):
    copy = huggingface_hub.CommitOperationCopy("model.safetensors", "copy.safetensors")
    api.create_commit(published, [copy], commit_message="copy")
    assert hub.files(published)["copy.safetensors"] == WEIGHTS


def test_a_commit_on_an_outdated_parent_is_refused(api, published):
    parent = api.model_info(published).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published, parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=published, parent_commit=parent)


def test_a_pull_request_leaves_main_alone_until_it_is_merged(hub, api, published):
    commit = api.upload_file(
        path_or_fileobj=b"new", path_in_repo="notes.txt", repo_id=published, create_pr=True, commit_message="notes"
    )
    assert commit.pr_revision == "refs/pr/1"
    assert "notes.txt" not in hub.files(published)
    assert hub.files(published, revision="refs/pr/1")["notes.txt"] == b"new"
    assert [pull_request.title for pull_request in api.get_repo_discussions(published)] == ["notes"]
    api.upload_file(path_or_fileobj=b"2", path_in_repo="later.txt", repo_id=published)
    api.merge_pull_request(published, 1)
    assert {"notes.txt", "later.txt", "README.md"} <= set(hub.files(published))
    assert api.get_discussion_details(published, 1).status == "merged"


def test_an_opened_pull_request_takes_commits(hub, api, published):
    number = api.create_pull_request(published, title="weights").num
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published, revision=f"refs/pr/{number}")
    assert hub.files(published, revision=f"refs/pr/{number}")["a.txt"] == b"1"


def test_a_stranger_may_propose_but_not_commit(hub, published):
    stranger = HfApi(token=hub.tokens["visitor"])
    with pytest.raises(HfHubHTTPError, match="visitor may not write"):
        stranger.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    proposal = stranger.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published, create_pr=True)
    assert proposal.pr_num == 1


# Download


def test_downloaded_files_equal_the_uploaded_ones(published, tmp_path):
    for name, content in {"README.md": CARD, "model.safetensors": WEIGHTS}.items():
        path = hf_hub_download(published, name, cache_dir=tmp_path / "cache")
        with open(path, "rb") as file:
            assert file.read() == content


def test_no_token_reaches_the_storage(hub, hub_token, published, tmp_path):
    hub.forget()
    hf_hub_download(published, "model.safetensors", cache_dir=tmp_path / "cache", token=hub_token)
    tokens = {seen.target.split("/")[1] == "storage": seen.has_token for seen in hub.requests}
    assert tokens == {True: False, False: True}


def test_a_token_that_reaches_the_storage_is_an_error(hub, hub_token, published):
    sha256 = hub.repo(published).commit_at("main").files["model.safetensors"].sha256
    answer = get_session().get(f"{hub.storage_url}/storage/{sha256}", headers={"Authorization": f"Bearer {hub_token}"})
    assert answer.status_code == 400
    assert "another origin" in answer.headers["X-Error-Message"]


def test_a_snapshot_holds_every_file(published, tmp_path):
    folder = snapshot_download(
        published, local_dir=tmp_path / "snapshot", allow_patterns=["*.safetensors", "figures/*"]
    )
    assert (tmp_path / "snapshot/model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "snapshot/figures/curves.txt").read_bytes() == b"0.5 0.4 0.3"
    assert not (tmp_path / "snapshot/README.md").exists()
    assert folder == str(tmp_path / "snapshot")


def test_a_download_in_the_cache_is_not_repeated(hub, published, tmp_path):
    hf_hub_download(published, "model.safetensors", cache_dir=tmp_path)
    hub.forget()
    hf_hub_download(published, "model.safetensors", cache_dir=tmp_path)
    assert hub.count("GET", "/storage/") == 0


def test_a_missing_file_a_missing_revision_and_a_missing_repository_have_names(published, tmp_path):
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        hf_hub_download(published, "nothing.bin", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        hf_hub_download(published, "\u03b3.bin", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        hf_hub_download(published, "README.md", revision="v9", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("astronomer/nothing", "README.md", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("nothing", "README.md", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_range_of_a_file_is_read(hub, published, name):
    content, url = hub.files(published)[name], f"{hub.url}/{published}/resolve/main/{name}"
    for wanted, expected in {"5-9": content[5:10], "60-": content[60:], "-7": content[-7:]}.items():
        answer = get_session().get(url, headers={"Range": f"bytes={wanted}"}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (206, expected)
    beyond = get_session().get(url, headers={"Range": f"bytes={len(content)}-"}, follow_redirects=True)
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(content)}")


def test_the_file_system_lists_and_reads(hub_token, published):
    files = HfFileSystem(token=hub_token, skip_instance_cache=True)
    assert set(files.glob(f"{published}/**")) >= {f"{published}/README.md", f"{published}/figures/curves.txt"}
    assert files.read_block(f"{published}/model.safetensors", 300, 10) == WEIGHTS[300:310]
    assert files.info(f"{published}/model.safetensors")["lfs"]["size"] == len(WEIGHTS)


# Repositories and revisions


def test_a_repository_is_described(api, published):
    info = api.model_info(published, files_metadata=True)
    assert info.pipeline_tag == "image-classification"
    assert {file.rfilename: file.size for file in info.siblings}["model.safetensors"] == len(WEIGHTS)
    assert info.sha == api.list_repo_commits(published)[0].commit_id
    assert [model.id for model in api.list_models(author="astronomer", search=published)] == [published]


def test_a_tree_is_listed_by_folder_and_page(hub, api, published):
    hub.page_size = 2
    assert {entry.path for entry in api.list_repo_tree(published)} == {
        ".gitattributes",
        "README.md",
        "figures",
        "model.safetensors",
    }
    recursive = [entry.path for entry in api.list_repo_tree(published, recursive=True)]
    assert len(recursive) == len(set(recursive)) == 5
    assert [entry.path for entry in api.list_repo_tree(published, "figures")] == ["figures/curves.txt"]
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        list(api.list_repo_tree(published, "nothing"))


def test_paths_carry_the_commit_that_changed_them(api, published):
    later = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published).oid
    last = {entry.path: entry.last_commit for entry in api.get_paths_info(published, ["a.txt", "figures"], expand=True)}
    assert last["a.txt"].oid == later
    assert last["figures"].title == "publish"
    assert api.get_paths_info(published, "nothing") == []


def test_branches_tags_and_commits_are_revisions(api, published, tmp_path):
    first = api.model_info(published).sha
    api.create_branch(published, branch="small/draft")
    api.create_tag(published, tag="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=published, revision="small/draft")
    refs = api.list_repo_refs(published)
    assert {branch.name for branch in refs.branches} == {"main", "small/draft"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert not api.file_exists(published, "a.txt", revision="v1")
    assert api.file_exists(published, "a.txt", revision="small/draft")
    assert first in hf_hub_download(published, "README.md", revision=first, cache_dir=tmp_path)
    api.delete_branch(published, branch="small/draft")
    api.delete_tag(published, tag="v1")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        api.model_info(published, revision="v1")


def test_a_repository_is_created_once_and_deleted(api, repo_id):
    url = api.create_repo(repo_id, repo_type="dataset")
    assert (url.repo_id, url.repo_type) == (repo_id, "dataset")
    assert api.create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id == repo_id
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(repo_id, repo_type="dataset")
    assert not api.repo_exists(repo_id)
    api.delete_repo(repo_id, repo_type="dataset")
    assert not api.repo_exists(repo_id, repo_type="dataset")


# Accounts


def test_the_account_of_a_token_is_told(hub):
    account = HfApi(token=hub.tokens["read"]).whoami()
    assert (account["name"], account["auth"]["accessToken"]["role"]) == ("astronomer", "read")
    assert [organization["name"] for organization in account["orgs"]] == ["galaxyzoo"]


def test_a_wrong_token_is_invalid_everywhere(published):
    stranger = HfApi(token="token-of-yesterday")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        stranger.whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        stranger.model_info(published)


def test_a_read_token_does_not_write(hub, published):
    reader = HfApi(token=hub.tokens["read"])
    with pytest.raises(HfHubHTTPError, match="read-only"):
        reader.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    with pytest.raises(HfHubHTTPError, match="read-only"):
        reader.create_repo("astronomer/by-a-reader")


def test_no_token_does_not_write(repo_id):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo(repo_id)


def test_only_members_create_under_an_organization(hub, api):
    assert api.create_repo("galaxyzoo/rings").repo_id == "galaxyzoo/rings"
    with pytest.raises(HfHubHTTPError, match="rights to create a model under the namespace galaxyzoo"):
        HfApi(token=hub.tokens["visitor"]).create_repo("galaxyzoo/bars")


@pytest.mark.parametrize("token_name", [None, "visitor"])
def test_a_private_repository_looks_missing_to_others(hub, hub_token, published, tmp_path, token_name):
    HfApi(token=hub_token).update_repo_settings(published, private=True)
    token = hub.tokens[token_name] if token_name else False
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download(published, "README.md", cache_dir=tmp_path, token=token)
    assert published not in [model.id for model in HfApi(token=token).list_models()]
    assert hf_hub_download(published, "README.md", cache_dir=tmp_path, token=hub_token)


def test_a_gated_repository_shows_itself_but_keeps_its_files(hub, api, published, tmp_path):
    api.update_repo_settings(published, gated="manual")
    for token in (False, hub.tokens["visitor"]):
        assert HfApi(token=token).model_info(published).gated == "manual"
        with pytest.raises(GatedRepoError, match="Cannot access gated repo"):
            hf_hub_download(published, "README.md", cache_dir=tmp_path, token=token)
    hub.repo(published).readers.add("visitor")
    assert hf_hub_download(published, "README.md", cache_dir=tmp_path, token=hub.tokens["visitor"])


# Faults


def test_a_failed_commit_raises_and_changes_nothing(hub, api, published):
    hub.fail_next("POST .*/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    assert len(hub.commits(published)) == 2
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    assert len(hub.commits(published)) == 3


def test_the_clients_try_again_after_503(hub, api, published):
    hub.fail_next("POST .*/preupload/", status=503)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    assert [seen.status for seen in hub.requests if "/preupload/" in seen.target][-2:] == [503, 200]


def test_an_upload_that_is_cut_is_sent_again(hub, api, published):
    hub.cut_next("PUT /storage/")
    api.upload_file(path_or_fileobj=WEIGHTS * 100, path_in_repo="big.bin", repo_id=published)
    assert hub.files(published)["big.bin"] == WEIGHTS * 100
    assert [seen.status for seen in hub.requests if seen.method == "PUT"][-2:] == [None, 200]


def test_a_commit_whose_answer_is_lost_has_happened(hub, api, published):
    hub.cut_next("POST .*/commit/", during="answer")
    with pytest.raises(Exception, match="closed connection"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=published)
    assert hub.files(published)["a.txt"] == b"1"


def test_a_download_that_is_cut_goes_on(hub, published, tmp_path):
    hub.cut_next("GET /storage/", during="answer")
    path = hf_hub_download(published, "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS


def test_an_answer_is_delayed(hub, api, published):
    hub.delay_next("GET /api/models", seconds=0.3)
    start = time.perf_counter()
    api.model_info(published)
    assert time.perf_counter() - start >= 0.3


def test_an_unknown_request_is_an_error_that_names_it(hub):
    answer = get_session().get(f"{hub.url}/api/unknown/thing/else/here")
    assert answer.status_code == 501
    assert answer.json() == {"error": "The test server has no GET /api/unknown/thing/else/here"}


# Other clients


def test_a_dataset_with_images_comes_back(hub, hub_token, repo_id, galaxy_images, galaxy_labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no ring", "ring"])})
    dataset = datasets.Dataset.from_dict({"image": galaxy_images, "label": list(galaxy_labels)}, features=features)
    dataset.push_to_hub(repo_id, token=hub_token, private=True)
    assert hub.repo(repo_id, kind="datasets").private
    loaded = datasets.load_dataset(repo_id, split="train", token=hub_token)
    assert loaded.features == features
    assert loaded["label"][:] == list(galaxy_labels)
    assert loaded[7]["image"].tobytes() == galaxy_images[7].tobytes()


def test_a_dataset_is_streamed(hub_token, repo_id):
    datasets.Dataset.from_dict({"votes": list(range(9))}).push_to_hub(repo_id, token=hub_token)
    streamed = datasets.load_dataset(repo_id, split="train", streaming=True)
    assert [row["votes"] for row in streamed] == list(range(9))


def test_a_transformers_config_comes_back(hub, hub_token, repo_id, tmp_path):
    ResNetConfig(depths=[1, 2, 3, 4]).push_to_hub(repo_id, token=hub_token)
    assert AutoConfig.from_pretrained(repo_id, cache_dir=tmp_path).depths == [1, 2, 3, 4]
    assert [commit.title for commit in hub.commits(repo_id)] == ["Upload config", "initial commit"]


def test_a_repository_is_stored_without_requests(hub, repo_id, tmp_path):
    hub.add_repo(Repo("models", repo_id), {"config.json": b"{}", "model.safetensors": WEIGHTS})
    assert hub.requests == []
    path = hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS


def test_a_process_started_by_a_test_reaches_the_hub(hub, published):
    script = "import sys, huggingface_hub as h; api = h.HfApi(); print(api.endpoint, api.repo_exists(sys.argv[1]))"
    output = subprocess.run(
        [sys.executable, "-c", script, published], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == [hub.url, "True"]


# The guard


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.create_connection(("example.org", 80), timeout=1),
        lambda: socket.getaddrinfo(b"example.org", 443),
        lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53)),
        lambda: get_session().get("https://example.org"),
    ],
)
def test_a_call_to_the_outside_fails_the_test(outside_calls, ask):
    with pytest.raises(pytest.fail.Exception, match=r"no network, but (example\.org|192\.0\.2\.1) was asked for"):
        ask()
    assert len(outside_calls) == 1
    outside_calls.clear()


def test_loopback_and_local_sockets_are_allowed(hub, tmp_path, outside_calls):
    socket.create_connection(("localhost", int(hub.url.rpartition(":")[2]))).close()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))
    assert outside_calls == []
