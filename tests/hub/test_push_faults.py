"""What may go wrong between looking at a repository and committing to it, and what a push must not lose or give away."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from helpers import compose_tiny
from hub_client import Client, Failed
from hub_server import HubServer

from cornstarch_hf.hub import upload as uploading

TOKEN, READ = "hf_" + "w" * 34, "hf_" + "r" * 34
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 100, "README.md": b"# a\n"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.users |= {TOKEN: ("user", True), READ: ("user", False)}
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    made = Client(hub, tmp_path_factory.mktemp("home"), TOKEN)
    folder = tmp_path_factory.mktemp("parts")
    model, processor = compose_tiny(["clip"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    made(
        """
        import torch
        from huggingface_hub import HfApi
        from cornstarch_hf import MultimodalModel, MultimodalProcessor, push_to_hub
        from cornstarch_hf.hub.upload import upload
        stale = lambda name: name.startswith("model")
        model, processor = MultimodalModel.from_pretrained(folder), MultimodalProcessor.from_pretrained(folder)
        """,
        folder=str(folder),
    )
    yield made
    made.close()


@pytest.fixture
def repo(hub, client, request):
    """The name of a repository of the test's own, which does not exist yet; the log and the faults are empty."""
    hub.calls.clear()
    hub.faults.clear()
    return f"user/{''.join(c if c.isalnum() else '-' for c in request.node.name)[:80].strip('-')}"


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "checkpoint", FILES)


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def upload(client, folder, repo, **options):
    code = "info = upload(folder, repo, stale=stale, **options)\nprint(info.oid, info.pr_url)"
    return client(code, folder=str(folder), repo=repo, options=options).split()


def commits(hub):
    return [status for _, path, status in hub.asked("POST") if "/commit/" in path]


def described(hub):
    """The descriptions that commits were sent with."""
    return [call["header"]["description"] for call in hub.calls if "header" in call]


def head(hub, repo, branch="main"):
    return hub.resolve(hub.repos[repo], branch)


class When:
    """Do something in a thread as soon as a request whose path contains `path` arrived `times` times."""

    def __init__(self, hub, path, action, times=1):
        self.hub, self.path, self.action, self.times, self.done = hub, path, action, times, False
        self.thread = threading.Thread(target=self.run)

    def run(self):
        deadline = time.monotonic() + 60
        while sum(self.path in path for _, path, _ in self.hub.asked()) < self.times and time.monotonic() < deadline:
            time.sleep(0.02)
        self.action()
        self.done = True

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join()
        assert self.done


# ---- answers that do not come


def test_faults_at_every_step_are_tried_again(hub, client, folder, repo):
    hub.fail("POST", "/repos/create", drop=True)
    hub.fail("POST", "/repos/create", lost=True)  # made, but not said
    hub.fail("GET", "/revision/dev", status=503)
    hub.fail("POST", "/branch/", lost=True)
    hub.fail("POST", "/preupload/", status=500)
    hub.fail("PUT", "/upload/", drop=True)
    hub.fail("POST", "/commit/", drop=True)
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "0"})
    oid, _ = upload(client, folder, repo, revision="dev")
    assert not any(fault["times"] for fault in hub.faults), "each fault struck"
    assert hub.content(repo, "dev") == FILES and head(hub, repo, "dev").id == oid
    assert commits(hub) == [None, 429, 200] and len(hub.repos[repo].commits) == 2


def test_a_hub_that_is_away_is_an_os_error_that_says_so(hub, client, folder, repo):
    hub.fail("POST", "/repos/create", times=99, status=503, headers={"Retry-After": "0"})
    with pytest.raises(Failed, match=f"{repo}: the Hub did not answer in {uploading.TRIES} tries") as caught:
        upload(client, folder, repo)
    assert "OSError" in caught.value.kinds and len(hub.asked("POST")) == uploading.TRIES and repo not in hub.repos


def test_a_commit_that_is_made_late_is_recognised(hub, client, folder, repo):
    """As when a gateway gives up (504) while the Hub still works on the commit: the second try finds it made."""
    hub.put_folder(repo, folder)
    start = head(hub, repo).id
    (folder / "config.json").write_text("[1]")
    hub.fail("POST", "/commit/", status=504)
    hub.fail("POST", "/commit/", seconds=1)

    def made_late():
        hub.put_folder(repo, folder, description=described(hub)[0])

    with When(hub, "/commit/", made_late, times=2):
        oid, _ = upload(client, folder, repo)
    assert oid == head(hub, repo).id and head(hub, repo).parent == start and commits(hub) == [504, 412]


def test_a_late_commit_of_somebody_else_is_an_error(hub, client, folder, repo, tmp_path):
    hub.put_folder(repo, folder)
    (folder / "config.json").write_text("[1]")
    other = folder_of(tmp_path / "other", FILES | {"config.json": b"[9]"})
    hub.fail("POST", "/commit/", status=504)
    hub.fail("POST", "/commit/", seconds=1)
    with (
        When(hub, "/commit/", lambda: hub.put_folder(repo, other), times=2),
        pytest.raises(Failed, match="somebody committed meanwhile"),
    ):
        upload(client, folder, repo)
    assert hub.content(repo)["config.json"] == b"[9]"


def test_a_commit_that_somebody_built_upon_is_not_called_lost(hub, client, folder, repo):
    hub.put_folder(repo, folder)
    (folder / "config.json").write_text("[1]")
    hub.fail("POST", "/commit/", lost=True)
    hub.fail("GET", "/commits/", seconds=1)
    with (
        When(hub, "/commits/", lambda: commit_file(hub, repo, "notes.md", b"theirs")),
        pytest.raises(Failed, match="your commit .* was made, but somebody committed meanwhile on top of it") as caught,
    ):
        upload(client, folder, repo)
    theirs = head(hub, repo)
    assert theirs.parent[:8] in caught.value.message and theirs.id[:8] in caught.value.message
    assert "ValueError" in caught.value.kinds and hub.content(repo)["config.json"] == b"[1]"


def test_a_lost_pull_request_is_told_from_somebody_elses(hub, client, folder, repo, tmp_path):
    hub.put_folder(repo, folder)
    (folder / "config.json").write_text("[1]")
    other = folder_of(tmp_path / "other", FILES | {"config.json": b"[9]"})
    theirs = hub.put_folder(f"{repo}-fork", other)

    def propose():
        files = hub.resolve(hub.repos[f"{repo}-fork"], theirs).files
        hub.add_commit(hub.repos[repo], "main", files, "theirs", "other", pull=True)

    hub.fail("POST", "/preupload/", seconds=1)
    hub.fail("POST", "/commit/", lost=True)
    with When(hub, "/preupload/", propose):
        oid, url = upload(client, folder, repo, create_pr=True)
    assert oid == hub.repos[repo].pulls[2] and url.endswith("/discussions/2") and commits(hub) == [200]


def test_a_pull_request_that_somebody_else_came_before_is_not_tried_for_ever(hub, client, folder, repo):
    hub.put_folder(repo, folder)
    (folder / "config.json").write_text("[1]")
    hub.fail("POST", "/commit/", status=504)
    hub.fail("POST", "/commit/", status=412, times=9)
    with pytest.raises(Failed, match="somebody committed meanwhile") as caught:
        upload(client, folder, repo, create_pr=True)
    assert "ValueError" in caught.value.kinds and commits(hub) == [504, 412]


def test_every_try_bears_one_mark_after_the_users_words(hub, client, folder, repo):
    hub.fail("POST", "/commit/", status=500)
    upload(client, folder, repo, commit_description="my words")
    (folder / "config.json").write_text("[1]")
    upload(client, folder, repo)
    first, again, other = described(hub)
    assert first == again and head(hub, repo).description == other
    mark = re.fullmatch(r"my words\n\n(Push-Id: [0-9a-f]{32})", first)[1]
    assert re.fullmatch(r"Push-Id: [0-9a-f]{32}", other) and other != mark


def test_a_commit_is_no_branch(hub, client, folder, repo):
    start = hub.put_folder(repo, folder)
    with pytest.raises(Failed, match=f"{start} is a commit, and commits are made on branches"):
        upload(client, folder, repo, revision=start)
    assert list(hub.repos[repo].branches) == ["main"] and not commits(hub)


# ---- what goes and what does not


def test_code_named_like_a_state_of_a_run_goes(folder):
    for name in (
        "optimizer.py",
        "optimizer_tokenizer/vocab.json",
        "rng_state.py",
        "optimizer.pt",
        "optimizer_0/x",
        "optimizer.bin",
    ):
        folder_of(folder, {name: b"{}"})
    kept = set(uploading.uploadable(folder)) - set(FILES)
    assert kept == {"optimizer.py", "optimizer_tokenizer/vocab.json", "rng_state.py"}


@pytest.mark.parametrize("name", ["notes.txt", "run.sh", "LICENSE", "a.cfg", "deep/b.toml"])
def test_all_text_files_are_looked_through(folder, name):
    folder_of(folder, {name: f"in {Path.home()}/x".encode()})
    with pytest.raises(ValueError, match=f"{name}, line 1, names a place on this machine"):
        uploading.check_no_secrets(folder, uploading.uploadable(folder), None)
    folder_of(folder, {name: b"x " + TOKEN.encode()})
    with pytest.raises(ValueError, match=f"{name} holds a token of the Hub"):
        uploading.check_no_secrets(folder, uploading.uploadable(folder), None)
    folder_of(folder, {name: b"\0" + str(Path.home()).encode()})  # no text
    uploading.check_no_secrets(folder, uploading.uploadable(folder), None)


def test_a_token_in_a_vocabulary_is_one_too(folder):
    folder_of(folder, {"tokenizer.json": TOKEN.encode()})
    with pytest.raises(ValueError, match=r"tokenizer.json holds a token of the Hub") as caught:
        uploading.check_no_secrets(folder, ["tokenizer.json"], None)
    assert TOKEN not in str(caught.value)


def test_a_user_without_a_name_and_a_folder_that_is_gone(folder, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    def nobody():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    uploading.check_no_secrets(folder, uploading.uploadable(folder), None)


# ---- the card


def push(client, repo, code="push_to_hub(None, processor, repo, **options)", **options):
    return client(f"print({code}.oid)", repo=repo, options=options).strip()


def commit_file(hub, repo, name, content, branch="main"):
    files = dict(head(hub, repo, branch).files)
    files[name] = hub.put_blob(content, False)
    return hub.add_commit(hub.repos[repo], branch, files, "by hand", "user")[0].id


MODEL = "push_to_hub(model, processor, repo, **options)"


def test_a_card_edited_while_the_push_ran_stays(hub, client, repo):
    push(client, repo, MODEL)
    hub.calls.clear()
    hub.fail("POST", "/repos/create", seconds=1.5)  # after the card was read
    with (
        When(hub, "/repos/create", lambda: commit_file(hub, repo, "README.md", b"# My own words\n")),
        pytest.raises(Failed, match="somebody committed meanwhile"),
    ):
        push(client, repo, MODEL, tags=["new"])
    assert hub.content(repo)["README.md"] == b"# My own words\n" and commits(hub) == []


def test_an_edited_card_is_seen_although_an_older_one_is_in_the_cache(hub, client, repo):
    push(client, repo, MODEL)
    client("from huggingface_hub import hf_hub_download\nhf_hub_download(repo, 'README.md')", repo=repo)
    commit_file(hub, repo, "README.md", b"# My own words\n")
    hub.fail("HEAD", "/resolve/main/README.md", times=9, status=500)  # here the client falls back on its cache
    push(client, repo, MODEL, tags=["new"])
    assert hub.content(repo)["README.md"] == b"# My own words\n"


def test_a_new_branch_keeps_the_card_that_was_edited_on_main(hub, client, repo):
    push(client, repo, MODEL)
    commit_file(hub, repo, "README.md", b"# My own words\n")
    push(client, repo, MODEL, revision="dev", tags=["new"])
    assert hub.content(repo, "dev")["README.md"] == b"# My own words\n"


def test_a_kept_card_may_hold_any_path(hub, client, repo, tmp_path):
    push(client, repo, MODEL)
    card = f"# Trained from {tmp_path}/data\n".encode()
    commit_file(hub, repo, "README.md", card)
    push(client, repo, MODEL, commit_message="again", tags=["x"])
    assert hub.content(repo)["README.md"] == card  # it is there already; nobody asked us to judge it


def test_a_bare_name_means_ones_own_repository(hub, client, repo, tmp_path):
    name = repo.partition("/")[2]
    oid = push(client, name, MODEL)
    assert head(hub, repo).id == oid and f"{repo}".encode() in hub.content(repo)["README.md"]
    assert not any(path == f"/api/models/{name}" for _, path, _ in hub.asked()), (
        "a bare name is some other repository's"
    )


@pytest.mark.parametrize("bare", [True, False])
def test_who_is_not_known_is_told_before_anything_is_saved(hub, client, repo, bare):
    wrong = "hf_" + "x" * 34
    with pytest.raises(Failed, match=r"\(401\)") as caught:
        push(client, repo.partition("/")[2] if bare else repo, MODEL, token=wrong)
    assert "PermissionError" in caught.value.kinds and wrong not in caught.value.cause
    with pytest.raises(Failed, match="not logged in") as caught:
        push(client, repo.partition("/")[2] if bare else repo, MODEL, token=False)
    assert "PermissionError" in caught.value.kinds and not commits(hub)


# ---- what save_pretrained(..., push_to_hub=True) pushes


def test_given_weights_are_the_ones_that_are_pushed(hub, client, repo, tmp_path):
    code = """
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, push_to_hub=True, repo_id=repo)
    """
    client(code, repo=repo, folder=str(tmp_path / "made"))
    saved = (tmp_path / "made" / "model.safetensors").read_bytes()
    assert hub.content(repo)["model.safetensors"] == saved and not any(saved[-400:])


def test_a_projector_goes_the_same_way(hub, client, repo, tmp_path):
    code = """
    projector = model.vision_encoder.projector
    projector.save_pretrained(folder, push_to_hub=True, repo_id=repo + "-saved")
    projector.push_to_hub(repo, tags=["mine"])
    """
    client(code, repo=repo, folder=str(tmp_path / "made"))
    found, saved = hub.content(repo), hub.content(f"{repo}-saved")
    assert sorted(found) == sorted(saved) == [
        "README.md", "composition.json", "config.json", "load_with_cornstarch_hf.py", "model.safetensors"]  # fmt: skip
    assert b"- mine\n" in found["README.md"] and b"- mine\n" not in saved["README.md"]
    assert found["model.safetensors"] == saved["model.safetensors"]
    assert json.loads(found["composition.json"]) == json.loads(saved["composition.json"])
    assert not (tmp_path / "made" / "README.md").exists()
