"""What a Hub holds: repositories, their commits and references, blobs on disk, users.  The protocol is `hub_server`'s."""

import fnmatch
import hashlib
import itertools
import threading
from dataclasses import dataclass, field
from pathlib import Path

LFS_BY_NAME = ("*.safetensors", "*.bin", "*.pt", "*.onnx", "*.parquet")  # what a new repository's .gitattributes says
LFS_FROM = 10 * 1000 * 1000


class Refused(Exception):
    """An answer that is no success: status, error code, message."""

    def __init__(self, status, code="", message=""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class File:
    sha256: str
    size: int
    lfs: bool
    git_oid: str

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    id: str
    parent: str | None
    files: dict
    title: str
    author: str
    description: str = ""


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    readers: set = field(default_factory=set)
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    pulls: dict = field(default_factory=dict)

    @property
    def owner(self):
        return self.id.partition("/")[0]


class HubStore:
    """Repositories below a folder; `users` maps tokens to ``(name, may write)``."""

    def __init__(self, root):
        self.blobs = Path(root) / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, tuple[str, bool]] = {}
        self.lock = threading.RLock()
        self.numbers = itertools.count()

    # ---- users and repositories

    def user(self, token):
        """Name and right of a token's owner; (None, False) without a token."""
        if token is None:
            return None, False
        if token not in self.users:
            raise Refused(401, "", "Invalid username or password.")
        return self.users[token]

    def create(self, repo_id, private, token):
        name, writes = self.user(token)
        if name is None:
            raise Refused(401, "", "Invalid username or password.")
        if not writes or repo_id.partition("/")[0] != name:
            raise Refused(
                403,
                "",
                f"You don't have the rights to create a model under the namespace {repo_id.partition('/')[0]!r}",
            )
        if repo_id in self.repos:
            raise Refused(409, "", "You already created this model repo")
        self.repos[repo_id] = repo = Repo(repo_id, private)
        first = self.add_commit(repo, "main", {}, "initial commit", name, new=True)
        return repo, first

    def readable(self, repo_id, token):
        """The repository, as far as this token may know of it."""
        name, _ = self.user(token)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and name != repo.owner and name not in repo.readers):
            raise Refused(401 if name is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def open_files(self, repo_id, token):
        """As `readable`, for the content of files: gated ones are closed."""
        repo, (name, _) = self.readable(repo_id, token), self.user(token)
        if repo.gated and name != repo.owner and name not in repo.readers:
            raise Refused(401 if name is None else 403, "GatedRepo", f"Access to model {repo.id} is restricted.")
        return repo

    def writable(self, repo_id, token):
        repo, (name, writes) = self.readable(repo_id, token), self.user(token)
        if not writes or name != repo.owner:
            raise Refused(
                401 if name is None else 403, "", "Forbidden: you do not have write access to this repository"
            )
        return repo, name

    # ---- commits

    def resolve(self, repo, revision):
        """The commit that a branch, a tag, refs/pr/N or an id means."""
        if revision.startswith("refs/pr/"):
            found = repo.pulls.get(int(revision.removeprefix("refs/pr/")))
        else:
            name = revision.removeprefix("refs/heads/")
            found = repo.branches.get(name) or repo.tags.get(name) or (revision if revision in repo.commits else None)
        if found is None or found not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.commits[found]

    def put_blob(self, data, lfs):
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.blobs / sha256
        if not path.exists():
            path.write_bytes(data)
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return File(sha256, len(data), lfs, oid)

    def is_lfs(self, path, size):
        return size >= LFS_FROM or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_BY_NAME)

    def add_commit(self, repo, branch, files, title, author, new=False, pull=False, description=""):
        """Put a commit on a branch, or on a new pull request; returns it and the pull request's number."""
        with self.lock:
            parent = None if new else self.resolve(repo, branch).id
            made = hashlib.sha1(f"{repo.id} {next(self.numbers)} {title}".encode()).hexdigest()
            repo.commits[made] = Commit(made, parent, dict(files), title, author, description)
            number = None
            if pull:
                number = len(repo.pulls) + 1
                repo.pulls[number] = made
            elif branch.startswith("refs/pr/"):
                repo.pulls[int(branch.removeprefix("refs/pr/"))] = made
            else:
                repo.branches[branch.removeprefix("refs/heads/")] = made
            return repo.commits[made], number

    # ---- what tests do behind the clients' backs

    def put_folder(self, repo_id, folder, title="a folder", branch="main", description=""):
        """Commit all files of a folder, and no others, to a repository; makes it if need be.  Returns the commit's id."""
        repo = self.repos.get(repo_id)
        if repo is None:
            self.repos[repo_id] = repo = Repo(repo_id)
            self.add_commit(repo, "main", {}, "initial commit", repo.owner, new=True)
        files = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                files[name] = self.put_blob(path.read_bytes(), self.is_lfs(name, path.stat().st_size))
        return self.add_commit(repo, branch, files, title, repo.owner, description=description)[0].id

    def forget(self, repo_id, commit):
        """As after a forced push: a commit is no longer there."""
        del self.repos[repo_id].commits[commit]

    def flip_bit(self, repo_id, path, branch="main"):
        """Change one bit of a file's content, but not what is said of it."""
        repo = self.repos[repo_id]
        blob = self.blobs / self.resolve(repo, branch).files[path].sha256
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(bytes(data))

    def content(self, repo_id, branch="main"):
        """All files at a branch, by path."""
        repo = self.repos[repo_id]
        return {
            path: (self.blobs / file.sha256).read_bytes() for path, file in self.resolve(repo, branch).files.items()
        }
