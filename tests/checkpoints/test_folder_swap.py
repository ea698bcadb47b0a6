"""Replacing a checkpoint: order, leftovers, full disks, and processes killed at every step."""

import errno
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from helpers import HERE

from cornstarch_hf.checkpoints import folder_swap as snapshots
from cornstarch_hf.checkpoints.folder_swap import pointer_of, replaced_atomically, valid_folder
from cornstarch_hf.parts.stored_values import POINTER


def owned(name):
    return name.startswith("model")


def save(folder, value, shards=1):
    with replaced_atomically(folder, "config.json", owned) as staging:
        staging = Path(staging)
        names = ["model.bin"] if shards == 1 else [f"model-{i}.bin" for i in range(shards)]
        for name in names:
            (staging / name).write_text(str(value))
        if shards > 1:
            (staging / "model.index.json").write_text(str(value))
        (staging / "extra").mkdir()
        (staging / "extra" / "words.txt").write_text(str(value))
        (staging / "config.json").write_text(json.dumps({"value": value}))


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_checkpoint_replaces_another_and_nothing_else(tmp_path):
    folder = tmp_path / "a" / "b"
    save(folder, 1)
    (folder / "mine.txt").write_text("mine")
    (folder / "extra" / "mine.txt").write_text("mine")
    first = content(folder)
    assert first["model.bin"] == "1" and first["extra/words.txt"] == "1" and POINTER not in first["config.json"]
    save(folder, 2, shards=3)
    second = content(folder)
    assert set(second) == {*(f"model-{i}.bin" for i in range(3)), "model.index.json", "config.json",
                           "extra/words.txt", "extra/mine.txt", "mine.txt"}  # fmt: skip
    assert {second[f"model-{i}.bin"] for i in range(3)} == {"2"} and second["mine.txt"] == "mine"
    save(folder, 3)
    assert content(folder) == {**first, "model.bin": "3", "extra/words.txt": "3", "config.json": '{"value": 3}',
                               "mine.txt": "mine", "extra/mine.txt": "mine"}  # fmt: skip
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        save(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path):
    save(tmp_path / "a", 1)
    before = content(tmp_path)
    with (
        pytest.raises(RuntimeError, match="half way"),
        replaced_atomically(tmp_path / "a", "config.json", owned) as staging,
    ):
        (Path(staging) / "model.bin").write_text("2")
        raise RuntimeError("half way")
    with (
        pytest.raises(FileNotFoundError, match=r"config\.json"),
        replaced_atomically(tmp_path / "a", "config.json", owned),
    ):
        pass  # nothing was written: no head
    assert content(tmp_path) == before
    with pytest.raises(RuntimeError, match="half way"), replaced_atomically(tmp_path / "new", "config.json", owned):
        raise RuntimeError("half way")
    assert content(tmp_path) == before and not (tmp_path / "new").exists()


def test_where_no_links_can_be_made_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    save(tmp_path / "a", 1)
    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "a", 2, shards=2)
    assert content(tmp_path / "a")["model-1.bin"] == "2" and os.listdir(tmp_path) == ["a"]


def test_a_disk_that_fills_up_after_the_new_one_became_valid(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path / "a", 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(OSError, match="No space left") as caught:
            save(tmp_path / "a", 2)
    assert any("whole and valid in" in note for note in caught.value.__notes__)
    with caplog.at_level(logging.WARNING):
        valid = Path(valid_folder(tmp_path / "a", "config.json"))
    assert content(valid)["model.bin"] == "2" and "interrupted after it was complete" in caplog.text
    save(tmp_path / "a", 3)
    assert content(tmp_path / "a") == {"config.json": '{"value": 3}', "extra/words.txt": "3", "model.bin": "3"}


@pytest.mark.parametrize("failing", ["fsync", "rmtree"])
def test_a_last_step_that_fails_says_that_the_new_one_is_in_place(tmp_path, monkeypatch, failing):
    save(tmp_path / "a", 1)
    owner = {"fsync": os, "rmtree": snapshots.shutil}[failing]
    done, real = [], getattr(owner, failing)

    def fail(*arguments, **options):
        # After the head has come to its place: nothing is left but to sync it, and to remove where it came from.
        head = tmp_path / "a" / "config.json"
        if head.read_text() == '{"value": 2}':
            done.append(failing)
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, failing, fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            save(tmp_path / "a", 2)
    assert done and any("whole, valid and in its place" in note for note in caught.value.__notes__)
    assert valid_folder(tmp_path / "a", "config.json") == str(tmp_path / "a")
    assert (tmp_path / "a" / "model.bin").read_text() == "2"
    save(tmp_path / "a", 3)
    assert content(tmp_path / "a") == {"config.json": '{"value": 3}', "extra/words.txt": "3", "model.bin": "3"}


@pytest.mark.parametrize("name", ["n" * 230, "n" * 231, "n" * 239, "n" * 255, "ä" * 127], ids=len)
def test_folders_of_any_name_that_the_file_system_takes(tmp_path, name):
    save(tmp_path / name, 1)
    save(tmp_path / name, 2, shards=2)
    assert content(tmp_path / name)["model-1.bin"] == "2" and os.listdir(tmp_path) == [name]


def test_the_weights_writer_s_error_of_a_full_disk(tmp_path):
    """The library that writes safetensors has an error of its own, in whose words the system's number stands."""
    script = """
        import resource, signal, sys, torch
        from helpers import compose_tiny
        model = compose_tiny(["clip"])[0]
        model.save_pretrained(sys.argv[1])
        before = open(sys.argv[1] + "/model.safetensors", "rb").read()
        torch.nn.init.normal_(model.language_model.lm_head.weight)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            model.save_pretrained(sys.argv[1])
        except OSError as error:
            assert type(error) is OSError and error.filename == sys.argv[1], error
            print(error.errno, open(sys.argv[1] + "/model.safetensors", "rb").read() == before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a")]
    done = subprocess.run(command, cwd=HERE, env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.stdout.split() == [str(errno.EFBIG), "True"], done.stderr[-2000:]


def test_beside_the_folder_or_inside_where_that_is_another_file_system(tmp_path, monkeypatch):
    save(tmp_path / "a", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the parent cannot be written
    with replaced_atomically(tmp_path / "a", "config.json", owned) as staging:
        assert Path(staging).parent == tmp_path / "a"
        (Path(staging) / "model.bin").write_text("2")
        (Path(staging) / "config.json").write_text("{}")
    assert content(tmp_path / "a") == {"config.json": "{}", "extra/words.txt": "1", "model.bin": "2"}
    with pytest.raises(RuntimeError), replaced_atomically(tmp_path / "a", "config.json", owned):
        raise RuntimeError
    assert content(tmp_path / "a") == {"config.json": "{}", "extra/words.txt": "1", "model.bin": "2"}


def test_leftovers_are_reported_and_go_with_the_next_save_unless_one_is_running(tmp_path, caplog):
    save(tmp_path / "a", 1)
    for left in (tmp_path / ".a.saving-abcdefgh", tmp_path / "a" / ".saved-abcdefgh", tmp_path / ".b.saving-abcdefgh"):
        left.mkdir()
        (left / "model.bin").write_text("half")
    with caplog.at_level(logging.WARNING):
        assert valid_folder(tmp_path / "a", "config.json") == str(tmp_path / "a")
    assert caplog.text.count("was left over by an interrupted save") == 2
    with replaced_atomically(tmp_path / "a", "config.json", owned) as running:
        assert not (tmp_path / ".a.saving-abcdefgh").exists() and not (tmp_path / "a" / ".saved-abcdefgh").exists()
        save(tmp_path / "a", 2)  # another save meanwhile
        assert os.path.isdir(running)
        (Path(running) / "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == [".b.saving-abcdefgh", "a"]


@pytest.mark.parametrize("pointer", ["../other", "/etc", ".saved-../../x", 7, ".saved-UPPER123"])
def test_a_pointer_that_no_save_wrote_is_refused(tmp_path, pointer):
    (tmp_path / "config.json").write_text(json.dumps({POINTER: pointer}))
    with pytest.raises(ValueError, match="expected the name of a folder of an interrupted save"):
        valid_folder(tmp_path, "config.json")


def test_a_pointer_to_nothing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({POINTER: ".saved-abcdefgh"}))
    with pytest.raises(ValueError, match=r"\.saved-abcdefgh, which is not there.*Copy the whole folder"):
        valid_folder(tmp_path, "config.json")
    assert pointer_of(tmp_path / "none.json") is None
    (tmp_path / "list.json").write_text("[1]")
    assert pointer_of(tmp_path / "list.json") is None


def test_everything_is_synced_before_it_becomes_valid(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: steps.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(("replace", os.path.basename(b))), replace(a, b)))
    save(tmp_path / "a", 1, shards=2)
    valid = steps.index(("replace", "config.json"))
    synced = {name for what, name in steps[:valid] if what == "sync"}
    assert {"model-0.bin", "model-1.bin", "model.index.json", "words.txt", "config.json", "a"} <= synced
    placed = [name for what, name in steps[valid + 1 :] if what == "replace"]
    assert placed[-2:] == ["model.index.json", "config.json"]  # shards first, then their index, then the head


def test_a_first_save_has_the_names_of_new_folders_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    point = snapshots._point
    monkeypatch.setattr(snapshots, "_point", lambda *places: (synced.append("valid"), point(*places)))
    save(tmp_path / "new" / "a", 1)
    before = synced[: synced.index("valid")]
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "a")} <= set(before)
    synced.clear()
    save(tmp_path / "new" / "a", 2)  # it was there: nothing above it changes
    assert str(tmp_path) not in synced


@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_what_a_save_disturbed_is_read_once_more_while_saves_wait(tmp_path, ends):
    save(tmp_path, 1)
    reads, writer = [], threading.Thread(target=save, args=(tmp_path, 3))

    def read():
        found = [(tmp_path / "model.bin").read_text()]
        if not reads:
            save(tmp_path, 2)
        else:
            writer.start()
            writer.join(timeout=0.5)
            assert writer.is_alive()  # it comes after this reader
        reads.append((tmp_path / "config.json").read_text())
        if ends == "raises" and len(reads) == 1:
            raise RuntimeError("half a checkpoint")
        return [*found, reads[-1]]

    assert snapshots.read_between_saves(str(tmp_path), "config.json", read) == ["2", '{"value": 2}']
    writer.join()
    assert len(reads) == 2 and (tmp_path / "model.bin").read_text() == "3"


def test_an_error_that_no_save_caused_is_raised_at_once(tmp_path):
    save(tmp_path, 1)
    reads = []

    def read():
        reads.append(1)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        snapshots.read_between_saves(str(tmp_path), "config.json", read)
    assert reads == [1]


def test_where_nothing_can_be_locked_a_second_save_is_reported(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(snapshots, "fcntl", None)
    with pytest.raises(ValueError, match=r"was saved again while it was read.*load again"):
        snapshots.read_between_saves(str(tmp_path), "config.json", lambda: save(tmp_path, 2))


def run_killed(folder, size, points):
    done = subprocess.run([sys.executable, HERE / "killed_saves.py", folder, size, str(points)], cwd=HERE, capture_output=True,
                          text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_random_points_of_a_sharded_save_over_an_older_one(tmp_path):
    printed = run_killed(tmp_path, "60KB", 20)
    steps, times = (eval(re.search(rf"{what} (\{{.*?\}})", printed)[1]) for what in ("steps", "times"))
    assert set(steps) == {"old", "new"} and sum(steps.values()) >= 20, printed
    assert set(times) <= {"old", "new"} and sum(times.values()) >= 20, printed


@pytest.mark.slow
@pytest.mark.parametrize("size", ["60KB", "5GB"])
def test_killed_at_every_step(tmp_path, size):
    printed = run_killed(tmp_path, size, 500)
    found = eval(re.search(r"steps (\{.*?\}) (\d+) of \2", printed)[1])
    assert set(found) == {"old", "new"}, printed


def test_a_disk_that_is_full(tmp_path):
    """The limit on the size of a file stands for the disk: the system refuses to write more of it."""
    save(tmp_path / "a", 1)
    before = content(tmp_path)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save(tmp_path / "a", "2" * 2000)
        except OSError as error:
            os._exit(10 if error.errno == errno.EFBIG else 11)
        os._exit(12)
    _, status = os.waitpid(pid, 0)
    assert os.WEXITSTATUS(status) == 10
    assert content(tmp_path) == before
    assert snapshots.report_leftovers(str(tmp_path / "a"), remove=False) == []


def test_an_interrupted_save_is_finished_before_a_part_of_it_is_replaced(tmp_path, monkeypatch):
    save(tmp_path, 1, shards=3)
    place = snapshots._place

    def fail_at_the_second(inside, target, name):
        if name == "model-1.bin":
            raise OSError(errno.ENOSPC, "No space left on device")
        place(inside, target, name)

    monkeypatch.setattr(snapshots, "_place", fail_at_the_second)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, shards=3)
    monkeypatch.undo()
    inside = next(tmp_path.glob(".saved-*"))
    os.link(inside / "model-1.bin", inside / "model-1.bin.placing")  # as a kill between two steps leaves it
    os.link(inside / "config.json", inside / "config.json.pointing")
    assert (tmp_path / "model-0.bin").read_text() == "2" and (tmp_path / "model-1.bin").read_text() == "1"
    with replaced_atomically(
        tmp_path, "config.json", lambda name: False
    ) as staging:  # writes a part alone, as a variant does
        Path(staging, "config.json").write_text("{}")
    assert [(tmp_path / f"model-{i}.bin").read_text() for i in range(3)] == ["2", "2", "2"]
    assert not [p.name for p in tmp_path.rglob("*") if p.name.startswith(".saved-") or p.name.endswith("ing")]


def test_of_two_saves_one_waits_for_the_other(tmp_path, monkeypatch):
    order, place, inner = [], snapshots._place, []

    def second_save_meanwhile(inside, target, name):
        order.append(inside)
        if not inner:
            inner.append(threading.Thread(target=save, args=(tmp_path, 2, 3)))
            inner[0].start()
            inner[0].join(timeout=0.3)
        place(inside, target, name)

    monkeypatch.setattr(snapshots, "_place", second_save_meanwhile)
    save(tmp_path, 1, shards=3)
    inner[0].join()
    assert order == sorted(order, key=order.index) and len(set(order)) == 2 and order.count(order[0]) * 2 == len(order)
    assert {(tmp_path / f"model-{i}.bin").read_text() for i in range(3)} == {"2"}
