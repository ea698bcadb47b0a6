"""Chat templates as a checkpoint holds them, for programs that render them without this package's processor.

What `conversations` does to messages before a template gets them stands in front of the template, in its own language: media
parts become placeholders, and parts strings where the template takes strings alone.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from .conversations import PART_TYPES
from .rendering import forms, writes_placeholder

_BEGIN = "{#- Media parts become placeholders, as MultimodalProcessor of cornstarch_hf makes them. #}"
_END = "{#- The chat template. #}\n"  # the newline goes with the comment, as behind every block
_IN_FRONT = """
{%- set tokens = TOKENS %}
{%- set kept = KEPT %}
{%- set joined = JOINED %}
{%- set wrapped = WRAPPED %}
{%- set given = namespace(messages=[]) %}
{%- for message in messages %}
{%- set content = message['content'] %}
{%- set role = message['role'] if message['role'] in kept else 'user' %}
{%- if content is defined and content is sequence and content is not string and content is not mapping %}
{%- set given.text, given.parts = '', [] %}
{%- for part in content %}
{%- set type = 'text' if part is string else part['type'] %}
{%- if type != 'text' and type not in tokens %}
{%- set names = tokens.keys() | join(', ') %}
{{- raise_exception('A part of the type ' ~ type ~ ' has no place here, expected text or one of ' ~ names ~ '.') }}
{%- endif %}
{%- set text = part if part is string else part['text'] if type == 'text' else tokens[type] %}
{%- set given.text = given.text ~ text %}
{%- if type in kept[role] %}
{%- set given.parts = given.parts + [{'type': kept[role][type]}] %}
{%- else %}
{%- set given.parts = given.parts + [{'type': 'text', 'text': text}] %}
{%- endif %}
{%- endfor %}
{%- set content = given.text if role in joined else given.parts %}
{%- endif %}
{%- if content is string and role in wrapped %}
{%- set content = [{'type': 'text', 'text': content}] %}
{%- endif %}
{%- set given.messages = given.messages + [message if content is not defined else dict(message, content=content)] %}
{%- endfor %}
{%- set messages = given.messages %}
"""
ROLES = ("user", "system", "assistant", "tool")  # others as the first


def with_media(template: str, tokens: Mapping[str, str], names_of: Callable, kinds: Mapping[str, str]) -> str:
    """A template that makes of messages with media parts what the processor makes of them.

    One that refuses every message of a user, or writes none, stays as it is.

    Args:
        tokens, kinds: placeholder and kind of each modality.
        names_of: the modalities that a part's type means; ValueError if that is unclear.
    """
    known = {role: forms(template, role) for role in ROLES}
    if not known["user"]:
        return template
    types = {type: _names(type, names_of) for type in (*tokens, *kinds.values(), *PART_TYPES) if type != "text"}
    types = {type: names for type, names in types.items() if names}
    written = {type: "".join(tokens[name] for name in names) for type, names in types.items()}
    kept = {
        role: {
            type: kind
            for type, names in types.items()
            for kind in [PART_TYPES.get(type, type)]
            if len(names) == 1 and kinds[names[0]] == kind and writes_placeholder(template, role, kind, written[type])
        }
        for role in ROLES
    }
    joined = [role for role in ROLES if "parts" not in (known[role] or known["user"])]
    wrapped = [role for role in ROLES if "string" not in (known[role] or known["user"])]
    front = _IN_FRONT
    for name, value in (("TOKENS", written), ("KEPT", kept), ("JOINED", joined), ("WRAPPED", wrapped)):
        front = front.replace(name, json.dumps(value, ensure_ascii=False))
    return _BEGIN + front + _END + template


def as_given(template: Any) -> Any:
    """A template, or named ones, as before `with_media`."""
    if isinstance(template, Mapping):
        return {name: as_given(one) for name, one in template.items()}
    return template.partition(_END)[2] if isinstance(template, str) and template.startswith(_BEGIN) else template


def _names(type: str, names_of: Callable) -> list[str]:
    try:
        return names_of(PART_TYPES.get(type, type))
    except ValueError:  # no such modality, or several without a common item
        return []
