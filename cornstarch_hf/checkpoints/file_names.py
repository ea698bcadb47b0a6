"""Names of the files of a checkpoint, and of the options that say where files come from and where a push goes to."""

import re

CONFIG, GENERATION, PROCESSOR = "config.json", "generation_config.json", "processor_config.json"
ADAPTERS = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPOSITION, DELTA = "composition.json", "composition.safetensors"
TEMPLATES = frozenset(["chat_template.jinja", "chat_template.json"])  # an old one would be read beside a new tokenizer
# JSON files that a load may read, looked at before.
DESCRIPTIONS = (CONFIG, GENERATION, PROCESSOR, "preprocessor_config.json", "tokenizer_config.json", ADAPTERS)
SHARD_OF_MODEL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ANY_WEIGHTS = re.compile(r".*\.safetensors(\.index(\.\w+)?\.json)?")
# Of `from_pretrained`: where on the Hub files lie, and where in a repository or a folder.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
PLACES = (*HUB_OPTIONS, "subfolder")
# What `save_pretrained` takes for a push, as in transformers.
HUB_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")


def weights_pattern(variant: str | None = None) -> re.Pattern:
    """Names of the weight files of a model."""
    part = f"\\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def of_variant(name: str, variant: str | None) -> str:
    """The name of a weight file, or of an index of shards, of a variant.

    Raises:
        ValueError: the variant is no plain word.
    """
    if variant is None:
        return name
    if not variant.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"variant must be a plain word, got {variant!r}.")
    stem, _, rest = name.partition(".safetensors")
    return f"{stem}.safetensors.index.{variant}.json" if "index" in rest else f"{stem}.{variant}.safetensors"
