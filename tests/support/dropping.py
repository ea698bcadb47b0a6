"""Models that drop wherever their configuration lets them, and which of their layers run again.  A plain module, no tests."""

import re
from collections import Counter

from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

RATES = re.compile(r"drop|mask_(time|feature)_prob|jitter")
# By model type, rates that stay: one that is on in evaluation too, which the package refuses; one that transformers refuses.
LEFT = {"speecht5": "speech_decoder_prenet_dropout", "diffllama": "attention_dropout"}


def drop_everywhere(config: PreTrainedConfig, rate: float = 0.3) -> PreTrainedConfig:
    """Set each rate of dropout, of skipped layers and paths, of masks and of jitter in a configuration of one's own."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            drop_everywhere(value, rate)
        elif (
            RATES.search(name)
            and name != LEFT.get(config.model_type)
            and not isinstance(value, (bool, str, dict, list))
        ):
            setattr(config, name, 1 if type(value) is int else rate)  # some classes declare a whole number
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = True
    return config


class LayerRuns:
    """Counts how often the checkpointing layers of a model compute: their leaves' calls, by the layer's name."""

    def __init__(self, model):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
        self.calls: Counter = Counter()
        self.handles = [
            leaf.register_forward_pre_hook(lambda *_, name=name, key=key: self.calls.update([(name, key)]))
            for name, layer in layers.items()
            for key, leaf in layer.named_modules()
            if not list(leaf.children())
        ]

    def __enter__(self):
        self.calls.clear()
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def again(self, backward) -> set[str]:
        """The layers that compute while `backward` runs."""
        before = self.calls.copy()
        backward()
        return {name for name, _ in self.calls - before}
