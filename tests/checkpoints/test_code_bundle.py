"""Checkpoints that carry their code: loaded with the package absent, installed and imported, saved again, and refused."""

import functools
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import convertible_models
import native_models
import native_processors
import pytest
import shared_parts
import tiles
import tiny
import torch
import typed_parts
import user_parts
from helpers import HERE, run_python, site_without
from hub_cache import commit_of, put_into_cache
from own_memory import own_memory, weights
from transformers import AutoModel, AutoModelForCausalLM

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    from_native,
    register_callback,
    register_encoder_type,
    register_position_rule,
)
from cornstarch_hf import compose as composed
from cornstarch_hf.checkpoints.code_bundle import __file__ as EXPORT_FILE
from cornstarch_hf.checkpoints.code_folder import MODEL_MAP, read_entry
from cornstarch_hf.checkpoints.users_code import OPTIONAL
from cornstarch_hf.parts.known_encoders import ENCODER_TYPES

IMAGE = tiny.ENCODERS["clip"][3](0)
CALL = {"text": "<image> a b", "images": IMAGE}


QFORMER = {
    "num_query_tokens": 3,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def compose(encoder, projection_type="linear", model_class=MultimodalModel, **options):
    fields = QFORMER if projection_type == "qformer" else {}
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type=projection_type, **fields))
    parts = {"vision": ModalEncoderModule(encoder, projector, **options)}
    model = model_class(encoders=parts, language_model=tiny.llama()).eval()
    return model, MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS["clip"][2]()}, model=model)


def users():
    """A model whose encoder, projection and callbacks come from two files of a user."""
    torch.manual_seed(0)
    return compose(
        shared_parts.WideEncoder(shared_parts.WideConfig()),
        "users_gated",
        preprocess_callback=None,
        postprocess_module_callback=shared_parts.doubled,
        postprocess_projector_callback=functools.partial(user_parts.drop_tokens, count=0),
    )


def save(parts, folder, **options):
    for part in parts:
        part.save_pretrained(folder, **options)
    return folder


def run_bare(arguments, scratch, without=()):
    """Run Python where the packages named are not installed: others are linked into a folder that stands for theirs."""
    place = site_without(scratch / f"site-{len(without)}", without)
    paths = [str(place)] + ([] if "cornstarch_hf" in without else [str(Path(EXPORT_FILE).parents[2])])
    environment = {"HF_MODULES_CACHE": str(scratch / f"modules-{len(without)}"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-P", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=scratch, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def load(state, folder, scratch, *save_to):
    """What `reload_shared.py` finds in a fresh process, with a cache for code of its own."""
    torch.save({"call": CALL}, scratch / "inputs.pt")
    files = [folder, scratch / "inputs.pt", scratch / "found.pt", *save_to]
    run_bare([HERE / "reload_shared.py", state, *files], scratch, ["cornstarch_hf"] if state == "absent" else [])
    return torch.load(scratch / "found.pt", weights_only=False)


def check(found, model, processor):
    inputs = dict(processor(**CALL, return_tensors="pt"))
    assert found["inputs"].keys() == inputs.keys()
    assert all(torch.equal(found["inputs"][key], inputs[key]) for key in inputs)
    assert len(found["weights"]) == 4 and all(x == weights(model) for x in found["weights"])
    model, inputs = own_memory(model), own_memory(inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert len(found["logits"]) == 4 and all(torch.equal(x, logits) for x in found["logits"])
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert found["same config class"]


def python_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = users()
    return made, save(made, tmp_path_factory.mktemp("shared") / "checkpoint", include_code=True)


def test_what_lies_in_the_folder(shared):
    _, folder = shared
    carries = read_entry(folder)
    assert {p.stem for p in folder.glob("*.py")} == set(carries["files"])
    assert set(carries["files"]) - set(carries["package"]) == {"multimodal_code", "shared_parts", "user_parts"}
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {key: f"multimodal_code.{name}" for key, name in MODEL_MAP.items()}
    found = json.loads((folder / "processor_config.json").read_text())["auto_map"]
    assert found == {"AutoProcessor": "multimodal_code.MultimodalProcessor"}
    text = b"".join(python_files(folder).values()).decode()
    assert "from cornstarch_hf import register" not in text and str(HERE) not in text
    assert len(text) < 800_000  # of 100 modules
    assert len(text) < 520_000  # with those of the user
    assert carries["sides"]["model"]["registrations"] == [
        ["register_callback", "users_doubled", "shared_parts", "doubled", "shared_parts", "kept"]
    ]


def test_a_common_checkpoint_carries_little_code(tmp_path):
    found = python_files(save(compose(tiny.clip()), tmp_path / "checkpoint", include_code=True))
    assert len(found) <= 60 and sum(map(len, found.values())) <= 480_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "projection_type, carried",
    [
        ("pixel_shuffle", {"projectors_reductions", "encoders_grids"}),
        ("avg_pool", {"projectors_windows", "projectors_reductions", "encoders_grids"}),
        ("resampler", {"projectors_resampler", "projectors_reductions", "encoders_grids"}),
        ("qformer", {"projectors_qformer"}),
    ],
)
def test_reducers_are_carried_where_a_checkpoint_names_them(tmp_path, projection_type, carried):
    made = compose(tiny.clip(), projection_type, drop_prefix=1)
    plain = python_files(save(compose(tiny.clip()), tmp_path / "plain", include_code=True))
    found = python_files(save(made, tmp_path / "checkpoint", include_code=True))
    assert {name.removesuffix(".py") for name in set(found) - set(plain)} == carried
    save(compose(tiny.clip()), tmp_path / "checkpoint", include_code=True)  # and go with it
    assert python_files(tmp_path / "checkpoint") == plain


@pytest.mark.slow
def test_a_projector_of_another_dtype_stays_so_where_the_package_is_absent(tmp_path):
    torch.manual_seed(0)
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp", dtype="float64"))
    parts = {"vision": ModalEncoderModule(tiny.clip(), projector)}
    model = MultimodalModel(encoders=parts, language_model=tiny.llama()).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS["clip"][2]()}, model=model)
    assert projector.dtype == torch.float64
    folder = save((model, processor), tmp_path / "checkpoint", include_code=True)
    check(load("absent", folder, tmp_path), model, processor)


@pytest.mark.slow
def test_a_users_projector_that_asks_for_grids_carries_what_finds_them(tmp_path):
    torch.manual_seed(0)
    made = compose(tiny.clip(), "users_rows", drop_prefix=1)
    folder = save(made, tmp_path / "checkpoint", include_code=True)
    assert {"user_parts.py", "encoders_grids.py"} <= set(python_files(folder))
    check(load("absent", folder, tmp_path, tmp_path / "again"), *made)
    assert python_files(tmp_path / "again") == python_files(folder)


FRAMES = """import sys, torch
from transformers import AutoModel, AutoProcessor
folder, file = sys.argv[1:3]
frames, inputs, tokens = torch.load(file, weights_only=False)
model, processor = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoProcessor))
found = processor(text="<video> a", videos=[frames], return_tensors="pt")
assert {*found} == {*inputs} and all(torch.equal(found[key], inputs[key]) for key in inputs)
assert torch.equal(model.generate(**found, max_new_tokens=3, do_sample=False), tokens)
"""


@pytest.mark.slow
def test_videos_of_an_encoder_of_images_run_where_the_package_is_absent(tmp_path):
    torch.manual_seed(0)
    parts = {"vision": ModalEncoderModule(tiny.clip(), kind="video")}
    model = MultimodalModel(encoders=parts, language_model=tiny.llama()).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS["clip"][2]()}, model=model)
    folder = save((model, processor), tmp_path / "checkpoint", include_code=True)
    assert {"encoders_grids.py", "processing_video.py"} <= set(python_files(folder))
    frames = [tiny.ENCODERS["clip"][3](i) for i in range(3)]
    inputs = dict(processor(text="<video> a", videos=[frames], return_tensors="pt"))
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    torch.save((frames, inputs, tokens), tmp_path / "expected.pt")
    run_bare(["-c", FRAMES, folder, tmp_path / "expected.pt"], tmp_path, ["cornstarch_hf"])


@pytest.mark.slow
def test_a_qformer_runs_where_the_package_is_absent(tmp_path):
    torch.manual_seed(0)
    model, processor = compose(tiny.clip(), "qformer")
    folder = save((model, processor), tmp_path / "checkpoint", include_code=True)
    check(load("absent", folder, tmp_path), model, processor)


@pytest.mark.slow
@pytest.mark.parametrize("name, packing", [("LlavaNext", "unpad"), ("Idefics3", "newline"), ("Idefics2", "concat")])
def test_an_encoder_of_tiles_carries_what_makes_and_packs_them(tmp_path, name, packing):
    made = tiles.composed(name, packing)
    folder = save(made, tmp_path / "checkpoint", include_code=True)
    assert {"encoders_tiles.py", "processing_tiles.py"} <= set(python_files(folder))
    assert not {path for path in python_files(folder) if path.startswith("conversion")}
    assert made[1](**CALL, return_tensors="pt")["num_tiles"].tolist() > [1]
    check(load("absent", folder, tmp_path), *made)


REFERENCES = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

where = {"cache_dir": sys.argv[2], "trust_remote_code": True}
model = AutoModel.from_pretrained(sys.argv[1], verify=True, **where)
assert type(model).__module__.startswith("transformers_modules")
model.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], verify=True, **where)
model.save_pretrained(sys.argv[4], embed=False, cache_dir=sys.argv[2])
once_more = AutoModel.from_pretrained(sys.argv[4], verify=True, **where)
for other in (again, once_more):
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
with open(sys.argv[1] + "/config.json", "a") as file:
    file.write(" ")
try:
    AutoModel.from_pretrained(sys.argv[1], verify=True, **where)
except ValueError as error:
    assert "config.json has" in str(error), error
else:
    raise SystemExit("a changed file was not seen")
"""


@pytest.mark.slow
def test_references_are_followed_and_verified_without_the_package(tmp_path):
    for name, part in (("u/clip", tiny.clip()), ("u/llama", tiny.llama())):
        part.save_pretrained(tmp_path / "parts" / name)
        put_into_cache(tmp_path / "cache", name, tmp_path / "parts" / name, commit_of(name))
    cache = {"cache_dir": tmp_path / "cache"}
    encoder = AutoModel.from_pretrained("u/clip", **cache)
    language_model = AutoModelForCausalLM.from_pretrained("u/llama", **cache)
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=language_model)
    model.save_pretrained(tmp_path / "c", embed=False, include_code=True, **cache)
    assert "checkpoints_bases.py" in python_files(tmp_path / "c")
    folders = [tmp_path / "c", tmp_path / "cache", tmp_path / "whole", tmp_path / "again"]
    run_bare(["-c", REFERENCES, *folders], tmp_path, ["cornstarch_hf"])
    loaded = MultimodalModel.from_pretrained(tmp_path / "again", verify=True, **cache)
    assert (
        weights(loaded) == weights(MultimodalModel.from_pretrained(tmp_path / "whole", verify=True)) == weights(model)
    )


NOT_CARRIED = """
import sys
import torch
from transformers import AutoModel, AutoProcessor

trust = {"trust_remote_code": True}
model, processor = (auto.from_pretrained(sys.argv[1], **trust) for auto in (AutoModel, AutoProcessor))


def refused(kind, words, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"{call} did not refuse")


refused(ImportError, "by reference (embed=False) is not among the code", model.save_pretrained, sys.argv[2], embed=False)
refused(ImportError, "pip install ./cornstarch_hf", type(model), encoders=model.encoders, language_model=model.language_model)
refused(ImportError, "pip install ./cornstarch_hf", model.describe)
refused(ValueError, "Pushing and from_native need the package", model.push_to_hub, "a/b")
code = sys.modules[type(model).__module__.rpartition(".")[0] + ".multimodal_code"]


def late(inputs, output):
    return output


code.register_callback("late", late)
model.vision_encoder.postprocess_module_callback = late
refused(ValueError, "cannot be saved together with ['__main__']", model.save_pretrained, sys.argv[2])
model.save_pretrained(sys.argv[2], include_code=False)
chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
found = processor.apply_chat_template(chat, chat_template=marked, **options)
torch.save({key: torch.as_tensor(value) for key, value in found.items()}, sys.argv[3])
plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
refused(ImportError, "assistant's turns", processor.apply_chat_template, chat, chat_template=plain, **options)
"""


@pytest.mark.slow
def test_what_is_not_carried_says_what_to_install(tmp_path):
    _, processor = made = compose(tiny.clip())
    folder = save(made, tmp_path / "c", include_code=True)
    run_bare(["-c", NOT_CARRIED, folder, tmp_path / "d", tmp_path / "found.pt"], tmp_path, ["cornstarch_hf"])
    assert set(python_files(tmp_path / "d")) == {"load_with_cornstarch_hf.py"}
    found, options = torch.load(tmp_path / "found.pt"), {"tokenize": True, "return_dict": True}
    template = NOT_CARRIED.partition('marked = "')[2].partition('"')[0]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    options |= {"chat_template": template, "return_assistant_tokens_mask": True}
    expected = processor.apply_chat_template(chat, **options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], torch.as_tensor(expected[key])) for key in found)


SLOW_STATES = [pytest.param(name, marks=pytest.mark.slow) for name in ("installed", "imported")]


@pytest.mark.parametrize("state", ["absent", *SLOW_STATES])
def test_the_three_states_of_the_package_load_the_same_bits_and_save_all_of_it_again(shared, tmp_path, state):
    made, folder = shared
    found = load(state, folder, tmp_path, tmp_path / "again")
    check(found, *made)
    assert found["package"] == (state == "imported")
    assert found["model"].startswith("cornstarch_hf" if state == "imported" else "transformers_modules")
    assert found.get("later", True)
    assert python_files(tmp_path / "again") == python_files(folder)
    again = AutoModel.from_pretrained(tmp_path / "again", verify=True, trust_remote_code=True)
    assert weights(again) == weights(made[0])
    for name in ("config.json", "processor_config.json"):
        again, first = (json.loads((f / name).read_text()) for f in (tmp_path / "again", folder))
        assert again["auto_map"] == first["auto_map"]


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A model whose encoder has facts of its own, registered under a name that its file does not write out."""
    torch.manual_seed(0)
    made = compose(typed_parts.StripEncoder(typed_parts.StripConfig()))
    return made, save(made, tmp_path_factory.mktemp("typed") / "checkpoint", include_code=True)


@pytest.mark.parametrize("state", ["absent", *SLOW_STATES])
def test_facts_of_encoder_types_travel_with_the_code(typed, tmp_path, state):
    made, folder = typed
    for side in read_entry(folder)["sides"].values():
        assert side["encoder_types"] == ["users_strip_encoder"] and side["registrations"] == []
        assert side["rows"]["users_strip_encoder"]["count"] == ["typed_parts", "strips"]
    assert (
        "register_encoder_type('users_strip_encoder', count=_typed_parts_strips, width_layers='all', kind='image'"
        in (folder / "multimodal_code.py").read_text()
    )
    found = load(state, folder, tmp_path, tmp_path / "again")
    check(found, *made)
    assert python_files(tmp_path / "again") == python_files(folder)


@pytest.mark.slow
def test_facts_that_a_carried_file_states_are_not_stated_again(tmp_path, monkeypatch):
    (tmp_path / "stating_parts.py").write_text(
        "from typed_parts import StripConfig, StripEncoder, strips\nfrom cornstarch_hf import register_encoder_type\n\n\n"
        "class StatingConfig(StripConfig):\n    model_type = 'users_stating_encoder'\n\n"
        "    def __init__(self, hidden_size=12, **kwargs):\n        super().__init__(hidden_size, **kwargs)\n\n\n"
        "class StatingEncoder(StripEncoder):\n    config_class = StatingConfig\n\n\n"
        "register_encoder_type('users_stating_encoder', count=lambda inputs, config: strips(inputs, config), kind='image')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stating = importlib.import_module("stating_parts")
    made = compose(stating.StatingEncoder(stating.StatingConfig()))
    folder = save(made, tmp_path / "checkpoint", include_code=True)
    carries = read_entry(folder)
    assert carries["sides"]["model"]["rows"] == {} and "stating_parts" in carries["files"]
    check(load("absent", folder, tmp_path), *made)


@pytest.mark.slow
def test_a_fact_that_no_name_leads_to_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(ENCODER_TYPES, "_entries", dict(ENCODER_TYPES._entries))
    register_encoder_type("users_wide_encoder", count=lambda inputs, config: 4)
    model, _ = compose(shared_parts.WideEncoder(shared_parts.WideConfig()))
    with pytest.raises(
        ValueError, match=r"'users_wide_encoder' \(encoder_types\).*call register_encoder_type\('users_wide_enc"
    ):
        model.save_pretrained(tmp_path / "a", include_code=True)
    model.save_pretrained(tmp_path / "a")  # without code its facts are stored by name


@pytest.mark.slow
@pytest.mark.parametrize("states", [("absent", "absent"), ("installed", "imported"), ("imported", "absent")])
def test_a_third_environment_loads_what_the_second_saved(shared, tmp_path, states):
    load(states[0], shared[1], tmp_path, tmp_path / "again")
    check(load(states[1], tmp_path / "again", tmp_path), *shared[0])


@pytest.mark.slow
def test_without_code_the_package_loads_it(tmp_path):
    made = compose(tiny.clip())
    folder = save(made, tmp_path / "plain")
    check(load("installed", folder, tmp_path), *made)
    check(load("imported", folder, tmp_path), *made)


MEET = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

def said(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (ImportError, ValueError) as error:
        return str(error)
    raise SystemExit(f"{call} loaded {arguments} with {options}")


doors = [auto.from_pretrained for auto in (AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor)]
doors.append(lambda folder, **options: pipeline("image-text-to-text", folder, **options))
for door in doors:
    # transformers' own words, in which only the name of the folder is ours: what it asks for leads on to our message.
    assert "`trust_remote_code=True`" in said(door, sys.argv[1], trust_remote_code=False)
    assert "`trust_remote_code=True`" in said(door, sys.argv[2], trust_remote_code=False)
    words = said(door, sys.argv[1], trust_remote_code=True)
    assert "pip install ./cornstarch_hf (a clone" in words and "`import cornstarch_hf` before loading" in words, words
    assert "pip install cornstarch_hf" not in words
"""


def test_a_program_without_the_package_is_told_what_to_install_and_to_import(tmp_path):
    made = compose(tiny.clip())
    folders = [save(made, tmp_path / "plain"), save(made, tmp_path / "code", include_code=True)]
    run_bare(["-c", MEET, *folders], tmp_path, ["cornstarch_hf"])


def test_without_code_the_package_is_asked_for(tmp_path):
    folder = save(compose(tiny.clip()), tmp_path / "plain")
    assert set(python_files(folder)) == {"load_with_cornstarch_hf.py"}
    package = r"package cornstarch_hf, which is not installed. pip install ./cornstarch_hf .*import cornstarch_hf"
    with pytest.raises(AssertionError, match=package):
        load("absent", folder, tmp_path)


def test_code_is_not_run_without_trust_and_the_remedy_is_named(shared, tmp_path):
    code = (
        "import sys, cornstarch_hf\nfrom transformers import AutoConfig, AutoModel, AutoProcessor\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "assert config.vision_config.model_type == 'users_wide_encoder' and config.vision_config.patch == 4\n"
        "for auto in (AutoModel, AutoProcessor):\n"
        "    try:\n        auto.from_pretrained(sys.argv[1])\n"
        "    except ValueError as error:\n        print(error)\n"
        "assert not [name for name in sys.modules if 'user_parts' in name or 'transformers_modules' in name]\n"
    )
    out = run_python(code, str(shared[1]), cwd=tmp_path)
    assert out.count("pass trust_remote_code=True for a checkpoint that carries it") == 2
    assert out.count("'users_wide_encoder'") == 2


def test_users_files_that_are_imported_already_are_not_run_again(shared):
    _, folder = shared
    before = {name for name in sys.modules if name.startswith("cornstarch_hf_shared_")}  # of other tests
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model.vision_encoder.module) is shared_parts.WideEncoder
    assert {name for name in sys.modules if name.startswith("cornstarch_hf_shared_")} == before


@pytest.mark.slow
def test_files_imported_after_their_copies_are_one_definition(shared, tmp_path):
    """The user's files come after the checkpoint's copies of them: both work, and saving names them."""
    code = (
        "import sys, cornstarch_hf\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "import shared_parts\n"
        "again = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(again.vision_encoder.module) is shared_parts.WideEncoder\n"
        "assert type(model.vision_encoder.module) is not shared_parts.WideEncoder\n"
        "model.save_pretrained(sys.argv[2])\nagain.save_pretrained(sys.argv[3])\n"
    )
    run_python(code, str(shared[1]), str(tmp_path / "a"), str(tmp_path / "b"))
    assert python_files(tmp_path / "a") == python_files(tmp_path / "b")
    first = python_files(shared[1]) | {"multimodal_code.py": None}  # the entry also lists what the processor needs
    assert python_files(tmp_path / "a") | {"multimodal_code.py": None} == first


@pytest.mark.slow
def test_the_code_of_a_checkpoint_is_removed_when_it_is_saved_without(shared, tmp_path):
    model, processor = shared[0]
    folder = save(shared[0], tmp_path / "c", include_code=True)
    (folder / "mine.py").write_text("")
    model.save_pretrained(folder, include_code=False)
    assert "multimodal_code.py" in python_files(folder)  # the processor still needs it
    processor.save_pretrained(folder, include_code=False)
    assert set(python_files(folder)) == {"mine.py", "load_with_cornstarch_hf.py"}
    save(shared[0], folder, include_code=True)
    assert set(python_files(folder)) == {*python_files(shared[1]), "mine.py"}


@pytest.mark.slow
def test_a_projector_alone(tmp_path):
    config = MultimodalProjectorConfig(projection_type="users_gated", in_features=6, out_features=4, gain=0.5)
    projector = MultimodalProjector(config)
    projector.save_pretrained(tmp_path / "p", include_code=True)
    code = (
        "import sys\nif sys.argv[2] == 'imported':\n    import cornstarch_hf\n"
        "from transformers import AutoModel\nimport torch\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert ('cornstarch_hf' in sys.modules) == (sys.argv[2] == 'imported')\n"
        "from own_memory import own_memory\n"
        "assert model.projection.gain == 0.5\n"
        "torch.save(own_memory(model)(torch.ones(2, 6))[0], sys.argv[1] + '/out.pt')\n"
    )
    for state in ("imported", "installed"):
        run_python(code, str(tmp_path / "p"), state, cwd=tmp_path)
        assert torch.equal(torch.load(tmp_path / "p" / "out.pt"), projector(torch.ones(2, 6))[0])


@pytest.mark.slow
def test_what_no_file_defines_is_refused_with_the_remedy(tmp_path, monkeypatch):
    def inner(inputs, output):
        return output

    register_callback("test_export_inner", inner)
    model, _ = compose(tiny.clip(), postprocess_module_callback=inner)
    with pytest.raises(
        ValueError, match=r"'test_export_inner'.*call register_callback\('test_export_inner', ...\) at the"
    ):
        model.save_pretrained(tmp_path / "a", include_code=True)
    main = types.FunctionType(inner.__code__, {"__name__": "__main__"}, "shown")
    main.__module__ = "__main__"
    register_callback("test_export_main", main)
    model, _ = compose(tiny.clip(), postprocess_module_callback=main)
    model.save_pretrained(tmp_path / "a")  # without code it is stored by name alone
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(
        ValueError, match=r"'test_export_main' \(callbacks\) is defined in a notebook.*move it to the top"
    ):
        model.save_pretrained(tmp_path / "a", include_code=True)
    register_callback("test_export_torch", torch.nn.functional.normalize)
    model, _ = compose(tiny.clip(), postprocess_module_callback=torch.nn.functional.normalize)
    model.save_pretrained(tmp_path / "a")


def test_saving_changes_no_configuration(shared):
    (model, processor), _ = shared
    assert "auto_map" not in vars(model.config) and type(model.config).auto_map == {}
    assert "auto_map" not in vars(processor)
    assert all(not getattr(cls, "_auto_class", None) for cls in (type(model), type(processor), type(model.config)))


OTHERS = """
import importlib.util, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

assert not any(importlib.util.find_spec(name) for name in sys.argv[3:])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save({name: (p, p.requires_grad) for name, p in model.named_parameters()}, sys.argv[2])
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
assert type(pipe.model) is type(model), (type(pipe.model), type(model))
print(pipe(text="<image> a", images=Image.new("RGB", (8, 8)), max_new_tokens=2)[0]["generated_text"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [True, False])
def test_adapters_inside_parts_and_pipelines(tmp_path, adapters):
    """Adapters come back with PEFT and without the package; without adapters, PEFT is not needed either."""
    from peft import LoraConfig, get_peft_model

    encoder = tiny.clip()
    if adapters:
        encoder = get_peft_model(encoder, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    made = compose(encoder)
    folder = save(made, tmp_path / "checkpoint", include_code=True)
    absent = [
        "cornstarch_hf",
        *(() if adapters else ("peft", "bitsandbytes", "soundfile", "datasets", "trl", "librosa")),
    ]
    run_bare(["-c", OTHERS, str(folder), str(tmp_path / "state.pt"), *absent], tmp_path, absent)
    found = torch.load(tmp_path / "state.pt", weights_only=False)
    expected = {name: (p, p.requires_grad) for name, p in made[0].named_parameters()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k][0], p) and found[k][1] == grad for k, (p, grad) in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "stems"),
    [
        ("qwen2_vl", {"language_model_position_rules", "language_model_positions", "encoders_said_of_items"}),
        (
            "qwen3_vl",
            {
                "language_model_position_rules",
                "language_model_positions",
                "language_model_inner_features",
                "encoders_said_of_items",
            },
        ),
        ("idefics3", {"conversion_steps", "projectors_reductions"}),
        (
            "paligemma",
            {
                "language_model_position_rules",
                "language_model_positions",
                "language_model_masks",
                "encoders_said_of_items",
            },
        ),
        ("gemma3", {"language_model_masks", "projectors_native", "projectors_qformer"}),
    ],
)
def test_rules_run_where_the_package_is_absent_and_only_they_are_carried(tmp_path, model_type, stems):
    if model_type == "idefics3":
        native = convertible_models.build(model_type)
        inputs = convertible_models.batch(convertible_models.TYPES[model_type].media(native))
    else:
        native = native_models.native(model_type)
        packed = model_type in native_models.PACKED
        inputs = (native_models.image_inputs if packed else native_models.picture_inputs)(native)
    model, folder = from_native(native)[0], tmp_path / "checkpoint"
    model.save_pretrained(folder, include_code=True)
    special = {stem for stem in OPTIONAL if stem != "language_model_text_head"}
    assert {path.stem for path in folder.glob("*.py")} & special == stems
    model = own_memory(model)
    with torch.no_grad():
        logits = model(**own_memory(inputs)).logits[inputs["attention_mask"].bool()]
    tokens = model.generate(**own_memory(inputs), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    torch.save((inputs, logits, tokens), tmp_path / "expected.pt")
    run_bare([HERE / "reload_rules.py", folder, tmp_path / "expected.pt"], tmp_path, ["cornstarch_hf"])


@pytest.mark.slow
def test_a_users_rule_is_carried(tmp_path):
    register_position_rule("users_rule", user_parts.doubled_positions)
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    rule = {"rule": "users_rule", "by": 3}
    model = MultimodalModel(encoders=encoders, language_model=tiny.llama(), positions=rule).eval()
    folder, inputs = (
        tmp_path / "checkpoint",
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()},
    )
    model.save_pretrained(folder, include_code=True)
    assert {"user_parts", "language_model_positions"} <= {path.stem for path in folder.glob("*.py")}
    model = own_memory(model)
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        assert not torch.equal(logits, model.language_model(**inputs).logits[0])
    torch.save((inputs, logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)), tmp_path / "expected.pt")
    run_bare([HERE / "reload_rules.py", folder, tmp_path / "expected.pt"], tmp_path, ["cornstarch_hf"])


NATIVE_PROCESSOR = """import sys, torch
from transformers import AutoModel, AutoProcessor
folder, file = sys.argv[1:3]
call, expected = torch.load(file, weights_only=False)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "cornstarch_hf" not in sys.modules
found = processor(**call)
assert {*found} == {*expected} and all(torch.equal(found[key], expected[key]) for key in expected)
model.generate(**found, max_new_tokens=2, do_sample=False)
processor.save_pretrained(folder + "-again", include_code=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_audio"])
def test_a_native_processor_is_carried(tmp_path, model_type):
    model, processor = from_native(native_processors.pair(model_type))
    folder, token = tmp_path / "checkpoint", next(iter(processor.tokens.values()))
    save((model, processor), folder, include_code=True)
    assert (folder / "processing_native_call.py").is_file()
    sounds = {"audio": [tiny.sound(0, 9000)], "sampling_rate": 16_000}
    media = {"images": [tiny.image(0, (40, 90))]} if model_type == "idefics3" else sounds
    call = {"text": [f"see {token} it"], "return_tensors": "pt", **media}
    torch.save((call, dict(processor(**call))), tmp_path / "expected.pt")
    run_bare(["-c", NATIVE_PROCESSOR, folder, tmp_path / "expected.pt"], tmp_path, ["cornstarch_hf"])
    assert python_files(Path(f"{folder}-again")).keys() <= python_files(folder).keys()


@pytest.mark.slow
@pytest.mark.parametrize("resample", [None, "bilinear"])
def test_joined_encoders_run_where_the_package_is_absent(tmp_path, resample):
    torch.manual_seed(0)
    side = 12 if resample else 8
    images = tiny.IMAGES["CLIP"](size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    towers = {
        "vision": {"model": tiny.siglip(), "processor": tiny.ENCODERS["siglip"][2]()},
        "dino": {"model": tiny.dinov2(hidden_size=12, image_size=side), "processor": images, "drop_prefix": 1},
    }
    group = {"encoders": list(towers), "join": "channels"} | ({"resample": resample} if resample else {})
    model, processor = composed(tiny.llama(), towers, tokenizer=tiny.tokenizer(), share_inputs=[group])
    folder = save((model, processor), tmp_path / "checkpoint", include_code=True)
    assert "encoders_joining.py" in python_files(folder)
    check(load("absent", folder, tmp_path), model, processor)
