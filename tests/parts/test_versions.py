"""Names and hooks of transformers that differ between versions: found, or everything stops; importing warns outside the range."""

import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from helpers import compose_tiny, run_python
from hooks import METHODS
from packaging.specifiers import SpecifierSet
from transformers import DynamicCache, GenerationMixin, LlamaForCausalLM, PreTrainedModel, ProcessorMixin

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor, MultimodalProjector
from cornstarch_hf.parts import versions

ROOT = Path(__file__).parents[2]


def test_the_range_is_the_one_that_installers_are_told():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    told = next(text.removeprefix("transformers") for text in required if text.startswith("transformers"))
    assert SpecifierSet(told) == SpecifierSet(f">={versions.OLDEST},<{versions.BELOW}")
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        assert versions.OLDEST in text and versions.BELOW in text, page


@pytest.mark.parametrize(
    "version", ["5.20.1", *(pytest.param(v, marks=pytest.mark.slow) for v in (versions.BELOW + ".0", "6.0.0.dev0"))]
)
def test_importing_warns_outside_the_range(version):
    # The first import of processors makes transformers' module anew, with its own version.
    code = f"import transformers.processing_utils, sys\nsys.modules['transformers'].__version__ = {version!r}\nimport cornstarch_hf\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"transformers {version} is installed" in done.stderr and versions.OLDEST in done.stderr
    assert f"< {versions.BELOW}" in done.stderr


def test_importing_within_the_range_says_nothing():
    run_python("import warnings\nwarnings.simplefilter('error', UserWarning)\nimport cornstarch_hf\n")


@pytest.fixture(scope="module")
def composed():
    model, processor = compose_tiny(["clip"])
    images = [[tiny.image(0)], [tiny.image(1), tiny.image(2)]]
    texts = ["a <image> then what", "<image> and <image> what"]
    return model, dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


UNKNOWN = """
from transformers import DynamicCache, GenerationMixin
def prepare_inputs_for_generation(self, input_ids, kv=None, **kwargs): ...
GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation  # of a version to come, in this process alone
from helpers import compose_tiny, uneven_inputs
from cornstarch_hf.parts import versions
assert versions.CACHE is None
model, processor = compose_tiny(["clip"])
inputs = uneven_inputs(processor)
def refused(call, **more):
    try:
        call(**inputs, **more)
    except ValueError as error:
        assert f"tested with transformers >= {versions.OLDEST}, < {versions.BELOW}" in str(error) and "pip install" in str(error)
    else:
        raise AssertionError(call)
refused(model.generate, max_new_tokens=1)
for call in (model, model.base_model):
    call(**inputs, use_cache=False)  # without a cache nothing depends on its name
    for name in versions.CACHE_NAMES:
        refused(call, **{name: DynamicCache()})
print("refused")
"""


def test_generation_raises_where_the_name_of_caches_is_unknown():
    assert run_python(UNKNOWN).endswith("refused\n")


@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_a_cache_is_taken_by_each_of_its_names(composed, name):
    model, inputs = composed
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    cache, lengths = DynamicCache(config=model.language_model.config), []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **{name: cache}), expected)
    hook.remove()
    assert lengths == [given["input_ids"].shape[1], 1, 1, 1]
    assert cache.get_seq_length() == given["input_ids"].shape[1] + 3
    used = DynamicCache(config=model.language_model.config)
    with torch.no_grad():
        whole = model(**inputs).logits
        first = {k: v for k, v in inputs.items() if k not in given} | {k: v[:, :-1] for k, v in given.items()}
        model(**first, **{name: used})
        last = model(given["input_ids"][:, -1:], attention_mask=given["attention_mask"], **{name: used}).logits
    assert used.get_seq_length() == whole.shape[1]
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


def test_two_caches_raise(composed):
    model, inputs = composed
    caches = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    for call in (model, model.base_model, model.generate):
        with pytest.raises(ValueError, match=r"2 times, as \['cache', 'past_key_values'\].*give it once"):
            call(**inputs, **caches)


def test_the_signature_names_caches_as_this_version_does(composed):
    known = inspect.signature(composed[0].forward).parameters
    own = inspect.signature(LlamaForCausalLM.forward).parameters
    assert versions.CACHE in own and versions.CACHE in known
    assert not {name for name in versions.CACHE_NAMES if name not in own} & set(known)


@pytest.mark.parametrize(
    ("owner", "table"),
    [(GenerationMixin, "GENERATION_HOOKS"), (PreTrainedModel, "MODEL_HOOKS"), (ProcessorMixin, "PROCESSOR_HOOKS")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_hook_that_is_gone_stops_everything(owner, table):
    names = getattr(versions, table)
    versions.check_hooks(owner, names)
    for name in names:
        old = type("Old" + owner.__name__, (), {n: None for n in names if n != name})
        with pytest.raises(ValueError, match=rf"has no Old{owner.__name__}\.{name}, which composed models replace"):
            versions.check_hooks(old, names)


def test_the_tables_hold_every_private_method_that_is_overridden():
    """Public ones are called by users too, and are not renamed unnoticed."""
    found = {"GENERATION_HOOKS": set(), "MODEL_HOOKS": set(), "PROCESSOR_HOOKS": set()}
    for cls in (
        *MultimodalModel.__mro__,
        *MultimodalProcessor.__mro__,
        *MultimodalProjector.__mro__,
        ModalEncoderModule,
    ):
        if not cls.__module__.startswith("cornstarch_hf."):
            continue
        for name, value in vars(cls).items():
            if not (inspect.isfunction(value) or isinstance(value, classmethod)) or not re.match(r"_[a-z]", name):
                continue
            for owner, table in (
                (GenerationMixin, "GENERATION_HOOKS"),
                (ProcessorMixin, "PROCESSOR_HOOKS"),
                (PreTrainedModel, "MODEL_HOOKS"),
            ):
                if hasattr(owner, name) and (owner is not ProcessorMixin or issubclass(cls, ProcessorMixin)):
                    found[table].add(name)
                    break
    for table, names in found.items():
        assert names <= {*getattr(versions, table), "_init_weights"}, table  # torch's own name for a public hook
    watched = {name for _, name, _ in METHODS}
    assert {*versions.GENERATION_HOOKS, *versions.MODEL_HOOKS, *versions.PROCESSOR_HOOKS} <= watched


def test_attaching_adapters_with_a_peft_that_is_too_old_names_both_versions(composed, monkeypatch):
    model, _ = composed
    monkeypatch.setattr(versions, "MIN_PEFT_VERSION", "99.0")
    versions.peft_is_behind.cache_clear()
    try:
        for call in (model.add_adapter, model.load_adapter):
            with pytest.raises(
                ValueError, match=r"needs peft >= 99\.0, but peft \d+\.\d+.* is installed.*get_peft_model"
            ):
                call(object())
    finally:
        versions.peft_is_behind.cache_clear()


def test_a_checkpoint_with_code_carries_the_check(composed, tmp_path):
    composed[0].save_pretrained(tmp_path, include_code=True)
    carried = (tmp_path / "parts_versions.py").read_text()
    assert (
        carried.endswith("\n_warn_if_untested()\n")
        and f'OLDEST, BELOW = "{versions.OLDEST}", "{versions.BELOW}"' in carried
    )
    assert "from .parts_versions import" in (tmp_path / "modeling_multimodal.py").read_text()


def test_a_former_name_of_caches_is_told_to_be_one(composed):
    model, inputs = composed
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(**inputs, **{versions.CACHE: DynamicCache()})
        model(**inputs)
        assert not [warning for warning in seen if "is deprecated, as in" in str(warning.message)]
        model(**inputs, past_key_values=DynamicCache())
    told = [str(w.message) for w in seen if "is deprecated, as in transformers: use `cache`" in str(w.message)]
    assert told == (
        ["`past_key_values` is deprecated, as in transformers: use `cache`."] if versions.CACHE == "cache" else []
    )


@pytest.mark.parametrize("wrong", [((torch.zeros(1),),), True, "dynamic"], ids=lambda x: type(x).__name__)
def test_what_is_no_cache_is_refused(composed, wrong):
    model, inputs = composed
    for call in (model, model.base_model, model.generate):
        with pytest.raises(TypeError, match=rf"must be a cache of transformers.*got {type(wrong).__name__}"):
            call(**inputs, **{versions.CACHE: wrong})
