"""Pushed to a Hub on the loopback, loaded by repository id in fresh processes with empty caches: equal to the bit, or a clear error."""

import json
import re
import shutil

import pytest
import tiny
import torch
from helpers import site_without
from hub_client import Client, Failed
from hub_server import HubServer
from tiny import whisper_model

TOKEN, OTHER = "hf_" + "w" * 34, "hf_" + "o" * 34
COMPOSE = """
import json, os, shutil, time, torch, tiny
from own_memory import own_memory
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
from cornstarch_hf import compose, push_to_hub, MultimodalModel, MultimodalProjector

def make(two=False, **options):
    encoders = {"vision": "base/clip"} | ({"audio": "base/whisper"} if two else {})
    model, processor = compose("base/llama", encoders, projector="mlp", **options)
    torch.manual_seed(3)
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight.normal_()
    return model, processor

def inputs_of(processor):
    media = {"images": tiny.image()} | ({"audio": tiny.sound(), "sampling_rate": 16_000} if "audio" in processor.tokens else {})
    text = "<image> the quick" + (" <audio> fox" if "audio" in processor.tokens else "")
    return processor(text=text, return_tensors="pt", **media)

def answers(model, processor):
    model, inputs = own_memory(model), own_memory(dict(inputs_of(processor)))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return {"ids": inputs["input_ids"], "logits": logits, "tokens": tokens}
"""
LOAD = """
import sys, torch
if package:
    import cornstarch_hf
from own_memory import own_memory
from transformers import AutoModelForMultimodalLM, AutoProcessor
import tiny

def same(name, expected, **options):
    model, info = AutoModelForMultimodalLM.from_pretrained(name, output_loading_info=True, **trust, **options)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(name, **trust)
    media = {"images": tiny.image()} | ({"audio": tiny.sound(), "sampling_rate": 16_000} if "audio" in processor.tokens else {})
    text = "<image> the quick" + (" <audio> fox" if "audio" in processor.tokens else "")
    model, inputs = own_memory(model), own_memory(dict(processor(text=text, return_tensors="pt", **media)))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = torch.load(expected)
    assert torch.equal(expected["ids"], inputs["input_ids"]) and torch.equal(expected["logits"], logits)
    assert torch.equal(expected["tokens"], tokens)
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the parts' own repositories."""
    root = tmp_path_factory.mktemp("bases")
    parts = {"llama": (tiny.llama(), tiny.tokenizer()), "clip": (tiny.clip(), tiny.clip_processor()),
             "whisper": (whisper_model(), tiny.whisper_processor())}  # fmt: skip
    for name, pair in parts.items():
        for part in pair:
            part.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory, bases):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.users |= {TOKEN: ("user", True), OTHER: ("other", True)}
        for name in ("llama", "clip", "whisper"):
            server.put_folder(f"base/{name}", bases / name)
        yield server


@pytest.fixture(autouse=True)
def no_faults(hub, bases):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    made = Client(hub, tmp_path_factory.mktemp("home"), TOKEN)
    made(COMPOSE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pushed(client, tmp_path_factory):
    """All kinds of checkpoints in repositories of their names, and what each answers."""
    folder = tmp_path_factory.mktemp("answers")
    client(
        """
        for two in (False, True):
            model, processor = make(two)
            parts = "two" if two else "one"
            torch.save(answers(model, processor), f"{folder}/{parts}.pt")
            for size, bound in (("single", "5GB"), ("shards", "60KB")):
                for kind, embed in (("full", True), ("reference", False)):
                    for code in (False, True):
                        name = f"user/{'code-' if code else ''}{parts}-{size}-{kind}"
                        push_to_hub(model, processor, name, max_shard_size=bound, embed=embed, include_code=code)
        """,
        folder=str(folder),
    )
    return folder


def fresh(hub, tmp_path, package=True, **environment):
    site = None if package else site_without(tmp_path / "site", ["cornstarch_hf"])
    made = Client(hub, tmp_path / "home", site=site, HF_MODULES_CACHE=tmp_path / "modules", **environment)
    made("", package=package, trust={} if package else {"trust_remote_code": True})
    made(LOAD)
    return made


def test_every_kind_loads_equal_in_a_fresh_process(hub, client, pushed, tmp_path):
    hub.calls.clear()
    loader = fresh(hub, tmp_path)
    for parts in ("one", "two"):
        for size in ("single", "shards"):
            for kind in ("full", "reference"):
                hub.calls.clear()
                loader("same(name, expected, verify=verify)", name=f"user/{parts}-{size}-{kind}", expected=f"{pushed}/{parts}.pt",
                       verify=size == "single")  # fmt: skip
                check_requests(hub, f"user/{parts}-{size}-{kind}", kind, size)
    loader.close()


@pytest.mark.slow
def test_every_kind_loads_equal_without_the_package(hub, client, pushed, tmp_path):
    loader = fresh(hub, tmp_path, package=False)
    loader("""
        import importlib.util
        assert importlib.util.find_spec("cornstarch_hf") is None
    """)
    for parts in ("one", "two"):
        for size in ("single", "shards"):
            for kind in ("full", "reference"):
                hub.calls.clear()
                name = f"user/code-{parts}-{size}-{kind}"
                loader("same(name, expected, verify=True)", name=name, expected=f"{pushed}/{parts}.pt")
                check_requests(hub, name, kind, size)
                assert any(path.endswith("/multimodal_code.py") for _, path, _ in hub.asked())
    with pytest.raises(Failed, match="trust_remote_code"):
        loader("AutoModelForMultimodalLM.from_pretrained('user/code-one-single-full', trust_remote_code=False)")
    with pytest.raises(Failed, match=r"package cornstarch_hf, which is not installed. pip install ./cornstarch_hf"):
        loader("AutoModelForMultimodalLM.from_pretrained('user/one-single-full', trust_remote_code=True)")
    card = hub.content("user/code-two-single-full")["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert "import cornstarch_hf" not in snippet
    loader(snippet)
    loader.close()


def check_requests(hub, name, kind, size):
    """What was asked of the Hub: nothing is written, all comes from one commit, weights once each."""
    asked = hub.asked()
    assert {method for method, _, _ in asked} <= {"GET", "HEAD"}
    commit = hub.repos[name].branches["main"]
    resolved = [path for _, path, _ in asked if path.startswith(f"/{name}/resolve/")]
    resolved = [path for path in resolved if "/custom_generate/" not in path]  # transformers looks for it by the branch
    assert resolved
    assert not [path for path in resolved if not path.startswith(f"/{name}/resolve/{commit}/")]
    files = {path.rpartition("/")[2] for method, path, status in asked if method == "HEAD" and status in (200, 302)}
    weights = {file for file in files if file.endswith(".safetensors")}
    if kind == "reference":
        assert "composition.safetensors" in weights
        assert not [file for file in hub.content(name) if file.startswith("model") and "safetensors" in file]
    else:
        assert (
            len(weights) == (1 if size == "single" else 4 if "one" in name else len(weights))
            and "composition.safetensors" not in weights
        )
    contents = [path for method, path, _ in asked if path.startswith("/content/")]
    assert len(contents) == len(set(contents))


def test_a_reference_holds_what_changed_alone(hub, client, pushed):
    for name in ("user/one-single-reference", "user/two-shards-reference"):
        files = hub.content(name)
        held = json.loads(files["composition.json"])
        total = sum(
            len(files[file])
            for file in ("composition.safetensors", "config.json", "composition.json", "generation_config.json")
        )
        header = int.from_bytes(files["composition.safetensors"][:8], "little")
        tensors = json.loads(files["composition.safetensors"][8 : 8 + header])
        names = [key for key in tensors if key != "__metadata__"]
        assert all(".projector." in key or key.endswith("layers.1.mlp.up_proj.weight") for key in names)
        assert total <= len(files["composition.safetensors"]) - header + 64_000
        for component, entry in held["components"].items():
            repo = entry["repo_id"]
            assert entry["revision"] == hub.repos[repo].branches["main"], component


def test_nothing_pushed_tells_of_this_machine(hub, client, pushed, tmp_path_factory):
    words = [str(tmp_path_factory.getbasetemp()), "/root", "/home/", "/tmp", TOKEN, "the quick brown"]
    for name in hub.repos:
        if name.startswith("user/"):
            for file, data in hub.content(name).items():
                if file != "tokenizer.json":
                    found = [w for w in words if w.encode() in data and not (w == "/home/" and file == "uploading.py")]
                    assert not found, (name, file, found)


@pytest.mark.slow
def test_offline_with_a_warm_cache_and_with_a_cold_one(hub, client, pushed, tmp_path):
    names = ["user/one-shards-full", "user/two-single-reference"]
    warm = fresh(hub, tmp_path)
    for name in names:
        warm("AutoModelForMultimodalLM.from_pretrained(name); AutoProcessor.from_pretrained(name)", name=name)
    warm.close()
    hub.calls.clear()
    offline = fresh(hub, tmp_path, HF_HUB_OFFLINE="1")
    for name in names:
        offline("same(name, expected, verify=True)", name=name, expected=f"{pushed}/{name[5:8]}.pt")
    shutil.rmtree(tmp_path / "home" / "hub" / "models--base--whisper")
    missing = (
        r"audio_encoder: the base 'base/whisper' at \w{8}, which composition.json names, is not in the local cache"
    )
    with pytest.raises(Failed, match=missing) as caught:
        offline("AutoModelForMultimodalLM.from_pretrained(name)", name=names[1])
    assert "bases={'audio_encoder': folder}" in caught.value.message
    with pytest.raises(Failed, match="couldn't find them in the cached files"):
        offline("AutoModelForMultimodalLM.from_pretrained('user/one-single-full')")
    assert not hub.calls
    offline.close()


def test_revisions_branches_tags_and_pull_requests(hub, client):
    client("""
        from huggingface_hub import HfApi
        model, processor = make()
        first = push_to_hub(model, processor, "user/revisions").oid
        HfApi().create_tag("user/revisions", tag="v1")
        def nudged(by):
            with torch.no_grad():
                model.vision_encoder.projector.projection[0].bias.fill_(by)
        def loaded(revision=None):
            return float(AutoModel.from_pretrained("user/revisions", revision=revision).vision_encoder.projector.projection[0].bias[0])
        nudged(2); model.push_to_hub("user/revisions", revision="dev")
        nudged(3); pull = model.push_to_hub("user/revisions", create_pr=True)
        nudged(4); last = model.push_to_hub("user/revisions").oid
        assert pull.pr_revision == "refs/pr/1" and pull.pr_url.endswith("/discussions/1")
        assert loaded("dev") == 2 and loaded("refs/pr/1") == 3 and loaded() == loaded(last) == loaded("main") == 4
        assert loaded("v1") == loaded(first) and loaded("v1") not in (2, 3, 4)
    """)  # fmt: skip
    with pytest.raises(Failed, match="no-such-branch"):
        client("AutoModel.from_pretrained('user/revisions', revision='no-such-branch')")


def test_private_gated_and_missing_repositories(hub, client):
    client("model, processor = make(); push_to_hub(model, processor, 'user/private', private=True)")
    client("assert isinstance(AutoModel.from_pretrained('user/private'), MultimodalModel)")
    for name in ("user/private", "user/none"):
        with pytest.raises(Failed, match="private"):
            client("AutoModel.from_pretrained(name, token=other, force_download=True)", name=name, other=OTHER)
    hub.repos["user/private"].private, hub.repos["user/private"].gated = False, True
    with pytest.raises(Failed, match="gated"):
        client(
            "AutoModel.from_pretrained('user/private', token=other, cache_dir=cache)",
            other=OTHER,
            cache=str(hub.root / "c"),
        )
    with pytest.raises(Failed, match=r"user/none.*|other/x: your token may not do this \(403\)"):
        client("push_to_hub(model, processor, 'other/x')")


def test_what_a_push_takes(client):
    for code, message in {
        "push_to_hub(model, processor)": "needs a repo_id",
        "push_to_hub(None, None, 'user/x')": "needs a model, a processor, or both",
        "push_to_hub('user/x', processor, 'user/x')": "model must be a composed model or a projector, got str",
        "push_to_hub(model, model, 'user/x')": "processor must be a MultimodalProcessor, got MultimodalModel",
        "model.push_to_hub('user/x', colour='red')": r"unknown arguments \['colour'\]",
    }.items():
        with pytest.raises(Failed, match=message) as caught:
            client("model, processor = make()\n" + code)
        assert "TypeError" in caught.value.kinds


def test_stale_weights_go_with_every_form(hub, client):
    client("""
        model, processor = make()
        for options in ({}, {"max_shard_size": "60KB"}, {"embed": False}, {"max_shard_size": "60KB"}, {}):
            push_to_hub(model, processor, "user/forms", **options)
            state = AutoModel.from_pretrained("user/forms").state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()), options
    """)  # fmt: skip
    weights = [name for name in hub.content("user/forms") if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_weights_of_somebody_else_beside_a_sharded_checkpoint_are_not_read(hub, client):
    """As after an upload by other means that deletes nothing."""
    client("""
        from huggingface_hub import HfApi
        model, processor = make()
        model.push_to_hub("user/beside", max_shard_size="60KB")
        other, _ = make(); other.vision_encoder.projector.projection[0].bias.data.fill_(7)
        other.save_pretrained("other")
        HfApi().upload_file(path_or_fileobj="other/model.safetensors", path_in_repo="model.safetensors", repo_id="user/beside")
        state = AutoModel.from_pretrained("user/beside").state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        shutil.rmtree("other")
    """)  # fmt: skip


def test_projectors_processors_and_adapters_by_themselves(hub, client):
    client("""
        from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
        model, processor = make()
        projector = model.vision_encoder.projector
        projector.push_to_hub("user/projector")
        push_to_hub(projector, repo_id="user/projector-too")
        for name in ("user/projector", "user/projector-too"):
            again = AutoModel.from_pretrained(name, verify=True)
            assert type(again) is MultimodalProjector
            assert all(torch.equal(t, again.state_dict()[k]) for k, t in projector.state_dict().items())
        processor.push_to_hub("user/processor")
        a, b = inputs_of(processor), inputs_of(AutoProcessor.from_pretrained("user/processor"))
        assert all(torch.equal(a[key], b[key]) for key in a)
        push_to_hub(model, processor, "user/base")
        base = AutoModelForCausalLM.from_pretrained("user/base")
        wrapped = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False,
                                                  modules_to_save=["projector"]))
        wrapped.push_to_hub("user/adapter")
        expected = answers(wrapped, processor)["logits"]
        loads = {"peft": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), "user/adapter"),
                 "auto": lambda: AutoPeftModelForCausalLM.from_pretrained("user/adapter")}
        for name, load in loads.items():
            assert torch.equal(answers(load(), processor)["logits"], expected), name
    """)  # fmt: skip
    config = json.loads(hub.content("user/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/base"
    assert "model.safetensors" in hub.content("user/base")


def test_the_ways_of_transformers(hub, client, tmp_path):
    """`save_pretrained(push_to_hub=True)` and the Trainer."""
    client(
        """
        os.chdir(folder)
        model, processor = make()
        model.save_pretrained("by-save", push_to_hub=True, commit_message="mine", private=True)
        processor.save_pretrained("by-save", push_to_hub=True, repo_id="user/by-save")
        state = AutoModel.from_pretrained("user/by-save", verify=True).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert AutoProcessor.from_pretrained("user/by-save").tokens == processor.tokens
        from transformers import Trainer, TrainingArguments
        from cornstarch_hf import MultimodalCollator
        rows = [{"images": [tiny.image(i)], "text": "<image> the quick"} for i in range(4)]
        args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="steps",
                                 save_steps=1, hub_model_id="user/by-trainer", remove_unused_columns=False)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=MultimodalCollator(processor), processing_class=processor)
        trainer.train()
        trainer.push_to_hub()
        state = AutoModel.from_pretrained("user/by-trainer", verify=True).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        push_to_hub(model, processor, "user/with-facts", trainer=trainer)
        """,
        folder=str(tmp_path),
    )
    assert hub.repos["user/by-save"].private
    assert not [name for name in hub.content("user/by-trainer") if name.startswith((".", "checkpoint-"))]
    card = hub.content("user/with-facts")["README.md"].decode()
    assert "learning rate" in card.lower() and str(tmp_path) not in card


def test_an_edited_card_stays(hub, client, caplog):
    client("""
        from huggingface_hub import HfApi
        model, processor = make()
        push_to_hub(model, processor, "user/card")
    """)
    first = hub.content("user/card")["README.md"]
    assert b"base/llama" in first and hub.repos["base/llama"].branches["main"][:7].encode() in first
    client("push_to_hub(model, processor, 'user/card', tags=['red'])")
    second = hub.content("user/card")["README.md"]
    assert second != first and b"- red" in second
    processor_only = client("processor.push_to_hub('user/card')")
    assert hub.content("user/card")["README.md"] == second and processor_only == ""
    mine = second.replace(b"## Usage", b"## How I use it") + b"\r\nmine\r\n"
    client(
        "HfApi().upload_file(path_or_fileobj=bytes.fromhex(mine), path_in_repo='README.md', repo_id='user/card')",
        mine=mine.hex(),
    )
    client("push_to_hub(model, processor, 'user/card')")
    assert hub.content("user/card")["README.md"] == mine and "edited by hand and stays" in client.log
    client("push_to_hub(model, processor, 'user/card', overwrite_card=True)")
    assert hub.content("user/card")["README.md"] == first
    client(
        "push_to_hub(model, processor, 'user/card', card=False); push_to_hub(model, processor, 'user/card', card='# words')"
    )
    assert hub.content("user/card")["README.md"] == b"# words"


@pytest.mark.slow
def test_the_card_runs_as_it_is_copied(hub, client, pushed, tmp_path):
    for name in ("user/one-single-full", "user/two-single-reference"):
        card = hub.content(name)["README.md"].decode()
        snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
        assert snippet.startswith("import cornstarch_hf")
        reader = Client(hub, tmp_path / name.replace("/", "-"))
        reader(snippet)
        reader.close()


@pytest.mark.slow
def test_a_large_file_that_was_cut_on_its_way_is_resumed(hub, client, tmp_path):
    name = "user/large"
    client("""
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60_000}
        from cornstarch_hf import ModalEncoderModule
        large = MultimodalModel({"vision": ModalEncoderModule(AutoModel.from_pretrained("base/clip"))}, LlamaForCausalLM(LlamaConfig(**sizes)))
        large.push_to_hub("user/large")
    """)  # fmt: skip
    size = len(hub.content(name)["model.safetensors"])
    assert size > 25_000_000
    hub.calls.clear()
    hub.fail("GET", "^/content/", truncate=15_000_000)
    loader = fresh(hub, tmp_path)
    loader("AutoModelForMultimodalLM.from_pretrained('user/large', verify=True)")
    ranges = [call["range"] for call in hub.calls if call["path"].startswith("/content/") and call["range"]]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").split("-")[0]) <= 15_000_000
    loader.close()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"status": 500}, id="500"),
        pytest.param({"status": 429, "headers": {"Retry-After": "0"}}, id="429", marks=pytest.mark.slow),
        pytest.param({"drop": True}, id="dropped", marks=pytest.mark.slow),
        pytest.param({"truncate": 100}, id="truncated", marks=pytest.mark.slow),
    ],
)
def test_faults_while_loading_are_mended_or_raise(hub, client, pushed, tmp_path, fault):
    """Each file of a load in turn meets the fault once: the load is equal to the bit, or it raises."""
    loader = fresh(hub, tmp_path)
    for place, path in enumerate(
        ["config.json", "composition.json", "/content/", "index.json", "generation_config", "api/models"]
    ):
        hub.fail("GET", path, times=1, **fault)
        hub.fail("HEAD", path, times=1, **fault)
        try:
            loader("same(name, expected, cache_dir=cache)", name="user/one-shards-full", expected=f"{pushed}/one.pt",
                   cache=str(tmp_path / f"cache{place}"))  # fmt: skip
        except Failed as error:
            assert "AssertionError" not in error.kinds, error.cause  # it was refused, not loaded as something else
        hub.faults.clear()
        loader("same(name, expected, cache_dir=cache)", name="user/one-shards-full", expected=f"{pushed}/one.pt",
               cache=str(tmp_path / f"cache{place}"))  # fmt: skip
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "name"),
    [("MultimodalModel", "composition.json"), ("MultimodalProcessor", "processor_config.json"),
     ("MultimodalProcessor", "tokenizer_config.json")],
)  # fmt: skip
@pytest.mark.parametrize("fault", [{"status": 500}, {"drop": True}], ids=str)
def test_a_hub_that_fails_is_told_with_the_file(hub, pushed, tmp_path, what, name, fault):
    loader = fresh(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    # The client waits longer each time before it tries again: it need not.
    loader(
        "import time; from huggingface_hub.utils import _http; _http.time = type('Time', (), {'sleep': staticmethod(lambda s: None), 'time': time.time})"
    )
    for method in ("GET", "HEAD"):
        hub.fail(method, rf"/{name}$", times=100, **fault)
    with pytest.raises(Failed, match=f"OSError: user/one-single-full: {name} could not be read from the Hub"):
        loader("import cornstarch_hf; getattr(cornstarch_hf, what).from_pretrained('user/one-single-full')", what=what)
    loader.close()


def test_a_flipped_bit_on_the_hub(hub, client, tmp_path):
    client("model, processor = make(); push_to_hub(model, processor, 'user/flipped')")
    hub.flip_bit("user/flipped", "model.safetensors")
    with pytest.raises(Failed, match=r"user/flipped: model.safetensors has the SHA-256 \w+, expected"):
        client("AutoModel.from_pretrained('user/flipped', verify=True, cache_dir=cache)", cache=str(tmp_path / "a"))
    client("push_to_hub(model, processor, 'user/flipped-base', embed=False)")
    hub.flip_bit("base/clip", "model.safetensors")
    try:
        with pytest.raises(Failed, match=r"vision_encoder \(base/clip\): model.safetensors has the SHA-256"):
            client(
                "AutoModel.from_pretrained('user/flipped-base', verify=True, cache_dir=cache)",
                cache=str(tmp_path / "b"),
            )
    finally:
        hub.flip_bit("base/clip", "model.safetensors")


def test_bases_that_move_change_or_go(hub, client, bases, tmp_path):
    """Every failure of a reference names its component and the remedy; what is pinned loads the same."""
    for name in ("llama", "clip"):
        hub.put_folder(f"moving/{name}", bases / name)
    client("""
        torch.manual_seed(3)
        model, processor = compose("moving/llama", {"vision": "moving/clip"})
        push_to_hub(model, processor, "user/moving", embed=False)
        torch.save(answers(model, processor), f"{folder}/expected.pt")
        def load(place, **options):
            again = AutoModel.from_pretrained("user/moving", cache_dir=f"{folder}/{place}", **options)
            expected = torch.load(f"{folder}/expected.pt")
            assert all(torch.equal(v, answers(again, processor)[k]) for k, v in expected.items())
    """, folder=str(tmp_path))  # fmt: skip
    pinned = hub.repos["moving/llama"].branches["main"]
    client("load('same')")
    assert "has moved" not in client.log
    tiny.llama(intermediate_size=80).save_pretrained(tmp_path / "other")
    hub.put_folder("moving/llama", tmp_path / "other")
    client("load('moved')")
    assert (
        f"language_model: main of moving/llama has moved to {hub.repos['moving/llama'].branches['main'][:8]}"
        in client.log
    )
    hub.forget("moving/llama", pinned)
    with pytest.raises(
        Failed,
        match=r"language_model: its base 'moving/llama' at \w{40} is not there any more.*bases=\{'language_model'",
    ) as caught:
        client("load('forgotten')")
    assert "OSError" in caught.value.kinds
    client("load('moved')")  # it is in that cache still
    client("load('elsewhere', bases={'language_model': local})", local=str(bases / "llama"))
    client("load('elsewhere', bases={'language_model': 'base/llama'})")
    with pytest.raises(Failed, match=r"language_model \(moving/llama\): model.safetensors has \d+ bytes, expected"):
        client("load('x', bases={'language_model': 'moving/llama'})")
    hub.repos["moving/clip"].private = True
    with pytest.raises(
        Failed, match=r"vision_encoder: its base 'moving/clip' at \w{40} does not exist, or is private \(401/404\)"
    ):
        client("load('private', bases={'language_model': 'base/llama'})")
    hub.repos["moving/clip"].private, hub.repos["moving/clip"].gated = False, True
    with pytest.raises(
        Failed, match=r"vision_encoder: its base 'moving/clip' at \w{40} is gated \(403\): ask for access"
    ):
        client("load('gated', bases={'language_model': 'base/llama'})")
    del hub.repos["moving/clip"]
    with pytest.raises(Failed, match=r"vision_encoder: its base 'moving/clip' at \w{40} does not exist"):
        client("load('gone', bases={'language_model': 'base/llama'})")


def test_expected_answers_are_no_constants(pushed):
    """The answers that are compared differ between the two compositions, so that the comparisons say something."""
    one, two = (torch.load(pushed / f"{name}.pt") for name in ("one", "two"))
    assert one["ids"].shape != two["ids"].shape and len(set(one["tokens"][0].tolist())) > 2
