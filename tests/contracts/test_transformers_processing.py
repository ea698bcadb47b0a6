"""transformers' own tests of processors (`ProcessorTesterMixin` of its sdist) pass for composed ones, or say why not.

Each runs twice: as it is, and with a processor that is told what transformers' contract leaves out and ours asks for.
"""

import contextlib
import os
import re
import unittest
from pathlib import Path

import pytest
import transformers
from transformers_tests import FILE, case_of, mixin, names_of_tests

ROOT = Path(__file__).parents[2]
NOTHING = contextlib.nullcontext()
COMPOSITIONS = {"clip": ["clip"], "whisper": ["whisper"], "both": ["clip", "whisper"]}
# Keys of these are patterns of "name-composition".  Which tests skip themselves, and why that is right:
SKIPPED = {
    r"test_\w*video\w*-\w+": "no part of these compositions takes videos",
    r"test_\w+_(\d_images|image_\d)-whisper": "there is no image processor",
    r"test_(args_overlap_kwargs|processor_text_has_no_visual)-whisper": "there is no image processor",
    r"test_\w+_(\d_audio|audio_\d)-clip": "there is no feature extractor",
    r"test_chat_template_audio_sampling_rate-\w+": "looks for a rate handed to the call, within which files are decoded here",
    r"test_replacement_offsets-\w+": "placeholders are repeated by this package, and not by the hooks that this looks at",
    r"test_apply_chat_template_tool_calls_no_content-\w+": "the default template says nothing of tools",
}
SKIPPED[r"test_get_num_multimodal_tokens_\w+_audio-clip"] = "there is no feature extractor"
# What our contract refuses of the test as it is (docs/processing.md).
STRICTER = {
    r"test_(flat_kwarg_applied\w+|model_input_names)-\w+": (ValueError, "'(image|video)' is no modality of this model"),
    r"test_apply_chat_template_(audio|image)_\d-\w+": (TypeError, r"Unknown arguments \['fps', 'num_frames'\]"),
    r"test_(processor_with_multiple_inputs|(?!overlapping|subprocessor_defaults_3)\w+_\d_audio)-(whisper|both)": (
        ValueError,
        r"pass sampling_rate= \(Hz\)",
    ),
}
# What does not pass, told too; a row whose tests pass turns red.
WAITING = {
    r"test_chat_template_message_objects-\w+": "messages are dicts, objects of a client are refused",
    r"test_get_num_multimodal_tokens_\w+_audio-(whisper|both)": "its sounds are longer than the tiny window, which is refused",
    r"test_get_num_multimodal_tokens_\w+_call-whisper": "it gives images whatever the processor takes, which is refused",
}


def found(table, name, composition):
    return next((value for key, value in table.items() if re.fullmatch(key, f"{name}-{composition}")), None)


def every_test():
    names = names_of_tests(mixin()) if FILE.is_file() else []
    return [pytest.param(key, name, id=f"{name}-{key}") for key in COMPOSITIONS for name in names]


@pytest.fixture(scope="module")
def cases():
    """By composition, the mixin as test cases: as it is, and told."""
    base = mixin()
    made = {key: [case_of(base, encoders, told) for told in (False, True)] for key, encoders in COMPOSITIONS.items()}
    each = [case for both in made.values() for case in both]
    for case in each:
        case.setUpClass()
    yield made
    for case in each:
        case.tearDownClass()


def test_the_tests_of_transformers_are_there_and_the_ones_that_are_pinned():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    fetched = re.search(
        r"^(transformers==\S+) --hash=sha256:\w{64}$",
        (ROOT / "tests" / "support" / "transformers_sdist.txt").read_text(),
        re.M,
    )[1]
    assert fetched in pins
    if not FILE.is_file():
        if "CI" in os.environ and f"transformers=={transformers.__version__}" in pins:
            pytest.fail(f"{FILE} is missing: `make test` unpacks it.")
        pytest.skip(
            f"{FILE} is missing: `make test` unpacks it, for the version of transformers that constraints.txt pins"
        )


@pytest.mark.skipif(not FILE.is_file(), reason="the tests of this version of transformers are not unpacked")
@pytest.mark.parametrize(("composition", "name"), every_test())
def test_of_transformers(cases, composition, name):
    as_it_is, told = cases[composition]
    if reason := found(SKIPPED, name, composition):
        for case in (as_it_is, told):
            with pytest.raises(unittest.SkipTest):
                case(name).debug()
        pytest.skip(reason)
    waiting = found(WAITING, name, composition)
    try:
        run(as_it_is(name), found(STRICTER, name, composition))
        told(name).debug()
    except unittest.SkipTest as skipped:
        pytest.fail(f"It skips itself ({skipped}): say why in SKIPPED.")
    except Exception as error:
        if waiting is None:
            raise
        pytest.xfail(f"{waiting}: {error}")
    if waiting is not None:
        pytest.fail(f"It passes now, so take it out of WAITING: {waiting}.")


def run(case, stricter):
    """A test as it is, which may skip itself for what it has not been told."""
    with contextlib.suppress(unittest.SkipTest), pytest.raises(stricter[0], match=stricter[1]) if stricter else NOTHING:
        case.debug()


def test_each_row_of_the_tables_is_of_some_test():
    every = [param.id for param in every_test()]
    rows = [key for table in (SKIPPED, STRICTER, WAITING) for key in table]
    assert [key for key in rows if every and not any(re.fullmatch(key, test) for test in every)] == []
