"""Turns conversations, messages with media parts, into messages for a chat template, and what was given for one into options.

Templates written for text alone get each message as one string; templates that know parts get parts, and place the
media themselves where they can; `rendering` tells which, for each role, and makes the text of the messages,
`assistant_turns` finds the assistant's turns in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Number
from typing import Any

from ..limits import check_switch
from .call import PLURALS, mapped
from .media import LIST_DEPTHS
from .opening import foreign
from .placeholder_text import BREAK, check_text, mark_typed, occurrences, token_pattern, unmark
from .rendering import forms, said, silent_content, told, tool_schemas, writes_placeholder
from .template_sandbox import template_contents

# Names that would not reach a template: this package's own arguments of what renders it.
RESERVED = frozenset(["messages", "template", "add_generation_prompt", "mark_assistant", "continue_final_message"])
RESERVED |= {"first", "specials"}
_NEEDS = {  # what an option is nothing without
    "return_assistant_tokens_mask": ("tokenize", "return_dict"),
    **dict.fromkeys(("return_dict", "return_tensors", "sanitize_control_tokens"), ("tokenize",)),
}
_CONTRARY = {"add_generation_prompt": "begins a new message", "return_assistant_tokens_mask": "tells whole turns"}
_NO_SWITCHES = ("return_tensors", "continue_final_message")  # options that are more than True or False
PART_TYPES = {"image_url": "image"}  # OpenAI's word for a kind
NO_ITEM = object()  # a part that tells where an item stands, but not which


@dataclass
class ConversationReader:
    """Takes the media out of conversations and makes messages for templates of the rest."""

    tokens: Mapping[str, str]  # placeholder token of each modality
    names_of: Callable[[str], list[str]]  # modalities that a part's type means, a name or a kind; ValueError if unclear
    kinds: Mapping[str, str]  # of the modalities
    control: Sequence[str] = ()  # further tokens that stay text where a user typed them
    local: bool = True  # whether messages may name files of this machine and addresses in its networks

    def read(
        self,
        conversation: Sequence[Mapping[str, Any]],
        template: str,
        given: Mapping[str, Sequence[Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[dict], dict[str, list]]:
        """Messages with typed placeholders marked, and each modality's media, `given` ones for parts without, in order.

        `variables`, as `variables` gives them, are what the template gets besides; some take no conversation without.
        """
        if not len(conversation):
            raise ValueError("The conversation is empty.")
        media: dict[str, list] = {name: [] for name in self.tokens}
        messages, known = [], _Template(template, variables)
        for index, message in enumerate(conversation):
            with told(f"message {index}: "):
                messages.append(self._message(message, known, media))
        for name, items in (given or {}).items():
            bare = sum(item is NO_ITEM for item in media[name])
            if bare != len(items):
                remedy = f"put a part {{'type': {name!r}}} (or of its kind) for each item where it belongs in 'content'"
                found = f"{len(items)} items were given for {bare} parts without one"
                raise ValueError(f"{name}: {found}: {remedy}; {self.tokens[name]} typed in a string is text.")
            rest = iter(items)
            media[name] = [next(rest) if item is NO_ITEM else item for item in media[name]]
        held = {name: [item for item in items if item is not NO_ITEM] for name, items in media.items()}
        return messages, {name: items for name, items in held.items() if items}

    def variables(self, template: str, specials: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """What a template gets besides messages, with typed placeholders marked; `specials` are the tokenizer's own tokens.

        Raises:
            ValueError: tools, documents or another variable that the template does not read, or that has a name in use.
        """
        if taken := sorted(RESERVED & set(given)):
            raise ValueError(f"{taken} cannot be variables of a chat template here: rename them in the template.")
        given["tools"] = tool_schemas(given.get("tools"))
        names, _ = template_contents(template)
        absent = {key for key, value in given.items() if value is None or (key in ("tools", "documents") and not value)}
        if unread := sorted(given.keys() - names - absent):
            raise ValueError(f"The chat template does not read {unread}: leave them out, or use a template that does.")
        return {**specials, **{key: self._marked(value) for key, value in given.items()}}

    def _message(self, message: Mapping[str, Any], template: "_Template", media: dict[str, list]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise TypeError(f"A message must be a dict with 'role' and 'content', got {type(message).__name__}.")
        if not isinstance(role := message.get("role"), str):
            raise ValueError(f"A message must have a string as its 'role', got {role!r:.100}.")
        marked = self._marked({k: v for k, v in message.items() if k != "content" and v is not None})
        content, calls = message.get("content"), message.get("tool_calls")
        if calls:
            check_calls(calls)
        if content is None:  # templates print a None, or ask whether a turn of tool calls says something
            given = {"content": None} if "content" in message else {}
            silent = silent_content(template.text, variables=template.variables) if calls else {}
            return marked | (given if silent is None else silent)
        if isinstance(content, str):
            return marked | {"content": said(template.text, role, self._marked(content), template.variables)}
        if isinstance(content, (Mapping, bytes)) or not isinstance(content, Sequence):
            kind = type(content).__name__
            raise TypeError(f"'content' must be a string or a list of parts, got {kind}: write it as text, or JSON.")
        parts = self._separated([self._part(part, template, role, media) for part in content])
        known = forms(template.text, role, variables=template.variables) or ()
        if "parts" in known:
            return marked | {"content": parts}
        joined = "".join(part["text"] for part in parts)
        return marked | {"content": said(template.text, role, joined, template.variables)}

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return mark_typed(check_text(value), self._kept)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    @property
    def _kept(self) -> list[str]:
        """Tokens that stay text where a user typed them."""
        return [*self.tokens.values(), *self.control]

    def _separated(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parts of which no texts, one behind the other, make a token of their ends: a mark stands in between."""
        texts = [unmark(part["text"]) if "text" in part else "\0" for part in parts]
        ends = list(accumulate(map(len, texts)))
        found = [match.span() for match in token_pattern(tuple(self._kept)).finditer("".join(texts))]
        crossed = [any(a < end < b for a, b in found) for end in ends]
        return [
            part | {"text": part["text"] + BREAK} if cut else part for part, cut in zip(parts, crossed, strict=True)
        ]

    def _part(self, part: Any, template: "_Template", role: str, media: dict[str, list]) -> dict[str, Any]:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or "type" not in part:
            raise TypeError(f"A content part must be a string or a dict with a 'type', got {part!r:.100}.")
        if part["type"] == "text":
            if not isinstance(text := part.get("text"), str):
                raise ValueError(f"A part of type 'text' must have a string as its 'text', got {text!r:.100}.")
            media_keys = {*self.kinds, *self.kinds.values(), "image_url"} - {"text"}
            if held := sorted(key for key in media_keys if not _is_gap(part.get(key))):
                raise ValueError(f"A part of type 'text' has an item as its {held}: give it a part of its own.")
            # A table fills keys of other parts in; templates ask for some of them.
            return {k: self._marked(v) for k, v in part.items() if k not in media_keys and v is not None}
        kind: Any = PART_TYPES.get(part["type"], part["type"])
        names = self.names_of(kind)
        item = _payload(part, [kind, *(self.kinds[name] for name in names)])
        for name in names:
            if isinstance(item, Number) and LIST_DEPTHS.get(self.kinds[name]) == 1:  # several would pass for one item
                raise TypeError(f"{name}, item {len(media[name])}: expected an item of a message, got {item!r}.")
            item = item if self.local or self.kinds[name] not in LIST_DEPTHS else foreign(item)
            media[name].append(NO_ITEM if item is None else item)
        # A part stays where the template itself writes this modality's placeholder; else its tokens stand as text.
        alone = names[0] if len(names) == 1 and self.kinds[names[0]] == kind else None
        asked = (template.text, role, kind, self.tokens[alone]) if alone else None
        if asked and writes_placeholder(*asked, variables=template.variables):
            return {"type": kind}
        # Encoders that share the item: a placeholder for each, one behind the other.
        return {"type": "text", "text": "".join(self.tokens[name] for name in names)}


@dataclass
class _Template:
    text: str
    variables: Mapping[str, Any] | None


def check_calls(calls: Any) -> None:
    """Refuse tool calls that are no list of dictionaries with the name of a function (ValueError)."""
    for call in calls if isinstance(calls, (list, tuple)) else [None]:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            wanted = "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
            raise ValueError(f"Each of 'tool_calls' must be like {wanted}, got {calls!r:.200}.")


def _is_gap(value: Any) -> bool:
    """Whether this is what a table has where nothing was: None, or a struct of such."""
    return value is None or (isinstance(value, Mapping) and all(v is None for v in value.values()))


def _payload(part: Mapping[str, Any], kinds: Sequence[str]) -> Any:
    """What a media part holds: under its type or kind, or as url, path or base64; None for a bare placeholder."""
    if part["type"] == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, Mapping) else value
    for key in (*kinds, "bytes", "url", "path", "base64", "data", "array"):
        value = part.get(key)
        if _is_gap(value):
            continue
        rates = {key: part[key] for key in ("sampling_rate", "fps") if part.get(key) is not None}
        return value if not rates or isinstance(value, (str, bytes, Mapping)) else {"array": value, **rates}
    return None


def refuse_typed(text: str) -> str:
    """A rendered text, or ValueError if a user typed a placeholder in it: a plain string could not tell it from a real one."""
    if unmark(text) != text:
        remedy = "use apply_chat_template(..., tokenize=True), which keeps it as text."
        raise ValueError(
            f"A message has a placeholder token as text, which a string cannot tell from a real one: {remedy}"
        )
    return text


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations, not one (TypeError if it is no list, ValueError if it is empty)."""
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        raise TypeError(f"A conversation must be a list of messages, got {type(conversation).__name__}.")
    if not len(conversation):
        raise ValueError("The conversation is empty.")
    return isinstance(conversation[0], (list, tuple))


def chosen_template(own: str | Mapping[str, str] | None, chosen: str | None) -> str:
    """The template that is given, the one of that name, or the processor's only or "default" one (ValueError if none)."""
    named = dict(own) if isinstance(own, Mapping) else {"default": own}
    template = named.get(chosen or "default", chosen)
    if template is None:
        raise ValueError(f"There is no default chat template, name one by chat_template=, of {sorted(named)}.")
    if "{{" not in template and "{%" not in template:  # it would write itself, whatever the messages say
        raise ValueError(f"chat_template: {template!r:.100} is no template, nor the name of one of {sorted(named)}.")
    return template


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `apply_chat_template` that contradict one another, or that nothing would be done with (ValueError).

    TypeError for a switch that is neither True nor False.
    """
    for name, value in options.items():
        if name not in _NO_SWITCHES:
            check_switch(value, name)
    for name, others in _NEEDS.items():
        if options[name] and not all(options[other] for other in others):
            needed = " and ".join(f"{other}=True" for other in others)
            raise ValueError(f"{name}={options[name]!r} needs {needed}.")
    if options["continue_final_message"]:
        for name, does in _CONTRARY.items():
            if options[name]:
                raise ValueError(f"continue_final_message leaves the last message open, {name} {does}: choose one.")


def sorted_keywords(
    template: str, keywords: Mapping[str, Any], call: Mapping[str, Any], tokenize: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of the template, and arguments of the processor's call: `call`, and the keywords that no template reads.

    Raises:
        ValueError: an argument of the call is given in both.
        TypeError: there are arguments of the call, and `tokenize` does not call it.
    """
    names, _ = template_contents(template)
    call = mapped(call, "processor_kwargs")
    others = {key: value for key, value in keywords.items() if key not in names}
    if twice := sorted(set(others) & set(call)):
        raise ValueError(f"{twice} were given twice, as keywords and in processor_kwargs.")
    if not tokenize and (unused := sorted({**others, **call})):
        raise TypeError(f"Unknown arguments {unused}: the chat template does not read them, and tokenize is not set.")
    return {key: value for key, value in keywords.items() if key in names}, {**others, **call}


def control_tokens(tokenizer: Any, template: str) -> list[str]:
    """Tokens that nobody but the template shall write, by the rule of transformers' `sanitize_control_tokens`."""
    chosen = getattr(tokenizer, "chat_control_tokens", None)
    written = template_contents(template)[1]
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (
            token.content in (written if chosen is None else chosen)
            and not (chosen is None and token.content.isspace())
        )
    ]


def check_placed(
    texts: Sequence[str], tokens: Mapping[str, str], kinds: Mapping[str, str], call: Mapping[str, Any]
) -> None:
    """Refuse items of a call beside a chat in which no message has a place for them (ValueError with the remedy)."""
    keys = {name: (name, PLURALS.get(kind, name)) for name, kind in kinds.items()}  # given by name or by kind
    for name in (name for name in kinds if any(call.get(key) is not None for key in keys[name])):
        if not any(occurrences(text, [tokens[name]])[tokens[name]] for text in texts):
            remedy = f"write a part {{'type': {name!r}}} (or of its kind) where each belongs in a message's 'content'"
            typed = f"; {tokens[name]} typed in a message is text"
            raise ValueError(f"{name}: items were given, but no message has a place for them: {remedy}{typed}.")
