"""python saving_again.py FOLDER: saves two models of other sizes into a folder in turn, processors too, until a file `stop`
lies beside it.  `models()` gives both, the same in every process."""

import sys
from pathlib import Path

import tiny
from helpers import compose_tiny


def models():
    """``{name: (model, processor)}``: other weights, and another number of layers and another placeholder's text."""
    made = {"one": compose_tiny(["clip"]), "other": compose_tiny(["clip"], tiny.llama(num_hidden_layers=3))}
    made["other"][1].tokenizer.model_max_length = 777
    return made


def main():
    folder, saves = Path(sys.argv[1]), 0
    pairs = models()
    while not (folder.parent / "stop").exists():
        for model, processor in pairs.values():
            model.save_pretrained(folder, max_shard_size="60KB")
            processor.save_pretrained(folder)
            saves += 1
    print(saves)


if __name__ == "__main__":
    main()
