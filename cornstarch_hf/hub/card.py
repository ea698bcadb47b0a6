"""The model card of a composed model, made of what it is: metadata, body, and a mark that tells whether it was edited.

The body's sections stand in `card_sections`.  Only facts go into a card; what is not known is said to be unknown.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..composition import summary
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.classes import names_repository
from .card_facts import Facts, training_facts
from .card_licenses import find_licenses, license_fields
from .card_markup import check_origin, check_repo_id, code, plain, repo_link
from .card_sections import (
    adapter_text,
    description,
    licenses_table,
    parts_table,
    picture,
    tokens_table,
    training,
    usage,
)
from .card_usage import INSTALL, adapter_snippet

LIBRARY = "cornstarch_hf"
MARK = "<!-- Written by cornstarch_hf. As long as nobody edits this file it is kept up to date. sha256: {} -->\n"
_MARK_LINE = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"))
# The Hub's tasks by the media that are taken; it has none for other kinds of input.
TASKS = {
    (): "text-generation",
    ("image",): "image-text-to-text",
    ("audio",): "audio-text-to-text",
    ("video",): "video-text-to-text",
    ("image", "video"): "image-text-to-text",
}
SEVERAL_MEDIA = "any-to-any"
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
HERE = "."  # what a snippet loads when nobody says where the checkpoint will be


def card_text(
    model: Any,
    processor: Any = None,
    repo_id: str | None = None,
    include_code: bool = False,
    embed: bool | Sequence[str] = True,
    trainer: Any = None,
    token: str | bool | None = None,
    *,
    license: str | None = None,
    licenses: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The text of a README.md for the Hub.

    Args:
        model: a composed model.  A short card is made of a composed model inside PEFT adapters, of a standalone projector,
            and, with None, of a processor alone.
        processor: the processor that is shared with it; without it the example only loads the model.
        repo_id: ``user/name``; without it the example loads the folder in which it is run.
        include_code: whether the checkpoint carries its code.
        embed: as `save_pretrained` was told: True, False, or the components whose weights are in the checkpoint.
        trainer: the Trainer that trained it, or the path of its `trainer_state.json`; see `training_facts`.
        token: to ask the Hub for the licences of private bases; False asks nothing.
        license: of this model; else the one that all parts have, where it is known of all.
        licenses: of bases by their repository, instead of asking the Hub.
        tags: further tags of the repository, after the model's own (`model.add_model_tags`).

    Returns:
        YAML metadata and Markdown, with a mark by which `merged_card` sees whether someone edited it.

    Raises:
        TypeError: a model of another kind, a trainer that is none.
        ValueError: an invalid `repo_id` or tag, an origin that names no commit of a repository, a licence that is no
            identifier, an unreadable trainer state.
    """
    if repo_id is not None:
        check_repo_id(repo_id, "repo_id")
    if wrong := [tag for tag in tags if not _is_tag(tag)]:
        raise ValueError(f"tags must be words such as 'chemistry', got {wrong}.")
    facts = training_facts(trainer) if trainer is not None else []
    inner = unwrapped(model)
    if _is_composed(inner):
        if inner is not model or getattr(model, "_hf_peft_config_loaded", False):  # only the adapters are saved then
            return _adapter_card(model, repo_id, facts, license, tags)
        return _composed_card(model, processor, repo_id, include_code, embed, facts, (token, license, licenses), tags)
    if getattr(getattr(inner, "config", None), "projection_type", None) is not None:
        return _projector_card(inner, repo_id, license, tags)
    if model is None and processor is not None:
        return _processor_card(processor, repo_id, license, tags)
    raise TypeError(f"A card describes a composed model, a projector or a processor, got {type(model).__name__}.")


def merged_card(existing: str | None, generated: str, overwrite: bool = False) -> str:
    """Which of two cards a repository or folder gets.

    Args:
        existing: the README.md that is there; None if there is none.
        generated: a text of `card_text`.
        overwrite: replace whatever is there.

    Returns:
        `generated`, unless the existing card is somebody's: then `existing`, to the letter.
    """
    return existing if existing is not None and not overwrite and is_edited(existing) else generated


def is_edited(card: str) -> bool:
    """Whether a README.md holds somebody's own words: no text of `card_text`, or one that was changed since.

    Line ends, and empty lines at the end, do not count: editors change them unasked.  An empty file is nobody's.
    """
    card = _normalised(card)
    return bool(card.strip()) and _MARK_LINE.findall(card) != [_digest(_MARK_LINE.sub("", card))]


def _marked(data: Mapping[str, Any], sections: Sequence[str]) -> str:
    head = f"---\n{ModelCardData(**data).to_yaml()}\n---\n"
    body = "\n" + "\n\n".join(section for section in sections if section) + "\n"
    return head + MARK.format(_digest(head + body)) + body


def _digest(text: str) -> str:
    return hashlib.sha256(_normalised(text).encode()).hexdigest()


def _normalised(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"


def _is_composed(model: Any) -> bool:
    return hasattr(model, "language_model") and hasattr(getattr(model, "config", None), "share_inputs")


def _title(repo_id: str | None, otherwise: str) -> str:
    return "# " + (plain(repo_id.split("/")[-1]) if repo_id else otherwise)


def _composed_card(
    model: Any,
    processor: Any,
    repo_id: str | None,
    include_code: bool,
    embed: Any,
    facts: Facts,
    legal: tuple,
    tags: Sequence[str],
) -> str:
    origins = getattr(model.config, "origins", None) or {}
    for component, origin in origins.items():
        check_origin(component, origin)
    token, license, licenses = legal
    found = find_licenses({o["repo_id"]: o["revision"] for o in origins.values()}, licenses, token)
    components = ["language_model", *(f"{name}_encoder" for name in model.config.encoders)]
    of_parts = [found[origins[c]["repo_id"]] if c in origins else None for c in components]
    embedded = components if embed is True else [] if embed is False else list(embed)
    references = [c for c in components if c in origins and c not in embedded]
    fields = license_fields(license, of_parts)
    data = _metadata(model, origins, include_code, bool(references), bool(facts), tags) | fields
    unsaid = "" if fields else "\n\nNot all are known, so the metadata states none for the whole."
    told = "" if facts else "\n\nNo record of a training run was given: which parts train says how the model is set."
    sections = [
        _title(repo_id, "Composed multimodal model"),
        description(model),
        picture(model, origins),
        "## Usage\n\n" + usage(model, processor, repo_id or HERE, include_code, references),
        "## Parts\n\n" + parts_table(model, origins, bool(facts)) + told,
        *(f"Adapter {adapter_text(*item)}." for item in getattr(model, "peft_config", {}).items()),
        "## Placeholders\n\n" + tokens_table(model),
        "## Training\n\n" + training(facts) if facts else "",
        "## Licences of the bases\n\n" + licenses_table(origins, found) + unsaid if origins else "",
    ]
    return _marked(data, sections)


def _metadata(
    model: Any, origins: Mapping[str, Any], include_code: bool, refers: bool, trained: bool, own_tags: Sequence[str]
) -> dict[str, Any]:
    kinds = [model.config.modality(name)["kind"] for name in model.config.encoders]
    media = tuple(sorted({kind for kind in kinds if kind in ("image", "audio", "video")}))
    bases = list(dict.fromkeys(origin["repo_id"] for origin in origins.values()))
    relation = "adapter" if refers else "merge" if len(bases) > 1 else "finetune"
    adapters = hasattr(model, "peft_config") or any(hasattr(part, "peft_config") for part in model._parts().values())
    tags = [LIBRARY, "multimodal", *kinds, *(["peft"] if adapters else [])]
    tags += [*(getattr(model, "model_tags", None) or []), *own_tags, *(["generated_from_trainer"] if trained else [])]
    return {
        "base_model": bases or None,
        "base_model_relation": relation if bases else None,
        # What the Hub offers under "Use this model" must run: plain transformers loads it only with its code.
        "library_name": "transformers" if include_code else LIBRARY,
        "pipeline_tag": TASKS.get(media, SEVERAL_MEDIA),
        "tags": list(filter(_is_tag, dict.fromkeys(tags))),
    }


def _is_tag(tag: Any) -> bool:
    return isinstance(tag, str) and TAG.fullmatch(tag) is not None


def _short(library: str, license: str | None, tags: Sequence[str]) -> dict[str, Any]:
    """Metadata of a short card."""
    return {"library_name": library, "tags": list(dict.fromkeys([LIBRARY, "multimodal", *tags]))} | license_fields(
        license, []
    )


def _adapter_card(model: Any, repo_id: str | None, facts: Facts, license: str | None, tags: Sequence[str]) -> str:
    """Of PEFT adapters around a composed model, which lies elsewhere."""
    config = unwrapped(model).config
    # A name alone could be a folder of this machine: a commit is known of what came from the Hub, or from its cache.
    base = (
        config.name_or_path if getattr(config, "_commit_hash", None) and names_repository(config.name_or_path) else None
    )
    # Trainer asks a model for PEFT's card where one says "peft"; only a PeftModel can answer.
    library = "peft" if is_wrapped(model) else LIBRARY
    data = _short(library, license, ["peft", *tags])
    sections = [
        _title(repo_id, "Adapters of a composed multimodal model"),
        f"Adapters for {repo_link(base)}." if base else "Adapters for a composed model that is not on the Hub.",
        *(f"Adapter {adapter_text(*item)}." for item in model.peft_config.items()),
    ]
    if base:
        data |= {"base_model": base, "base_model_relation": "adapter"}
        sections.append(f"## Usage\n\n```python\n{adapter_snippet(base, repo_id or HERE)}\n```")
    sections.append("## Training\n\n" + training(facts) if facts else "")
    return _marked(data, sections)


def _projector_card(projector: Any, repo_id: str | None, license: str | None, tags: Sequence[str]) -> str:
    part = summary("projector", projector)
    load = f'projector = MultimodalProjector.from_pretrained("{repo_id or HERE}")'
    sections = [
        _title(repo_id, "Multimodal projector"),
        f"A projector ({plain(part.projection)}) from an encoder's features to a language model's embeddings, with "
        f"{part.total:,} parameters ({part.dtypes}).",
        f"## Usage\n\n```python\nfrom cornstarch_hf import MultimodalProjector  # {INSTALL}\n\n{load}\n```",
    ]
    return _marked(_short(LIBRARY, license, tags), sections)


def _processor_card(processor: Any, repo_id: str | None, license: str | None, tags: Sequence[str]) -> str:
    tokens = ", ".join(f"{code(token)} for {code(name)}" for name, token in processor.tokens.items())
    load = f'processor = AutoProcessor.from_pretrained("{repo_id or HERE}")'
    lines = f"import cornstarch_hf  # {INSTALL}\nfrom transformers import AutoProcessor\n\n{load}"
    sections = [
        _title(repo_id, "Processor of a composed multimodal model"),
        f"A processor without its model. Placeholders: {tokens}.",
        f"## Usage\n\n```python\n{lines}\n```",
    ]
    return _marked(_short(LIBRARY, license, tags), sections)
