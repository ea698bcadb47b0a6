"""Conversations to texts and to inputs, and chat templates to what a checkpoint holds: a composed processor's part of chats.

`conversations` takes the media out of messages, `rendering` runs the template, `assistant_turns` finds what the assistant
wrote.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from ..configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from .assistant_turns import assistant_spans
from .call import call_arguments, mapped
from .conversations import (
    PART_TYPES,
    ConversationReader,
    check_options,
    check_placed,
    chosen_template,
    control_tokens,
    is_batch,
    refuse_typed,
    sorted_keywords,
)
from .opening import local_allowed
from .placeholder_text import MarkedText
from .rendering import check_written, forms, render, told, writes_placeholder
from .template_sandbox import TemplateLimit, template_contents


class ChatTemplating(ProcessorMixin):
    """Applies chat templates, for a composed processor; and for the collator, which learns what the assistant wrote."""

    config: MultimodalConfig
    tokens: dict[str, str]
    processors: dict[Any, Any]

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, tools=None, documents=None,
        add_generation_prompt: bool = False, continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False, tokenize: bool = False, return_tensors=None,
        return_dict: bool = False, load_audio_from_video: bool = False, processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = False, local_media: bool | None = None, **kwargs: Any,
    ):  # fmt: skip
        """Turn a conversation, or a batch of them, into text or into inputs.

        A part's type is ``"text"``, a kind (``"image"``, ``"audio"``, ``"video"``) or a modality's name.  A placeholder
        that a user typed in a message, a tool or a document stays text when tokenized; where text is returned it is refused
        (ValueError).

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template, or the name of one; this processor's by default.
            tools, documents: for templates that read them; another one refuses them.
            continue_final_message: end where the last message's content ends, or its field of that name.
            return_assistant_tokens_mask: adds `assistant_masks`, 1 on tokens that the assistant wrote.
            load_audio_from_video: changes nothing, as in transformers where there is no sound to load: videos are frames here,
                and a video's sound is a part of its own.
            sanitize_control_tokens: the tokens that steer a chat stay text, too, where a user typed them.
            local_media: whether messages may name files of this machine, and addresses in its networks; by default
                `limits.LOCAL_MEDIA`.  Arguments of the call (``images=``) may in any case.
            tokenize, return_tensors, return_dict, add_generation_prompt: as in transformers.
            processor_kwargs: arguments of this processor's call.
            **kwargs: variables of the template; what it does not read are arguments of the call.

        Returns:
            text or a list of texts; with `tokenize` `input_ids`, or with `return_dict` a `BatchFeature`.

        Raises:
            ValueError: options that contradict one another, or that the template does not read; a message, role or tool call
                that it does not write.
            TypeError: something of a wrong type; an unknown argument.
        """
        tensors = None if return_tensors == "auto" else return_tensors
        options = {
            "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
            "return_assistant_tokens_mask": return_assistant_tokens_mask, "tokenize": tokenize, "return_tensors": tensors,
            "return_dict": return_dict, "load_audio_from_video": load_audio_from_video,
            "sanitize_control_tokens": sanitize_control_tokens,
        }  # fmt: skip
        check_options(options)
        template = chosen_template(self.chat_template, chat_template)
        kwargs |= {} if tensors is None else {"return_tensors": tensors}
        variables, call = sorted_keywords(template, kwargs, processor_kwargs or {}, tokenize)
        control = control_tokens(self.tokenizer, template) if sanitize_control_tokens else ()
        reader = self._reader(control, local_media)
        specials = self.tokenizer.special_tokens_map
        variables = reader.variables(template, specials, tools=tools, documents=documents, **variables)
        batched, read = is_batch(conversation), []
        for sample, one in enumerate(conversation if batched else [conversation]):
            with told(f"sample {sample}: " if batched else ""):
                read.append(self._chat_text(reader, one, template, variables, options))
        if not tokenize:
            return [text for text, *_ in read] if batched else read[0][0]
        out = self._chat_inputs(read, call)
        return out if return_dict else out["input_ids"]

    def _chat_text(
        self, reader: ConversationReader, conversation: Any, template: str, variables: dict[str, Any], options: dict
    ) -> tuple[str, Any, dict[str, list]]:
        """A conversation's text, the spans to mark in it (None where no mask is asked for) and its media."""
        messages, media = reader.read(conversation, template, variables=variables)
        variables = {**variables, "add_generation_prompt": options["add_generation_prompt"]}
        if options["return_assistant_tokens_mask"]:
            return *assistant_spans(messages, template, specials=self._specials(), **variables), media
        text, _ = render(messages, template, continue_final_message=options["continue_final_message"], **variables)
        check_written(messages, template, variables, text)
        return text if options["tokenize"] else refuse_typed(text), None, media

    def _chat_inputs(self, read: list[tuple[str, Any, dict[str, list]]], call: dict[str, Any]) -> BatchFeature:
        """What a call gives, of each conversation's text, spans and media, and of further arguments."""
        texts, spans, media = (list(column) for column in zip(*read, strict=True))
        check_placed(texts, self.tokens, self._kinds(), call)
        for name in self.config.encoders:
            if any(name in found for found in media):
                if call.get(name) is not None:
                    raise ValueError(f"{name}: its items were given twice, in the messages and by name.")
                call[name] = [found.get(name, []) for found in media]  # a list for each text
        llm = dict(mapped(call.pop("llm_inputs", None), "llm_inputs"))
        if "text" in llm:
            raise ValueError("llm_inputs has a text: in a chat that is the conversation's, leave it out.")
        # What the caller says of the tokens in front wins.
        llm |= {"text": [MarkedText(text) for text in texts], "default_options": self.bos_options(texts[0])}
        llm |= {} if spans[0] is None else {"assistant_spans": spans}
        return self(llm_inputs=llm, **call)

    def read_labelled(
        self,
        conversation,
        *,
        given=None,
        first: int = 0,
        chat_template: str | None = None,
        tools=None,
        local_media: bool | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]], dict[str, list]]:
        """A conversation's text, the spans of the assistant's turns in it, and its media, for the collator.

        Parts without an item take those `given` by modality; turns count from the message `first` on.  ValueError for variables
        of the template that are options of this processor's call.
        """
        template, reader = chosen_template(self.chat_template, chat_template), self._reader((), local_media)
        known = call_arguments(self.config, self.processors) if variables else ()
        calls = {key for key in variables if key in known or key.endswith("_kwargs")}
        if own := sorted(calls - template_contents(template)[0]):
            reason = "which are the processor's and no variables of a template"
            raise ValueError(
                f"chat_template_kwargs has {own}, {reason}: give them to the collator, in processor_kwargs=."
            )
        variables = reader.variables(template, self.tokenizer.special_tokens_map, tools=tools, **variables)
        messages, media = reader.read(conversation, template, given, variables)
        text, spans = assistant_spans(messages, template, first=first, specials=self._specials(), **variables)
        return MarkedText(text), spans, media

    def bos_options(self, text: str) -> dict[str, Any]:
        """The tokenizer's options for a text: one that begins with the bos token gets no second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _kinds(self) -> dict[str, str]:
        return {name: self.config.modality(name)["kind"] for name in self.tokens}

    def _reader(self, control: Sequence[str], local_media: bool | None) -> ConversationReader:
        allowed, ids = local_allowed(local_media), list(self.placeholder_ids.values())
        control = [*control, *self.tokenizer.convert_ids_to_tokens(ids)]  # which a native processor's texts do not have
        return ConversationReader(self.tokens, self.config.modalities_for, self._kinds(), control, allowed)

    def _specials(self) -> list[str]:
        return list(dict.fromkeys([*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()]))


# ---- templates in a checkpoint, for programs that render them without this processor.  What `conversations` does to messages
# before a template gets them stands in front of the template, in its own language.

_BEGIN = "{#- Media parts become placeholders, as MultimodalProcessor of cornstarch_hf makes them. #}"
_END = "{#- The chat template. #}\n"  # the newline goes with the comment, as behind every block
_IN_FRONT = """
{%- set composed_tokens = TOKENS %}
{%- set composed_forms = FORMS %}
{%- set composed = namespace(messages=[]) %}
{%- for message in messages %}
{%- set content = message['content'] %}
{%- set form = composed_forms[message['role'] if message['role'] in composed_forms else ''] %}
{%- if form['takes'] and content is defined and content is sequence and content is not string and content is not mapping %}
{%- set composed.text = '' %}
{%- set composed.parts = [] %}
{%- for part in content %}
{%- if part is string %}
{%- set part = {'type': 'text', 'text': part} %}
{%- endif %}
{%- set held = 'text' if part['text'] is defined else part.keys() | select('in', composed_tokens) | first %}
{%- set type = part['type'] if part['type'] is defined else held %}
{%- if type in composed_tokens %}
{%- set kept = {'type': form['writes'][type]} if type in form['writes'] %}
{%- set part = kept if type in form['writes'] else {'type': 'text', 'text': composed_tokens[type]} %}
{%- set composed.text = composed.text ~ composed_tokens[type] %}
{%- elif type == 'text' and part['text'] is string %}
{%- set composed.text = composed.text ~ part['text'] %}
{%- elif type == 'text' or type in MEDIA or form['takes'] != 'parts' %}
{%- set names = composed_tokens.keys() | join(', ') %}
{{- raise_exception('A part of the type ' ~ type ~ ' has no place here, expected text or one of ' ~ names ~ '.') }}
{%- endif %}
{%- set composed.parts = composed.parts + [part] %}
{%- endfor %}
{%- set content = composed.parts if form['takes'] == 'parts' else composed.text %}
{%- endif %}
{%- if content is string and form['wraps'] %}
{%- set content = [{'type': 'text', 'text': content}] %}
{%- endif %}
{%- set composed.messages = composed.messages + [message if content is not defined else dict(message, content=content)] %}
{%- endfor %}
{%- set messages = composed.messages %}
"""
_ROLES = ("user", "system", "assistant", "tool")
_OTHER = "cornstarchrole"  # a role that no template knows by name
# Roles that a template asks for, in comparisons and lists.
_ASKED = re.compile(r"""role['"\]]*\s*(?:[!=]=|(?:not\s+)?in\s*[\[(])\s*((?:['"][\w-]+['"][\s,]*)+)""")
# Parts of these types are nothing but an item, for which there is no encoder.
_MEDIA = [*MEDIA_KINDS, "image_url", "video_url", "audio_url", "input_audio"]


def with_media(template: str, tokens: Mapping[str, str], names_of: Callable, kinds: Mapping[str, str]) -> str:
    """A template that makes of messages with media parts what the processor makes of them.

    One that refuses every message of a user, writes none, or meets a bound, stays as it is; so does, in the others, what they
    refuse or leave out: a role, a type of part that is no item.

    Args:
        tokens, kinds: placeholder and kind of each modality.
        names_of: the modalities that a part's type means; ValueError if that is unclear.
    """
    types = {type: _names(type, names_of) for type in (*tokens, *kinds.values(), *PART_TYPES) if type != "text"}
    types = {type: names for type, names in types.items() if names}
    written = {type: "".join(tokens[name] for name in names) for type, names in types.items()}
    asked = [role for found in _ASKED.findall(template) for role in re.findall(r"[\w-]+", found)]
    try:
        if not forms(template, "user"):
            return template
        told = {role: _form(template, role, types, written, kinds) for role in dict.fromkeys([*_ROLES, *asked, _OTHER])}
    except TemplateLimit:
        return template
    values = {
        "TOKENS": written,
        "FORMS": {"" if role == _OTHER else role: form for role, form in told.items()},
        "MEDIA": _MEDIA,
    }
    front = re.sub("|".join(values), lambda name: json.dumps(values[name[0]], ensure_ascii=False), _IN_FRONT)
    return _BEGIN + front + _END + template


def _form(
    template: str, role: str, types: Mapping[str, list], written: Mapping[str, str], kinds: Mapping[str, str]
) -> dict:
    """What a template takes as the content of a role ("parts", "string", "" for unknown), and which media it writes itself."""
    known = forms(template, role) or frozenset()
    own = {type: PART_TYPES.get(type, type) for type, names in types.items() if len(names) == 1}
    writes = {
        type: kind
        for type, kind in own.items()
        if kinds[types[type][0]] == kind and writes_placeholder(template, role, kind, written[type])
    }
    takes = "parts" if "parts" in known else "string" if known else ""
    return {"takes": takes, "wraps": int(bool(known) and "string" not in known), "writes": writes}


def as_given(template: Any) -> Any:
    """A template, or named ones, as before `with_media`."""
    if isinstance(template, Mapping):
        return {name: as_given(one) for name, one in template.items()}
    if not isinstance(template, str) or not template.startswith(_BEGIN):
        return template
    # An editor may have other ends of lines; where somebody took the second comment out, all of it is theirs.
    _, found, rest = template.partition(_END.rstrip())
    return re.sub(r"\A\r?\n", "", rest) if found else template


def _names(type: str, names_of: Callable) -> list[str]:
    try:
        return names_of(PART_TYPES.get(type, type))
    except ValueError:  # no such modality, or several without a common item
        return []
