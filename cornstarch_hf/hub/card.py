"""The model card: what is known of a model, also by `card_facts`, as text that breaks no markup; a mark tells of edits."""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from ..checkpoints.code_folder import INSTALL
from ..composition import UNKNOWN_COUNT, features_per_item, summaries, summary
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.classes import COMMIT, names_repository
from .card_facts import examples, find_licenses, license_fields, own_imports, training_facts

LIBRARY = "cornstarch_hf"
HUB = "https://huggingface.co"
MARK = "<!-- Written by cornstarch_hf. As long as nobody edits this file it is kept up to date. sha256: {} -->\n"
_MARK_LINE = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"))
# The Hub's tasks by the media that are taken; it has none for other kinds of input.
TASKS = {(): "text-generation", ("image",): "image-text-to-text", ("audio",): "audio-text-to-text",
         ("video",): "video-text-to-text", ("image", "video"): "image-text-to-text"}  # fmt: skip
SEVERAL_MEDIA = "any-to-any"
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
# What Markdown, HTML or a table's cell would read as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
# A flowchart shows what stands in quotes as it is, but for its own entities and HTML.
_ESCAPE = str.maketrans({'"': "#quot;", "#": "#35;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"})


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
    """The text of a README.md for the Hub: metadata, Markdown, and a mark by which `merged_card` sees whether it was edited.

    Args:
        model: a composed model; one inside PEFT adapters, a projector, or None for the processor alone get a short card.
        processor: the processor that is shared with it; without it the example only loads the model.
        repo_id: ``user/name``; without it the example loads the folder in which it is run.
        include_code: whether the checkpoint carries its code.
        embed: as `save_pretrained` was told: True, False, or the components whose weights are in the checkpoint.
        trainer: the Trainer that trained it, or the path of its `trainer_state.json`; see `training_facts`.
        token: to ask the Hub for the licences of private bases; False asks nothing.
        license: of this model; else the one that all parts have, where it is known of all.
        licenses: of bases by their repository, instead of asking the Hub.
        tags: further tags of the repository, after the model's own (`model.add_model_tags`).

    Raises:
        TypeError: a model of another kind, a trainer that is none.
        ValueError: an invalid `repo_id` or tag, an origin that names no commit of a repository, a licence that is no
            identifier, an unreadable trainer state.
    """
    if repo_id is not None:
        _check_repo_id(repo_id, "repo_id")
    if wrong := [tag for tag in tags if not _is_tag(tag)]:
        raise ValueError(f"tags must be words such as 'chemistry', got {wrong}.")
    training = training_facts(trainer) if trainer is not None else []
    data, facts = _described(model, processor, include_code, embed)
    found = find_licenses({o["repo_id"]: o.get("revision") for o in facts["origins"].values()}, licenses, token)
    fields = license_fields(license, [found.get(base) for base in facts.get("bases", ())])
    more = ["generated_from_trainer"] if training and facts["kind"] == "model" else []
    marks = dict.fromkeys([LIBRARY, "multimodal", *data.get("tags", ()), *tags, *more])
    # A modality's kind is a word of the user's, and need not be a tag.
    data = {"library_name": LIBRARY, **data, **fields, "tags": list(filter(_is_tag, marks))}
    head = f"---\n{ModelCardData(**data).to_yaml()}\n---\n"
    facts |= {"repo_id": repo_id, "training": training, "licenses": found, "license": fields.get("license")}
    body = ENVIRONMENT.get_template("card_template.md").render(facts)
    # Sections that are left out leave empty lines behind.
    body = "\n" + re.sub(r"\n{3,}", "\n\n", body).strip("\n") + "\n"
    return head + MARK.format(_digest(head + body)) + body  # of all but the mark's own line


def merged_card(existing: str | None, generated: str, overwrite: bool = False) -> str:
    """The card of a repository: `generated` by `card_text`, unless the `existing` one is somebody's and not to be replaced."""
    return existing if existing is not None and not overwrite and is_edited(existing) else generated


def is_edited(card: str) -> bool:
    """Whether a README.md holds somebody's own words: no text of `card_text`, or one that was changed since.

    Line ends, and empty lines at the end, do not count: editors change them unasked.  An empty file is nobody's.
    """
    card = _normalised(card)
    return bool(card.strip()) and _MARK_LINE.findall(card) != [_digest(_MARK_LINE.sub("", card))]


def _digest(text: str) -> str:
    return hashlib.sha256(_normalised(text).encode()).hexdigest()


def _normalised(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"


# ---- what is known of each kind: metadata, and what the template tells


def _described(model: Any, processor: Any, include_code: bool, embed: bool | Collection[str]) -> tuple[dict, dict]:
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    if hasattr(inner, "language_model") and hasattr(config, "share_inputs"):
        if inner is model and not getattr(model, "_hf_peft_config_loaded", False):
            return _composition(model, processor, include_code, embed)
        # Adapters alone are saved then, and the model around which they are lies elsewhere.  A name alone could be a folder
        # of this machine: a commit is known of what came from the Hub, or from its cache.
        on_hub = getattr(config, "_commit_hash", None) and names_repository(config.name_or_path)
        base = {"base_model": config.name_or_path, "base_model_relation": "adapter"} if on_hub else {}
        # Trainer asks a model for PEFT's card where one says "peft"; only a PeftModel can answer.
        data = {"library_name": "peft" if is_wrapped(model) else LIBRARY, "tags": ["peft"], **base}
        return data, {"kind": "adapters", "base": base.get("base_model"), "adapters": model.peft_config, "origins": {}}
    if getattr(config, "projection_type", None) is not None:
        return {}, {"kind": "projector", "part": summary("projector", inner), "origins": {}}
    if model is None and processor is not None:
        return {}, {"kind": "processor", "tokens": processor.tokens, "origins": {}}
    raise TypeError(f"A card describes a composed model, a projector or a processor, got {type(model).__name__}.")


def _composition(model: Any, processor: Any, include_code: bool, embed: bool | Collection[str]) -> tuple[dict, dict]:
    origins, names = getattr(model.config, "origins", None) or {}, model.config.encoders
    for component, origin in origins.items():
        check_origin(component, origin)
    components = ["language_model", *(f"{name}_encoder" for name in names)]
    embedded = components if embed is True else embed or ()
    references = [name for name in components if name in origins and name not in embedded]
    counts = {name: features_per_item(model, name) for name in names}
    facts = {
        "kind": "model",
        "encoders": {name: model.config.modality(name) for name in names},
        # The reason why a count is not known may quote a user's code.
        "features": {name: UNKNOWN_COUNT if UNKNOWN_COUNT in text else text for name, text in counts.items()},
        "parts": summaries(model),
        "picture": _picture(model, origins),
        "origins": origins,
        "bases": [origins[name]["repo_id"] if name in origins else None for name in components],
        "references": references,
        "adapters": getattr(model, "peft_config", {}),
        "include_code": include_code,
        "own_imports": own_imports(model),
        "example": None if processor is None else examples(model, processor),
    }
    kinds = [encoder.kind for encoder in model.encoders.values()]
    bases = list(dict.fromkeys(origin["repo_id"] for origin in origins.values()))
    peft = any(hasattr(part, "peft_config") for part in (model, *model._parts().values()))
    # With references it adds to its bases; without, all weights are here, of several bases or of one.
    relation = "adapter" if references else "merge" if len(bases) > 1 else "finetune"
    return {
        "base_model": bases or None,
        "base_model_relation": relation if bases else None,
        # What the Hub offers under "Use this model" must run: plain transformers loads it only with its code.
        "library_name": "transformers" if include_code else LIBRARY,
        "pipeline_tag": TASKS.get(tuple(sorted({"image", "audio", "video"} & set(kinds))), SEVERAL_MEDIA),
        "tags": [*kinds, *(["peft"] if peft else []), *(getattr(model, "model_tags", None) or [])],
    }, facts


def _picture(model: Any, origins: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The composition as a mermaid flowchart, from inputs through encoders and projectors to the language model."""
    parts = {part.where: part for part in summaries(model)}

    def component(name: str, where: str) -> list[str]:
        return [name, parts[where].class_name, *([origins[name]["repo_id"]] if name in origins else [])]

    text = component("language_model", "language_model")
    nodes = {"in text": ["text"], "merge": ["embeddings in order"], "text": text, "out": ["text"]}
    edges = [("in text", "merge"), ("merge", "text"), ("text", "out")]
    for name, encoder in model.encoders.items():
        # Encoders that share their items hang on one input.
        groups = (group["encoders"] if isinstance(group, dict) else group for group in model.config.share_inputs)
        group = next((group for group in groups if name in group), [name])
        nodes.setdefault(f"in {group}", [encoder.kind])
        nodes[f"encoder {name}"] = component(f"{name}_encoder", f"{encoder.shares.get('module', name)}_encoder.module")
        # Whose projector it is: features of encoders that are joined go through one.
        owner = encoder.shares.get("projector", name)
        nodes.setdefault(f"projector {owner}", ["projector", parts[f"{owner}_encoder.projector"].projection])
        edges += itertools.pairwise([f"in {group}", f"encoder {name}", f"projector {owner}"])
        edges += [(f"projector {owner}", "merge")] if owner == name else []
    return flowchart(nodes, edges)


# ---- text that breaks neither Markdown nor mermaid nor Python


def plain(text: Any) -> Markup:
    """Text as Markdown shows it letter by letter, on one line."""
    return Markup(_MARKUP.sub(r"\\\1", _one_line(text)))


def code(text: Any) -> Markup:
    """Text in a code span, on one line, safe in a table's cell."""
    text = _one_line(text)
    # A fence ends a code span only where it is as long as the one that began it.
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""  # Markdown takes one space off on both sides
    return Markup(f"{fence}{space}{text}{space}{fence}".replace("|", "\\|"))


def repo_link(repo_id: str) -> Markup:
    """A link to a repository of the Hub."""
    return Markup(f"[{plain(repo_id)}]({HUB}/{repo_id})")


def commit_link(repo_id: str, revision: str | None) -> Markup:
    """A link to a commit, shown by its first seven digits; ``unknown`` where it is not known."""
    return Markup("unknown" if revision is None else f"[{revision[:7]}]({HUB}/{repo_id}/tree/{revision})")


def flowchart(nodes: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str]]) -> Markup:
    """A mermaid flowchart from left to right: the lines of each node's label by a key of any text, and pairs of keys."""
    ids = {key: f"n{i}" for i, key in enumerate(nodes)}  # a name of the user's could be a word of mermaid ("end")
    lines = ["flowchart LR"]
    for key, label in nodes.items():
        shown = "<br/>".join(_one_line(text).translate(_ESCAPE) for text in label)
        lines.append(f'    {ids[key]}["{shown}"]')
    lines += [f"    {ids[a]} --> {ids[b]}" for a, b in edges]
    return Markup("\n".join(lines))


def _one_line(text: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


# What the template shows is `plain`, unless a filter has made markup of it; an unknown name raises.
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=lambda value: value if isinstance(value, (Markup, jinja2.Undefined)) else plain(value),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["install"] = INSTALL
ENVIRONMENT.filters |= {
    "code": code,
    "repo_link": repo_link,
    "commit_link": commit_link,
    "quoted": lambda text: Markup(json.dumps(text, ensure_ascii=False)),
    "python": Markup,
    "paragraph": lambda lines: Markup(" ".join(lines.split()) + "\n\n"),
}


# ---- what goes into links


def _check_repo_id(value: Any, where: str) -> None:
    """Refuse what is no repository's name (ValueError)."""
    if not names_repository(value):
        raise ValueError(f"{where} must name a repository of the Hub, such as 'user/name', got {value!r:.100}.")


def check_origin(component: str, origin: Mapping[str, Any]) -> None:
    """Refuse an origin that names no repository of the Hub, or no commit where it names one (ValueError)."""
    _check_repo_id(origin.get("repo_id"), f"{component}: the origin")
    revision = origin.get("revision")
    if revision is not None and not (isinstance(revision, str) and COMMIT.fullmatch(revision)):
        raise ValueError(f"{component}: the origin must name a commit of 40 hexadecimal digits, got {revision!r:.100}.")


def _is_tag(tag: Any) -> bool:
    return isinstance(tag, str) and TAG.fullmatch(tag) is not None
