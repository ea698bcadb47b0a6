"""The body of a model card, section by section: what it is, picture, parts, tokens, usage, training, licences."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..composition import UNKNOWN_COUNT, PartSummary, features_per_item, summaries
from ..parts.adapters import is_wrapped
from .card_facts import Facts
from .card_markup import code, commit_link, flowchart, plain, repo_link, table
from .card_usage import INSTALL, unaskable, usage_snippet

Origins = Mapping[str, Mapping[str, Any]]


def description(model: Any) -> str:
    """One paragraph of what is joined to what."""
    names = model.config.encoders
    encoders = ", ".join(f"{code(name)} for {plain(model.config.modality(name)['kind'])}" for name in names)
    text = {part.where: part for part in summaries(model)}["language_model"]
    return (
        f"{len(names)} encoder{'s' if len(names) > 1 else ''} ({encoders}) joined to the language model "
        f"{code(text.class_name)} by {'projectors' if len(names) > 1 else 'a projector'}: the features of an item take the "
        "places of its placeholder tokens in the text. Composed with `cornstarch_hf`."
    )


def picture(model: Any, origins: Origins) -> str:
    """The composition as a mermaid flowchart, in a code block that the Hub draws."""
    parts = {part.where: part for part in summaries(model)}
    text = ["language_model", parts["language_model"].class_name, *_source(origins, "language_model")]
    nodes: dict[str, Sequence[str]] = {
        "in text": ["text"],
        "merge": ["embeddings in order"],
        "text": text,
        "out": ["text"],
    }
    edges = [("in text", "merge"), ("merge", "text"), ("text", "out")]
    for name in model.config.encoders:
        entry = model.config.modality(name)
        group = next((group for group in model.config.share_inputs if name in group), [name])
        nodes.setdefault(f"in {group}", [entry["kind"]])
        encoder, projector = parts[f"{name}_encoder.module"], parts[f"{name}_encoder.projector"]
        nodes[f"encoder {name}"] = [f"{name}_encoder", encoder.class_name, *_source(origins, f"{name}_encoder")]
        nodes[f"projector {name}"] = ["projector", projector.projection]
        path = [f"in {group}", f"encoder {name}", f"projector {name}", "merge"]
        edges += itertools.pairwise(path)
    return f"```mermaid\n{flowchart(nodes, edges)}\n```"


def _source(origins: Origins, component: str) -> list[str]:
    return [origins[component]["repo_id"]] if component in origins else []


def parts_table(model: Any, origins: Origins, trained: bool) -> str:
    """Class, base, size and training of each part."""
    header = ["part", "class", "base", "revision", "parameters", "trained" if trained else "set to train", "dtype"]
    rows = []
    for part in summaries(model):
        origin = origins.get(part.where.removesuffix(".module"))
        name = code(part.class_name) + (f" ({plain(part.projection)})" if part.projection else "")
        base = (
            [repo_link(origin["repo_id"]), commit_link(origin["repo_id"], origin["revision"])] if origin else ["", ""]
        )
        rows.append([code(part.where), name, *base, f"{part.total:,}", training_of(part), part.dtypes])
    rows[-1][:2] = ["total", ""]
    return table(header, rows)


def training_of(part: PartSummary) -> str:
    """Which parameters of a part train, and the adapters in it."""
    size = "all" if part.trainable == part.total else f"{part.trainable:,}" if part.trainable else "frozen"
    return "; ".join([size, *(f"adapter {adapter_text(name, config)}" for name, config in part.adapters.items())])


def adapter_text(name: str, config: Any) -> str:
    """An adapter's name, type, rank and target modules."""
    found = [plain(getattr(config.peft_type, "value", config.peft_type))]
    if getattr(config, "r", None):
        found.append(f"r = {config.r}")
    for key, label in (("target_modules", "in"), ("modules_to_save", "whole")):
        value = getattr(config, key, None)
        names = [value] if isinstance(value, str) else sorted(value or [])
        if names:
            found.append(f"{label} {' '.join(map(code, names))}")
    return f"{code(name)} ({', '.join(found)})"


def tokens_table(model: Any) -> str:
    """The placeholder of each modality, and how many features stand in its place."""
    rows = []
    for name in model.config.encoders:
        entry = model.config.modality(name)
        count = features_per_item(model, name)
        count = UNKNOWN_COUNT if count.startswith(UNKNOWN_COUNT) else count  # the reason may quote a user's code
        taken = entry["output"] or f"layer {entry['layer']}"
        taken += f", without {entry['drop_prefix']} leading tokens" if entry["drop_prefix"] else ""
        token = code(entry["token"]) if entry["token"] else "none yet"
        rows.append([code(name), plain(entry["kind"]), token, str(entry["token_id"]), count, plain(taken)])
    return table(["modality", "kind", "token", "token id", "features per item", "taken from the encoder"], rows)


def usage(model: Any, processor: Any, repo_id: str, include_code: bool, references: Sequence[str]) -> str:
    """What must be installed, and code that runs as it is copied."""
    if include_code:
        lines = [
            "The repository holds the code of the model, which `trust_remote_code=True` runs: read it before you do."
        ]
    else:
        lines = [f"The first line makes transformers know models of this kind (`{INSTALL}`)."]
    if any(is_wrapped(part) for part in model._parts().values()):
        lines.append("Parts have adapters: `pip install peft`.")
    if references:
        lines.append(
            f"The weights of {', '.join(map(code, references))} are not in this repository: they are loaded from their own at "
            "the commits in the table."
        )
    if processor is None:
        lines.append(
            "This repository holds no processor: make one with `MultimodalProcessor(tokenizer, processors, model=model)`."
        )
    elif missing := unaskable(model, processor):
        lines.append(
            f"The example gives no {', '.join(map(code, missing))}: making one takes more than this card knows."
        )
    snippet = usage_snippet(model, processor, repo_id, include_code)
    return " ".join(lines) + f"\n\n```python\n{snippet}\n```"


def training(facts: Facts) -> str:
    """The facts of a run as a table."""
    return table(["what", "value"], [[plain(what), plain(value)] for what, value in facts])


def licenses_table(origins: Origins, found: Mapping[str, str | None]) -> str:
    """Each base with its parts and its licence."""
    parts: dict[str, list[str]] = {}
    for component, origin in origins.items():
        parts.setdefault(origin["repo_id"], []).append(component)
    rows = [
        [repo_link(repo), ", ".join(map(code, names)), plain(found.get(repo) or "unknown")]
        for repo, names in parts.items()
    ]
    return table(["base", "parts", "licence"], rows)
