"""Repositories in the cache of the Hub's client, as downloads would have left them: for tests without any server."""

import hashlib
import os
from pathlib import Path


def commit_of(text):
    return hashlib.sha1(text.encode()).hexdigest()


def put_into_cache(cache, repo_id, folder, commit, branch="main"):
    """Make a cache hold one commit of a repository, with the files of a folder; safetensors are named by their SHA-256."""
    root = Path(cache) / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        blob = root / "blobs" / (hashlib.sha256(data) if large else hashlib.sha1(b"blob " + data)).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot
