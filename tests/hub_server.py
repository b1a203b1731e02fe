"""A Hugging Face Hub on loopback, for the real clients: huggingface_hub, transformers and datasets.

Accounts, repositories, commits, pull requests, LFS and downloads as the Hub's HTTP interface has them, kept in
memory (`hub_store.py`) and answered by `hub_routes.py`. LFS files lie at another origin (`localhost` instead of
`127.0.0.1`), as on the Hub's CDN. Requests can be counted, and be made to fail.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.tokens["write"])
"""

import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from hub_routes import ROUTES, Request, Response
from hub_store import Blob, HubError, Repo, User, is_binary


@dataclass(frozen=True)
class RequestRecord:
    """A line of `HubServer.requests`: `status` is None for a request whose connection was cut."""

    method: str
    target: str
    has_token: bool
    status: int | None


@dataclass
class Fault:
    """What happens to the next requests whose "METHOD /path?query" matches."""

    match: str
    times: int
    status: int | None = None
    cut: str | None = None
    delay: float = 0.0


class HubServer:
    """A running Hub: `url`, `tokens`, what it stores, and the requests that it saw.

    The tokens "admin", "write" and "read" belong to the user astronomer (in the organization galaxyzoo), "visitor"
    to another user with a write token of their own.
    """

    def __init__(self):
        astronomer = {role: User("astronomer", role, ("galaxyzoo",)) for role in ("admin", "write", "read")}
        users = astronomer | {"visitor": User("visitor", "write")}
        self.tokens = {name: f"token-{name}" for name in users}
        self.users = {self.tokens[name]: user for name, user in users.items()}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}  # LFS files by SHA256
        self.requests: list[RequestRecord] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    # For tests: what is stored

    def repo(self, repo_id, *, kind="models"):
        return self.repos[kind, repo_id]

    def commits(self, repo_id, *, kind="models", revision="main"):
        """The commits of a revision, newest first; the last one is the creation of the repository."""
        return list(self.repo(repo_id, kind=kind).commit_at(revision).history())

    def files(self, repo_id, *, kind="models", revision="main"):
        files = self.repo(repo_id, kind=kind).commit_at(revision).files
        return {path: blob.content for path, blob in files.items()}

    def add_repo(self, repo, files):
        """Stores a new repository with one commit of `{path: bytes}`, and no request."""
        blobs = {path: Blob(content, is_lfs=is_binary(content)) for path, content in files.items()}
        self.uploads |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_lfs}
        repo.add_commit("refs/heads/main", blobs, title="initial commit", author=repo.owner)
        self.repos[repo.kind, repo.id] = repo

    # For tests: what was asked, and what shall go wrong

    def count(self, method, pattern=""):
        """How many requests with this method had a path and query in which the pattern is found."""
        return sum(seen.method == method and bool(re.search(pattern, seen.target)) for seen in self.requests)

    def fail_next(self, match, *, status, times=1):
        """Answers the next requests whose "METHOD /path" the pattern finds with an error."""
        self.faults.append(Fault(match, times, status=status))

    def cut_next(self, match, *, during="request", times=1):
        """Cuts the connection: "request" before anything is done, "answer" after it was done, half way through."""
        self.faults.append(Fault(match, times, cut=during))

    def delay_next(self, match, *, seconds, times=1):
        self.faults.append(Fault(match, times, delay=seconds))

    def forget(self):
        """Clears the request log and the faults that did not happen; the repositories stay."""
        self.requests.clear()
        self.faults.clear()

    # For the routes

    def may_see(self, user, repo):
        return not repo.private or (user is not None and user.owns(repo))

    def visible_repo(self, user, repo_id, *, kind):
        repo = self.repos.get((kind, repo_id))
        if repo is None or not self.may_see(user, repo):
            # A private repository answers as one that does not exist; 401 asks a stranger to log in first.
            raise HubError(404 if user else 401, "Repository not found", code="RepoNotFound")
        return repo

    def take_fault(self, method, target):
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, f"{method} {target}"):
                    fault.times -= 1
                    return fault
        return Fault("", 0)

    def respond(self, request):
        with self._lock:
            try:
                return self._handle(replace(request, user=self._user(request)))
            except HubError as error:
                return Response.of(error)
            except Exception:
                # A fault of this server must not look like a lost connection, which the clients try again.
                return Response.of(HubError(501, f"The test server failed: {traceback.format_exc()}"))

    def _user(self, request):
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and request.path.startswith("/storage/"):
            raise HubError(400, "A token was sent to the storage, which is another origin")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def _handle(self, request):
        method = "GET" if request.method == "HEAD" else request.method
        for known_method, pattern, handle in ROUTES:
            if known_method == method and (found := pattern.fullmatch(request.path)):
                parts = {name: value and unquote(value) for name, value in found.groupdict().items()}
                return handle(self, request, **parts)
        # The clients try again after most errors of a server, but not after this one.
        raise HubError(501, f"The test server has no {request.method} {request.path}")


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # clients upload and download many files at once

    def handle_error(self, request, client_address):
        """Says nothing of clients that hang up first, as one that runs out of time does."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        fault = self.hub.take_fault(self.command, self.path)
        time.sleep(fault.delay)
        if fault.cut == "request":
            self.cut()
        else:
            self.respond(fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def cut(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.note(None)
        self.hang_up()

    def respond(self, fault):
        request = Request(self.command, self.path, self.headers, self.read_body())
        failure = fault.status and Response.of(HubError(fault.status, "Failed as the test wanted"))
        response = failure or self.hub.respond(request)
        self.send(response, is_cut=fault.cut == "answer")

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, response, *, is_cut):
        # Noted before the client can go on, so that a test that has its answer finds the request in the log.
        self.note(None if is_cut else response.status)
        if is_cut and not response.body:
            self.hang_up()  # an empty answer has no half way but before its headers
            return
        self.send_response(response.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(response.body))} | response.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if is_cut else response.body)
        if is_cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def note(self, status):
        self.hub.requests.append(RequestRecord(self.command, self.path, "Authorization" in self.headers, status))

    def log_message(self, *arguments):
        """Says nothing: the requests are in `HubServer.requests`."""
