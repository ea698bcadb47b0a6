"""What goes up and what never does; faults of the Hub while a commit is made.  Real client, Hub on the loopback."""

import logging

import pytest
from hub_client import Client, Failed
from hub_server import HubServer

from cornstarch_hf.hub.upload import check_no_secrets, uploadable

TOKEN = "hf_" + "w" * 34
READ = "hf_" + "r" * 34


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.users |= {TOKEN: ("user", True), READ: ("user", False), "hf_" + "o" * 34: ("other", True)}
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    made = Client(hub, tmp_path_factory.mktemp("home"), TOKEN)
    made(
        "from cornstarch_hf.hub.upload import upload\nfrom pathlib import Path\nimport time\nstale = lambda n: n.startswith('model')"
    )
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


@pytest.fixture
def repo(hub, request):
    """A repository with an older checkpoint, of the test's own."""
    name = f"user/{request.node.name.replace('[', '-').replace(']', '')[:80].strip('-')}"
    old = hub.blobs.parent / request.node.name
    old.mkdir()
    for file in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes.md",
    ):
        (old / file).write_text("old")
    hub.put_folder(name, old)
    hub.calls.clear()
    hub.faults.clear()
    return name


def push(client, folder, repo, **options):
    return client(
        "print(upload(folder, repo, stale=stale, **options).oid)", folder=str(folder), repo=repo, options=options
    ).strip()


def commits(hub):
    return [call for call in hub.asked("POST") if "/commit/" in call[1]]


def test_one_commit_with_what_is_stale_deleted(hub, client, folder, repo):
    oid = push(client, folder, repo)
    found = hub.content(repo)
    assert found == {"config.json": b"{}", "model.safetensors": b"weights", "notes.md": b"old"}
    assert len(commits(hub)) == 1 and hub.repos[repo].branches["main"] == oid


def test_leftovers_and_states_of_a_run_stay(tmp_path, folder):
    for name in (".tmpAbC123", ".saved-abcdefgh/model.safetensors", "x.tmp", "optimizer.pt", "training_args.bin", "runs/a/events.out.1",
                 "checkpoint-5/model.safetensors", "trainer_state.json", "rng_state_0.pth", ".git/config", "a.log"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text("{}")
    assert uploadable(folder) == ["config.json", "model.safetensors", "words/tokenizer.json"]
    (folder / "out.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"out.json is a link that leads out of the folder"):
        uploadable(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{\n"a": "HOME/models/x"}', r"config.json, line 2, names a place on this machine"),
        ("own.py", "PATH = 'CWD/data'", r"own.py, line 1, names a place"),
        ("README.md", f"use {TOKEN}", r"README.md holds a token of the Hub"),
        ("notes.json", '"secret-token-value"', r"notes.json holds a token"),
    ],
)
def test_places_and_tokens_are_not_given_away(tmp_path, monkeypatch, folder, name, text, message):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    (folder / name).write_text(text.replace("HOME", "/home/somebody").replace("CWD", str(tmp_path)))
    with pytest.raises(ValueError, match=message) as caught:
        check_no_secrets(folder, [name], "secret-token-value")
    assert TOKEN not in str(caught.value) and "secret-token-value" not in str(caught.value)


def test_vocabularies_and_ordinary_paths_are_let_through(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", "/home/somebody")
    (folder / "tokenizer.json").write_text('{"/home/somebody": 1}')
    (folder / "README.md").write_text(
        "see https://huggingface.co/home/somebody-else and /home/somebodyelse, hf_transfer"
    )
    check_no_secrets(folder, ["tokenizer.json", "README.md", "config.json"], None)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_answer_that_says_try_again(hub, client, folder, repo, status):
    hub.fail("POST", "/commit/", times=2, status=status, headers={"Retry-After": "0"})
    oid = push(client, folder, repo)
    assert [call[2] for call in commits(hub)] == [status, status, 200]
    assert hub.repos[repo].branches["main"] == oid and "model.safetensors" in hub.content(repo)


def test_a_hub_that_stays_broken(hub, client, folder, repo):
    before = hub.content(repo)
    hub.fail("POST", "/commit/", times=99, status=500, headers={"Retry-After": "0"})
    with pytest.raises(Failed, match=r"did not take the commit in 4 tries; nothing was changed") as caught:
        push(client, folder, repo)
    assert "OSError" in caught.value.kinds and TOKEN not in caught.value.cause
    assert hub.content(repo) == before and len(commits(hub)) == 4


def test_a_connection_that_drops_before_the_commit(hub, client, folder, repo):
    hub.fail("POST", "/commit/", drop=True)
    oid = push(client, folder, repo)
    assert hub.repos[repo].branches["main"] == oid and len(hub.repos[repo].commits) == 3


@pytest.mark.parametrize("create_pr", [False, True])
def test_an_answer_that_is_lost_after_the_commit_was_made(hub, client, folder, repo, create_pr):
    hub.fail("POST", "/commit/", lost=True)
    oid = push(client, folder, repo, create_pr=create_pr)
    found = hub.repos[repo]
    assert len(commits(hub)) == 1, "it was not made twice"
    assert (found.pulls[1] if create_pr else found.branches["main"]) == oid
    assert "no answer to the commit" in client.log


def test_a_lost_answer_and_somebody_elses_commit(hub, client, folder, repo):
    hub.fail("POST", "/commit/", lost=True)
    client("""
    import threading
    from huggingface_hub import HfApi
    def meddle(done=threading.Event()):
        time.sleep(0.25)
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="config.json", repo_id=repo)
    threading.Thread(target=meddle, daemon=True).start()
    """, repo=repo)  # fmt: skip
    with pytest.raises(Failed, match="somebody committed meanwhile"):
        push(client, folder, repo)
    assert hub.content(repo)["config.json"] == b"mine"


def test_the_parent_commit_is_checked(hub, client, folder, repo):
    head = hub.repos[repo].branches["main"]
    oid = push(client, folder, repo, parent_commit=head)
    with pytest.raises(Failed, match=f"expected the newest commit {head[:8]}, it is {oid[:8]}"):
        push(client, folder, repo, parent_commit=head)
    assert hub.repos[repo].branches["main"] == oid


def test_a_push_between_reading_and_committing(hub, client, folder, repo):
    hub.fail("POST", "/commit/", status=412)
    with pytest.raises(Failed, match=r"somebody committed meanwhile \(412\)") as caught:
        push(client, folder, repo)
    assert "ValueError" in caught.value.kinds and "notes.md" in hub.content(repo)


def test_who_may_not(hub, client, folder, repo):
    cases = {"hf_wrong" + "x" * 30: "401", READ: "403", "hf_" + "o" * 34: "403"}
    for token, status in cases.items():
        with pytest.raises(Failed, match=rf"\({status}\)") as caught:
            push(client, folder, repo, token=token)
        assert "PermissionError" in caught.value.kinds and token not in caught.value.message
    hub.repos[repo].private = True
    with pytest.raises(Failed, match=r"\(40[34]\)"):
        push(client, folder, repo, token="hf_" + "o" * 34)
    with pytest.raises(Failed, match=r"has no revision 'refs/pr/7' \(404\)"):
        push(client, folder, repo, revision="refs/pr/7")
    with pytest.raises(Failed, match="Repo id must"):
        push(client, folder, "a/b/c")


def test_branches_pull_requests_and_private_repositories(hub, client, folder, repo):
    push(client, folder, repo, revision="dev")
    assert "notes.md" in hub.content(repo) and "model.safetensors" in hub.content(repo, "dev")
    assert "model.safetensors" not in hub.content(repo)
    push(client, folder, repo, create_pr=True)
    assert "model.safetensors" in hub.content(repo, "refs/pr/1") and "model.safetensors" not in hub.content(repo)
    push(client, folder, repo, revision="refs/pr/1")
    assert len(hub.repos[repo].pulls) == 1
    other = "hf_" + "o" * 34
    push(client, folder, repo, create_pr=True, token=other)  # anybody may propose
    push(client, folder, f"{repo}-private", private=True)
    assert hub.repos[f"{repo}-private"].private


def test_large_files_go_by_lfs_and_once(hub, client, folder, repo):
    (folder / "words.txt").write_bytes(b"y" * 10_000_001)
    push(client, folder, repo)
    assert hub.repos[repo].commits[hub.repos[repo].branches["main"]].files["words.txt"].lfs
    assert len([c for c in hub.asked("PUT") if c[1].startswith("/upload/")]) >= 1
    hub.calls.clear()
    push(client, folder, repo)
    assert not hub.asked("PUT"), "what is there already is not sent again"


def test_names_in_logs(caplog, folder):
    with caplog.at_level(logging.DEBUG):
        uploadable(folder)
    assert TOKEN not in caplog.text
