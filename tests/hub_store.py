"""What the test Hub keeps: users, repositories, commits and files, and the JSON that the Hub shows them as.

A stored file is a `Blob`; a commit is immutable and knows all its files, `{path: Blob}`, and its parent.
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property


class HubError(Exception):
    """An answer that the clients turn into an exception; `code` is the Hub's own name for the error."""

    def __init__(self, status, message, *, code=None, headers=()):
        super().__init__(message)
        self.status = status
        one_line = message.splitlines()[-1].encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": one_line} | ({"X-Error-Code": code} if code else {}) | dict(headers)


@dataclass(frozen=True)
class User:
    name: str
    role: str  # of the token: admin, write or read
    organizations: tuple[str, ...] = ()

    def owns(self, repo):
        return repo.owner in (self.name, *self.organizations)


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self):
        """The git object id, for an LFS file that of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return git_oid(pointer.encode() if self.is_lfs else self.content)

    @property
    def size(self):
        return len(self.content)

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.oid


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_binary(sample):
    try:
        sample[:-3].decode()  # the last character of a sample may be cut in two
    except UnicodeDecodeError:
        return True
    return b"\0" in sample


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    author: str
    date: str
    parent: "Commit | None"
    files: dict[str, Blob]

    @cached_property
    def oid(self):
        parts = [self.title, self.date, self.parent.oid if self.parent else ""]
        parts += [f"{path} {blob.oid}" for path, blob in sorted(self.files.items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def history(self) -> Iterator["Commit"]:
        commit = self
        while commit:
            yield commit
            commit = commit.parent

    def below(self, folder):
        """The files in `folder` ("" for all), or the Hub's error for a folder that is not there."""
        files = {path: blob for path, blob in self.files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not files:
            raise HubError(404, f"{folder} does not exist on {self.oid}", code="EntryNotFound")
        return files


@dataclass
class Repo:
    kind: str  # models or datasets
    id: str
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)  # users who were let into a gated repository
    heads: dict[str, Commit] = field(default_factory=dict)  # full names: refs/heads/main, refs/tags/v1, refs/pr/1

    @property
    def owner(self):
        return self.id.rpartition("/")[0]

    @property
    def address(self):
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def ref(self, revision):
        """The full name of a branch, tag or pull request; None where there is no such name."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.heads), None)

    def commit_at(self, revision):
        if name := self.ref(revision):
            return self.heads[name]
        for commit in (commit for head in self.heads.values() for commit in head.history()):
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def add_commit(self, ref, files, *, title, author, message=""):
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.heads[ref] = Commit(title, message, author, date, self.heads.get(ref), dict(files))
        return self.heads[ref]

    def open_pull_request(self, base):
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.heads)
        self.heads[f"refs/pr/{number}"] = base
        return number

    def card_value(self, commit, key):
        """A plain `key: value` line at the top of README.md; nested YAML is not read."""
        card = commit.files.get("README.md", Blob(b"", False)).content.decode()
        found = re.search(rf"\A---\n(?:.*\n)*?{key}: *(.+)\n(?:.*\n)*?---", card)
        return found and found.group(1).strip("\"' ")


def changed_files(files, changes, *, uploads):
    """The files after the lines of a commit's body, in order."""
    files = dict(files)
    for change in changes:
        key, value = change["key"], change["value"]
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile" and value["oid"] in uploads:
            files[path] = Blob(uploads[value["oid"]], is_lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder" and any(name.startswith(f"{path}/") for name in files):
            files = {name: blob for name, blob in files.items() if not name.startswith(f"{path}/")}
        elif key.startswith("deleted"):
            raise HubError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
        else:
            raise HubError(400, f"Can't commit {key} {path}: it was not uploaded before")
    return files


# As JSON


def file_json(path, blob):
    lfs = {"lfs": {"oid": blob.sha256, "sha256": blob.sha256, "size": blob.size, "pointerSize": 134}}
    return {"type": "file", "path": path, "oid": blob.oid, "size": blob.size} | (lfs if blob.is_lfs else {})


def tree_json(commit, folder, *, recursive):
    """The entries of a folder, parents before children."""
    entries = {}
    depth = folder.count("/") + 1 if folder else 0
    for path, blob in sorted(commit.below(folder).items()):
        parts = path.split("/")
        for end in range(depth + 1, len(parts)):
            parent = "/".join(parts[:end])
            entries[parent] = {"type": "directory", "path": parent, "oid": git_oid(parent.encode()), "size": 0}
        entries[path] = file_json(path, blob)
    return [entry for path, entry in entries.items() if recursive or path.count("/") == depth]


def info_json(repo, commit, *, with_blobs=False):
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if with_blobs:
        siblings = [file_json(path, blob) | {"rfilename": path} for path, blob in sorted(commit.files.items())]
    return {
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "tags": [],
        "library_name": repo.card_value(commit, "library_name"),
        "pipeline_tag": repo.card_value(commit, "pipeline_tag"),
        "siblings": siblings,
    }
