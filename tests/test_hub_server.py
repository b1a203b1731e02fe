"""The test Hub, as the real clients see it."""

import socket
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download

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


def test_binary_files_travel_by_lfs_to_another_origin_without_a_token(hub, api, published):
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="new.bin", repo_id=published)
    uploads = [seen for seen in hub.requests if seen.method == "PUT"]
    assert uploads
    assert not any(seen.has_token for seen in uploads)
    blobs = hub.repo(published).commit_at("main").files
    assert {path for path, blob in blobs.items() if blob.is_lfs} == {"model.safetensors", "new.bin"}


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


def test_an_unknown_request_is_an_error_that_names_it(hub):
    answer = get_session().get(f"{hub.url}/api/unknown/thing/else/here")
    assert answer.status_code == 501
    assert answer.json() == {"error": "The test server has no GET /api/unknown/thing/else/here"}


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
