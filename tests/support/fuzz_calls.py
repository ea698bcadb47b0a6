"""Random calls of a processor: texts and items of several samples, in random forms, nestings, roads and options.

A plain module, no tests.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_forms import FORMS, LAYOUTS, RATE
from fuzz_parts import Composed, composed
from PIL import Image

from cornstarch_hf.processing.call import PLURALS, flat_options

SAME = 10  # seeds in a row with one composition
WORDS = [
    "what is", "the quick brown fox", "\n", "\t", " ", "  two  spaces ", "日本語", "עברית", "e\u0301", "👩‍👩‍👧‍👦", "<", ">", "<img>",
    "<s>", "{{ x }}", "{% endfor %}", "\u200b", "\ufeff", "\ue000", "\U000f0000", "\U000f0003", "\U0010fffd",
    "\x00", "None", "a\r\nb", "</s", "&lt;", "\\n", "'quoted'", '"text"', "\ue0c0", "\ue0c1", "\ue0c2", "\ue0c0typed\ue0c1",
]  # fmt: skip
OPTIONS = [{"do_normalize": False}, {"do_convert_rgb": True}, {"resample": 3}, {"do_rescale": True}]
FLAGS = [
    *OPTIONS,
    *({key: False} for key in ("do_rescale", "do_resize", "do_center_crop", "do_pad")),
    {"do_resize": True},
]
FLAGS += [{"do_resize": False, "do_center_crop": False}]
Segment = str | tuple[str, int]  # text, or a slot and the number of its item in the sample
Items = Mapping[str, Sequence[Sequence[Any]]]  # of each sample, by slot


@dataclass
class Turn:
    """A message of a conversation: its role, its segments, and whether its content is one string."""

    role: str
    segments: list[Segment]
    plain: bool = False


@dataclass
class Wrong:
    """What is wrong with a call, and who must be named for it."""

    what: str
    name: str | None = None  # modality
    sample: int | None = None
    item: int | None = None  # among all of the call
    words: str = ""  # of the message


@dataclass
class Call:
    """A call of a processor, or of its chat template.

    Attributes:
        slots: modalities by slot, of which each has the same items.
        samples: of each text its segments.
        turns: the same as conversations, None where the processor is called with texts.
        canonical, forms: items of each sample by slot, as `fuzz_parts` makes them and as they are handed over.
        options: of the tokenizer and the chat template; `media_options` of modalities; `flat` of all that take it, given by
            its name to the call and in ``{name}_kwargs`` to each sample alone.
        wrong: what must be refused, None for a call that must be done or be refused for a stated reason.
        change: makes the wrong keywords of the right ones.
    """

    seed: int
    world: Composed
    chance: random.Random
    slots: dict[str, list[str]]
    samples: list[list[Segment]] = field(default_factory=list)
    turns: list[list[Turn]] | None = None
    canonical: dict[str, list[list[Any]]] = field(default_factory=dict)
    forms: dict[str, list[list[Any]]] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    media_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    flat: dict[str, Any] = field(default_factory=dict)
    wrong: Wrong | None = None
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def kind(self, slot: str) -> str:
        return self.world.parts[self.slots[slot][0]].kind

    def alone_of_kind(self, slot: str) -> bool:
        """Whether the kind's own keyword means all of a slot's modalities, and no other."""
        kind, names = self.kind(slot), self.slots[slot]
        if kind in names and len(names) > 1:
            return False  # a modality's name comes first
        return kind in PLURALS and all(part.kind != kind or name in names for name, part in self.world.parts.items())

    def written(self, segment: Segment) -> str:
        """A segment as text: a placeholder of each modality of a slot where an item stands."""
        if isinstance(segment, str):
            return segment
        return "".join(self.world.processor.tokens[name] for name in self.slots[segment[0]])

    # ---- keywords

    def given(self) -> tuple[Callable, dict[str, Any]]:
        """What is called, and with which keywords."""
        if self.turns is not None:
            conversations: Any = [self._conversation(i, self.forms) for i in range(len(self.turns))]
            conversations = (
                conversations[0] if len(conversations) == 1 and self.chance.random() < 0.5 else conversations
            )
            called, keywords = self._chat(conversations, flat=True)
            return called, keywords if self.change is None else self.change(keywords)
        texts: Any = ["".join(map(self.written, sample)) for sample in self.samples]
        texts = texts[0] if len(texts) == 1 and self.chance.random() < 0.5 else texts
        texts = tuple(texts) if isinstance(texts, list) and self.chance.random() < 0.1 else texts
        where = {"llm_inputs": {"text": texts}} if self.chance.random() < 0.1 else {"text": texts}
        keywords = {**where, **self._media(self.forms, flat=True), **self._common(flat=True), **self.options}
        return self.world.processor, keywords if self.change is None else self.change(keywords)

    def alone(self, sample: int) -> tuple[Callable, dict[str, Any]]:
        """The same of one sample, its items in their canonical form."""
        if self.turns is not None:
            return self._chat([self._conversation(sample, self.canonical)])
        items = {slot: [rows[sample]] for slot, rows in self.canonical.items()}
        text = ["".join(map(self.written, self.samples[sample]))]
        return self.world.processor, {"text": text, **self._media(items), **self._common(), **self.options}

    def _common(self, flat: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.flat) if flat else {}
        for name, part in self.world.parts.items():  # what a processor of the catalogue must be told
            options = dict(part.call.get("audio_kwargs", part.call)) | self.media_options.get(name, {})
            taken = flat_options(self.world.processor.processors[name], part.kind)
            options |= {} if flat else {key: value for key, value in self.flat.items() if key in taken}
            if options:
                found[f"{name}_kwargs"] = options
        audio = any(part.kind == "audio" and part.form is None for part in self.world.parts.values())
        return found | ({"sampling_rate": RATE} if audio else {})

    def _media(self, items: Items, flat: bool = False) -> dict[str, Any]:
        """Keywords for items: a list per sample by name, or in any nesting and by any keyword."""
        found: dict[str, Any] = {}
        for slot, names in self.slots.items():
            given: Any = [list(sample) for sample in items[slot]]
            given = self._nested(given) if flat else given
            roads = ["name", "inputs", *(["kind"] if self.alone_of_kind(slot) else [])]
            road = self.chance.choice(roads) if flat else "name"
            if given is None:
                continue
            if road == "kind":
                found[PLURALS[self.kind(slot)]] = given
            elif road == "inputs":
                key = {"image": "images", "video": "videos"}.get(self.kind(slot), "items")
                found.setdefault("encoder_inputs", {}).update({name: {key: given} for name in names})
            else:
                found |= dict.fromkeys(names, given)
        return found

    def _nested(self, samples: list[list[Any]]) -> Any:
        """Items in one of the nestings that mean the same."""
        flat = [item for sample in samples for item in sample]
        forms: list[Any] = [samples, tuple(map(tuple, samples))]
        if flat and not any(isinstance(item, (list, tuple)) for item in flat):
            forms += [flat, [sample or None for sample in samples]]
            if len(samples) == 1 and len(flat) == 1:
                forms += [flat[0], flat[0], tuple(flat)]
        if not flat:
            forms += [None, [None] * len(samples)]
        return self.chance.choice(forms)

    # ---- conversations

    def _chat(self, conversation: Any, flat: bool = False) -> tuple[Callable, dict[str, Any]]:
        keywords = {
            "tokenize": True,
            "return_dict": True,
            **self.options,
            **self._common(flat),
            "conversation": conversation,
        }
        return self.world.processor.apply_chat_template, keywords

    def _conversation(self, sample: int, items: Items) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for turn in self.turns[sample] if self.turns else ():
            if turn.plain:
                content: Any = "".join(map(self.written, turn.segments))
            else:
                content = [part for segment in turn.segments for part in self._parts(segment, sample, items)]
            messages.append({"role": turn.role, "content": content})
        return messages

    def _parts(self, segment: Segment, sample: int, items: Items) -> list[dict[str, Any]]:
        if isinstance(segment, str):
            return [{"type": "text", "text": segment}]
        slot, number = segment
        item, kind = items[slot][sample][number], self.kind(slot)
        if self.alone_of_kind(slot):
            return [{"type": kind, kind: item}]
        return [{"type": name, name: item} for name in self.slots[slot]]

    def describe(self) -> str:
        turns = self.turns and [[(t.role, t.plain, t.segments) for t in turns] for turns in self.turns]
        return (
            f"seed {self.seed}: {self.world.keys}, template {self.world.template!r}, samples {self.samples!r}, turns {turns!r}, "
            f"forms {self.said}, options {self.options} {self.media_options} {self.flat}, wrong {self.wrong}"
        )


def slots_of(world: Composed) -> dict[str, list[str]]:
    """Modalities by slot: those that share their items in one."""
    groups = world.model.config.share_inputs or []
    grouped = {name for group in groups for name in group}
    return {group[0]: list(group) for group in groups} | {n: [n] for n in world.parts if n not in grouped}


def made_call(seed: int, folder: Path) -> Call:
    """The call of a seed; files lie in a folder."""
    world, chance = composed(seed // SAME), random.Random(f"call {seed}")
    call = Call(seed, world, chance, slots_of(world))
    degenerate, count = chance.random() < 0.15, chance.choice([1, 1, 2, 3])
    for rows in (call.canonical, call.forms):
        rows.update({slot: [[] for _ in range(count)] for slot in call.slots})
    call.options = _options(chance)
    _add_media_options(call)
    for sample in range(count):
        call.samples.append(_sample(call, sample, folder, degenerate))
    if chance.random() < 0.35:
        call.turns = [_turns(chance, world, sample) for sample in call.samples]
        call.options |= {key: True for key in ("add_generation_prompt",) if chance.random() < 0.4}
    return call


def _add_media_options(call: Call) -> None:
    """Options of images' processors, by modality, or by their names to all that take them."""
    chance, processors = call.chance, call.world.processor.processors
    for slot, names in call.slots.items():
        if call.kind(slot) != "image" or any(call.world.parts[n].call for n in names):
            continue
        if chance.random() < 0.2:
            call.media_options |= dict.fromkeys(names, chance.choice(OPTIONS))
        if chance.random() < 0.15 and all("input_data_format" in flat_options(processors[n], "image") for n in names):
            stated = {"input_data_format": chance.choice(list(LAYOUTS))}
            call.media_options |= {name: call.media_options.get(name, {}) | stated for name in names}
    taken = [flat_options(processors[name], part.kind) for name, part in call.world.parts.items()]
    flags = [flag for flag in FLAGS if any(set(flag) <= names for names in taken)]
    if (
        flags
        and not call.media_options
        and not any(part.call for part in call.world.parts.values())
        and chance.random() < 0.2
    ):
        call.flat = chance.choice(flags)


def _sample(call: Call, sample: int, folder: Path, degenerate: bool) -> list[Segment]:
    chance, slots = call.chance, []
    for slot, names in call.slots.items():
        part = call.world.parts[names[0]]
        for _ in range(chance.choice([0, 1, 1, 2])):
            item = part.item(chance, degenerate and chance.random() < 0.6)
            layout = call.media_options.get(names[0], {}).get("input_data_format")
            name, form = FORMS[part.form or part.kind](item, chance, folder, *([layout] if layout else []))
            # An image of few pixels is no array that tells where its channels stand.
            call.canonical[slot][sample].append(Image.fromarray(item) if part.kind == "image" else item)
            call.forms[slot][sample].append(form)
            call.said.setdefault(slot, []).append(name)
            slots.append(slot)
    chance.shuffle(slots)
    found: list[Segment] = []
    for position, slot in enumerate(slots):  # items of a slot stay in order
        found += chance.choices(WORDS, k=chance.choice([0, 0, 1, 2]))
        found.append((slot, slots[:position].count(slot)))
    return found + chance.choices(WORDS, k=chance.choice([0, 1, 3] if found else [1, 2]))


def _turns(chance: random.Random, world: Composed, segments: list[Segment]) -> list[Turn]:
    """A conversation with the segments in the user's turns; there are placeholders among the words of all roles."""
    words = [*WORDS, *world.processor.tokens.values(), "<image>", "<audio>"]

    def said(role: str) -> Turn:
        return Turn(role, list(chance.choices(words, k=chance.choice([1, 1, 2]))), chance.random() < 0.5)

    cut = chance.randrange(len(segments) + 1)
    halves = [half for half in (segments[:cut], segments[cut:]) if half]
    turns = [said("system")] if chance.random() < 0.3 else []
    for half in halves:
        half = half + chance.choices(words, k=chance.choice([0, 0, 1]))
        plain = all(isinstance(s, str) for s in half) and chance.random() < 0.5
        turns += [Turn("user", half, plain)] + (
            [said(chance.choice(["assistant", "tool"]))] if chance.random() < 0.5 else []
        )
    return turns


def _options(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "return_tensors": chance.choice(["pt"] * 6 + ["np"]),
        "padding": chance.choice([True, "longest"]),
    }
    draw = chance.random()
    if draw < 0.15:
        options |= {"padding": "max_length", "max_length": chance.choice([300, 600])}
    elif draw < 0.3:
        options |= {"pad_to_multiple_of": chance.choice([8, 64])}
    elif draw < 0.4:
        options |= {"truncation": True, "max_length": chance.choice([1, 3, 8, 30, 400])}
    if chance.random() < 0.2:
        options["padding_side"] = chance.choice(["left", "right"])
    if chance.random() < 0.2:
        options["add_special_tokens"] = False
    if chance.random() < 0.1:
        options["return_token_type_ids"] = True
    return options
