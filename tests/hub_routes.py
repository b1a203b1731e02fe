"""What the test Hub answers: one handler below each `@route` line, as huggingface_hub calls them."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import parse_qs, urlsplit

from hub_store import (
    HubError,
    Repo,
    User,
    changed_files,
    info_json,
    is_binary,
    tree_json,
)

LARGEST_REGULAR_FILE = 10_000_000  # bytes; the Hub asks for LFS above it
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # in every new repository


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # path and query, as sent
    headers: Message  # names in any case
    body: bytes = b""
    user: User | None = None

    @property
    def path(self):
        return urlsplit(self.target).path

    @property
    def query(self):
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def json(self):
        return json.loads(self.body or b"null")


@dataclass(frozen=True)
class Response:
    content: object = b""  # bytes go out as they are, anything else as JSON
    status: int = 200
    headers: dict = field(default_factory=dict)

    @property
    def body(self):
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()

    @classmethod
    def of(cls, error):
        return cls({"error": str(error)}, error.status, error.headers)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
PARTS = {"kind": "models|datasets", "repo_id": r"[^/]+(?:/[^/]+)?", "path": ".+", "oid": "[0-9a-f]{64}"}
API = "/api/{kind}/{repo_id}"


def route(method, pattern):
    """Registers a handler `(hub, request, **parts)` for the paths of `pattern`; the first match answers."""
    regex = re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS.get(part[1], '[^/]+')})", pattern)

    def register(handle):
        ROUTES.append((method, re.compile(regex), handle))
        return handle

    return register


def repo_route(method, pattern):
    """As `route`, for a handler `(hub, request, repo, **parts)`; the repository is one that the user may see."""

    def register(handle):
        @route(method, pattern)
        def find_repo_and_handle(hub, request, kind, repo_id, **parts):
            return handle(hub, request, hub.visible_repo(request.user, repo_id, kind=kind or "models"), **parts)

        return handle

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    user = require_user(request)
    organizations = [{"name": name, "type": "org"} for name in user.organizations]
    account = {"type": "user", "name": user.name, "fullname": user.name, "email": f"{user.name}@example.org"}
    return Response(account | {"orgs": organizations, "auth": {"accessToken": {"role": user.role}}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    return Response({"errors": [], "warnings": []})


@route("GET", "/api/(?:telemetry/{path}|agent-harnesses)")
def no_telemetry(hub, request, path):
    raise HubError(404, "This server collects nothing")


@route("POST", "/api/repos/create")
def create_repo(hub, request):
    user = require_user(request, role="write")
    wanted = request.json
    repo_id = f"{wanted['organization'] or user.name}/{wanted['name']}"
    kind = f"{wanted.get('type') or 'model'}s"
    repo = Repo(kind, repo_id, private=wants_private(wanted))
    if not user.owns(repo):
        raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {repo.owner}")
    url = f"{hub.url}/{repo.address}"
    if (kind, repo_id) in hub.repos:
        # The client reads the address from this error too, when told that the repository may exist.
        return Response({"error": "You already created this repo", "url": url}, status=409)
    hub.add_repo(repo, FIRST_FILES)
    return Response({"url": url, "name": repo_id})


@repo_route("GET", f"{API}/tree/{{revision}}(?:/{{path}})?")
def list_tree(hub, request, repo, revision, path):
    commit, folder = repo.commit_at(revision), path or ""
    return Response(tree_json(commit, folder, recursive=is_true(request.query.get("recursive"))))


@repo_route("POST", f"{API}/paths-info/{{revision}}")
def paths_info(hub, request, repo, revision):
    form = parse_qs(request.body.decode())
    commit = repo.commit_at(revision)
    wanted = {path.strip("/") for path in form.get("paths", [])}
    return Response([entry for entry in tree_json(commit, "", recursive=True) if entry["path"] in wanted])


@repo_route("POST", f"{API}/(?P<group>branch|tag)/{{name}}")
def add_ref(hub, request, repo, group, name):
    require_owner(request, repo)
    wanted = request.json or {}
    # A branch is named in the path and may start anywhere; a tag's path holds the revision that it names.
    branch = (f"refs/heads/{name}", wanted.get("startingPoint", "main"))
    ref, revision = branch if group == "branch" else (f"refs/tags/{wanted['tag']}", name)
    if ref in repo.heads:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.heads[ref] = repo.commit_at(revision)
    return Response({})


@repo_route("PUT", f"{API}/settings")
def change_settings(hub, request, repo):
    require_owner(request, repo)
    wanted = request.json
    repo.private = wants_private(wanted) if wanted.keys() & {"visibility", "private"} else repo.private
    repo.gated = wanted.get("gated", repo.gated)
    return Response({})


@repo_route("POST", f"{API}/preupload/{{revision}}")
def choose_upload_modes(hub, request, repo, revision):
    require_contributor(request, repo, revision)
    present = repo.commit_at(revision).files
    answers = []
    for file in request.json["files"]:
        is_lfs = is_binary(base64.b64decode(file["sample"])) or file["size"] > LARGEST_REGULAR_FILE
        answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
        blob = present.get(file["path"])
        # With the content's present hash, the client leaves out a file that has not changed.
        answers.append(answer | ({"oid": blob.etag} if blob and blob.is_lfs == is_lfs else {}))
    return Response({"files": answers})


@repo_route("POST", f"{API}/commit/{{revision}}")
def commit(hub, request, repo, revision):
    user = require_contributor(request, repo, revision)
    header, *changes = [json.loads(line) for line in request.body.splitlines()]
    base, title = repo.commit_at(revision), header["value"]["summary"]
    if header["value"].get("parentCommit", base.oid) != base.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = changed_files(base.files, changes, uploads=hub.uploads)
    pull_request_url, ref = None, repo.ref(revision)
    if is_true(request.query.get("create_pr")):
        number = repo.open_pull_request(base)
        pull_request_url, ref = f"{hub.url}/{repo.address}/discussions/{number}", f"refs/pr/{number}"
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, f"Commits go to a branch or a pull request, got {revision}")
    new = repo.add_commit(ref, files, title=title, author=user.name, message=header["value"].get("description", ""))
    url = f"{hub.url}/{repo.address}/commit/{new.oid}"
    return Response({"commitUrl": url, "commitOid": new.oid, "pullRequestUrl": pull_request_url, "success": True})


@repo_route("GET", f"{API}(?:/revision/{{revision}})?")
def repo_info(hub, request, repo, revision):
    return Response(info_json(repo, repo.commit_at(revision or "main"), with_blobs=is_true(request.query.get("blobs"))))


@repo_route("POST", "/(?:{kind}/)?{repo_id}\\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, repo):
    require_contributor(request, repo, "refs/pr/any")
    verify = {"href": f"{hub.url}/{repo.address}.git/info/lfs/objects/verify"}
    answers = []
    for wanted in request.json["objects"]:
        upload = {"href": f"{hub.storage_url}/storage/{wanted['oid']}"}
        missing = {} if wanted["oid"] in hub.uploads else {"actions": {"upload": upload, "verify": verify}}
        answers.append({"oid": wanted["oid"], "size": wanted["size"]} | missing)
    return Response({"transfer": "basic", "objects": answers})


@repo_route("POST", "/(?:{kind}/)?{repo_id}\\.git/info/lfs/objects/verify")
def lfs_verify(hub, request, repo):
    if len(hub.uploads.get(request.json["oid"], b"")) != request.json["size"]:
        raise HubError(404, f"Not uploaded: {request.json['oid']}")
    return Response({})


@route("PUT", "/storage/{oid}")
def upload(hub, request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"The body's SHA256 is not {oid}")
    hub.uploads[oid] = request.body
    return Response()


@route("GET", "/storage/{oid}")
def stored_file(hub, request, oid):
    return content_response(request, hub.uploads[oid], headers={"ETag": f'"{oid}"'})


@repo_route("GET", "/(?:{kind}/)?{repo_id}/resolve/{revision}/{path}")
def resolve(hub, request, repo, revision, path):
    require_entry(request, repo)
    found = repo.commit_at(revision)
    headers = {"X-Repo-Commit": found.oid}
    if path not in found.files:
        raise HubError(404, f"Entry not found: {path}", code="EntryNotFound", headers=headers.items())
    blob = found.files[path]
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.is_lfs:
        return content_response(request, blob.content, headers=headers)
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    location = {"Location": f"{hub.storage_url}/storage/{blob.sha256}"}
    return Response(status=302, headers=headers | linked | location)


# Who may do what, and what the routes share


def require_user(request, *, role="read"):
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if role == "write" and request.user.role == "read":
        raise HubError(403, "This token is read-only: use a token with write access")
    return request.user


def require_owner(request, repo):
    user = require_user(request, role="write")
    if not user.owns(repo):
        raise HubError(403, f"{user.name} may not write to {repo.id}; pass `create_pr=1` to open a pull request")
    return user


def require_contributor(request, repo, revision):
    """Anybody who can see a repository may propose a change, its owner alone may make one."""
    is_proposal = is_true(request.query.get("create_pr")) or revision.startswith("refs/pr/")
    return require_user(request, role="write") if is_proposal else require_owner(request, repo)


def require_entry(request, repo):
    user = request.user
    if repo.gated and not (user and (user.owns(repo) or user.name in repo.readers)):
        message = f"Access to {repo.kind[:-1]} {repo.id} is restricted. Ask for access on its page."
        raise HubError(403 if user else 401, message, code="GatedRepo")


def wants_private(wanted):
    """Newer clients send `visibility`, older ones `private`."""
    return wanted.get("visibility") == "private" or bool(wanted.get("private"))


def is_true(value):
    return str(value).lower() in ("1", "true")


def content_response(request, content, *, headers):
    """The content, or the part of it that a Range header asks for."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return Response(content, headers=headers)
    first, last, size = wanted[1], wanted[2], len(content)
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        return Response(status=416, headers={"Content-Range": f"bytes */{size}"})
    return Response(content[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})
