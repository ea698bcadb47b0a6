"""What tests of training share: rows of mixed modalities and a Trainer with settings for them."""

import tiny
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainingArguments

from cornstarch_hf import MultimodalCollator


def rows(count=8):
    """Rows with an image, a sound, both, or none."""
    made = []
    for i in range(count):
        row = {"prompt": "a ", "completion": f" is {i}"}
        if i % 4 in (0, 2):
            row |= {"prompt": row["prompt"] + "<image> ", "images": [tiny.image(i)]}
        if i % 4 in (1, 2):
            row |= {"prompt": row["prompt"] + "<audio> ", "audio": [tiny.sound(i)]}
        made.append(row)
    return made


class Rows(TorchDataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def trainer(model, processor, folder, items=None, optimizers=(None, None), **options):
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
                    "report_to": "none", "save_strategy": "no", "seed": 1, "use_cpu": True, "remove_unused_columns": False,
                    "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant"}  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | options)),
        train_dataset=Rows(items or rows()),
        eval_dataset=Rows(rows(2)),
        data_collator=MultimodalCollator(processor),
        optimizers=optimizers,
    )


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]
