"""Modules are built without weights and without touching anything that other threads see."""

import copy
import threading
import weakref

import pytest
import tiny
import torch
from process_state import process_state
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, LlavaConfig, PreTrainedConfig, PreTrainedModel, initialization

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from cornstarch_hf.checkpoints.storage import check_rebuildable
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.parts.weightless import (
    WithoutInitializers,
    build_without_weights,
    dry_run,
    is_building,
    parameters_to_meta,
    weights_to_meta,
    without_dtypes,
    without_weights,
)


class Tables(nn.Module):
    """Every way in which a constructor makes tensors."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.embedding = nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(4, 3, padding_idx=0)
        self.own, self.drawn = nn.Parameter(torch.ones(2)), nn.Parameter(torch.randn(2, 2))
        self.legacy, self.lstm = nn.Parameter(torch.Tensor(2, 3)), nn.LSTM(3, 4)
        nn.init.trunc_normal_(self.own)
        nn.init.orthogonal_(self.drawn)
        self.several = nn.ParameterList([torch.zeros(2), torch.ones(3)])
        self.tied = self.linear.weight
        table = torch.empty(4, 2)
        table[:, 0] = torch.arange(4) * 0.5
        table[:, 1] = torch.linspace(0, 1, 4)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("order", torch.randperm(5))
        self.noise = torch.rand(3)
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)]


def test_parameters_are_on_meta_and_tables_are_real_as_they_were():
    torch.manual_seed(0)
    expected = Tables()
    made = build_without_weights(Tables)
    assert all(p.is_meta for p in made.parameters()) and made.tied is made.linear.weight
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert all(type(p) is nn.Parameter and p.requires_grad for p in made.parameters())
    assert all(weight.is_meta for weight in made.lstm._flat_weights), "places that hold them already see it"
    assert torch.equal(made.table, expected.table) and made.rates == expected.rates
    assert not made.noise.is_meta and sorted(made.order.tolist()) == list(range(5))
    assert made.several[0].is_meta and not is_building()


def test_nothing_is_drawn_from_the_generator_of_the_process():
    state = torch.get_rng_state()
    build_without_weights(Tables)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tables_are_real_under_any_default_device(device):
    with torch.device(device):
        made = build_without_weights(Tables)
    assert not made.table.is_meta and not made.order.is_meta and made.linear.weight.is_meta


def test_builds_within_one_another_are_one(monkeypatch):
    def outer():
        inner = build_without_weights(Tables)
        assert is_building() and inner.linear.weight.is_meta
        return nn.Sequential(inner, nn.Linear(2, 2))

    made = build_without_weights(outer)
    assert made[1].weight.is_meta and not is_building()
    with pytest.raises(ZeroDivisionError):
        build_without_weights(lambda: 1 / 0)
    assert not is_building() and not nn.Linear(2, 2).weight.is_meta


def test_another_thread_builds_as_ever():
    made = []
    with without_weights():
        worker = threading.Thread(target=lambda: made.append(Tables()))
        worker.start()
        worker.join()
        mine = Tables()
    assert mine.linear.weight.is_meta and not any(p.is_meta for p in made[0].parameters())


def test_a_parameter_that_something_refers_to_weakly_goes_to_meta_at_the_end():
    kept = []

    def build():
        module = nn.Module()
        weight = nn.Parameter(torch.ones(2))
        kept.append(weakref.ref(weight))
        module.weight = module.again = weight
        return module

    made = build_without_weights(build)
    assert made.weight.is_meta and made.weight is made.again
    real = nn.Linear(2, 2)
    assert parameters_to_meta(real) is real and real.weight.is_meta


# ---- what others see meanwhile


class WatchingConfig(PreTrainedConfig):
    model_type = "watching"

    def __init__(self, hidden_size=8, initializer_range=0.5, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.initializer_range = hidden_size, initializer_range


SEEN = []


class Watching(PreTrainedModel):
    """Looks at the state of the process at each step of its life, and draws random numbers."""

    config_class, main_input_name = WatchingConfig, "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        SEEN.append(("built", process_state()))
        self.linear = nn.Linear(4, config.hidden_size)
        self.norm = nn.BatchNorm1d(config.hidden_size)
        self.register_buffer("filled", torch.empty(3), persistent=False)
        torch.rand(2)
        self.post_init()

    def _init_weights(self, module):
        SEEN.append(("initialised", process_state()))
        super()._init_weights(module)
        if module is self:
            module.filled.copy_(torch.arange(3))

    def forward(self, pixel_values):
        SEEN.append(("run", process_state()))
        noise = torch.nn.functional.dropout(torch.rand(4), training=True) + torch.bernoulli(torch.ones(4))
        return (self.linear(pixel_values.flatten(1).unflatten(1, (-1, 4)) + noise),)


AutoModel.register(WatchingConfig, Watching)


@pytest.fixture
def watched():
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(Watching(WatchingConfig()), kind="image")}, language_model=tiny.llama()
    )
    SEEN.clear()
    return model


def only_sees(before, *steps):
    assert {step for step, _ in SEEN} >= set(steps)
    changed = {(step, key) for step, state in SEEN for key in state if state[key] != before[key]}
    assert not changed


def test_counting_changes_nothing_for_a_moment(watched):
    before, random = process_state(), torch.get_rng_state()
    assert FeatureCounter(watched.config).count("vision", {"pixel_values": torch.zeros(1, 3, 4, 4)}) == 12
    only_sees(before, "built", "initialised", "run")
    assert torch.equal(random, torch.get_rng_state())


def test_saving_and_composing_change_nothing_for_a_moment(watched, tmp_path):
    before, random = process_state(), torch.get_rng_state()
    check_rebuildable(watched)
    watched.save_pretrained(tmp_path)
    MultimodalProcessor(tiny.tokenizer(), model=watched).save_pretrained(tmp_path)
    only_sees(before, "built")
    assert torch.equal(random, torch.get_rng_state())
    SEEN.clear()
    parts = {"vision": ModalEncoderModule(watched.vision_encoder.module, kind="image")}
    MultimodalModel(encoders=parts, language_model=tiny.llama())
    only_sees(before, "built")


def test_loading_and_counting_in_threads_is_seen_by_nobody(watched):
    before, counted = process_state(), []

    def count():
        counted.append(FeatureCounter(watched.config).count("vision", {"pixel_values": torch.zeros(1, 3, 4, 4)}))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == [12] * 8
    only_sees(before, "built", "run")
    assert process_state() == before


def test_buffers_hold_what_the_class_fills_them_with(watched):
    made = build_without_weights(lambda: Watching(WatchingConfig()))
    assert made.filled.tolist() == [0, 1, 2] and made.norm.running_var.tolist() == [1] * 8
    assert made.linear.weight.is_meta


def test_parts_of_parts_do_not_change_the_default_dtype(monkeypatch):
    config = LlavaConfig(vision_config=tiny.clip().config, dtype=torch.bfloat16)
    config.vision_config.dtype = "bfloat16"
    bare = without_dtypes(copy.deepcopy(config))
    assert bare.dtype is None and bare.vision_config.dtype is None and config.vision_config.dtype == "bfloat16"
    asked = []
    monkeypatch.setattr(torch, "set_default_dtype", asked.append)
    made = build_without_weights(lambda: AutoModel.from_config(bare.vision_config))
    assert not asked and made.dtype == torch.float32


def test_shapes_are_run_in_one_dtype():
    made = weights_to_meta(nn.Sequential(nn.Linear(2, 3).bfloat16(), nn.Linear(3, 4)))
    assert dry_run(made, {"input": torch.zeros(5, 2)}).shape == (5, 4)


# ---- initialisers


def drawn(device):
    """All of `torch.nn.init` on tensors of a device, with the state of random numbers afterwards."""
    torch.manual_seed(0)
    made = [nn.Linear(3, 4, device=device), nn.Conv1d(2, 2, 2, device=device), nn.Embedding(3, 2, device=device)]
    made.append(nn.MultiheadAttention(4, 2, device=device))
    for fill in (nn.init.xavier_normal_, nn.init.orthogonal_, nn.init.trunc_normal_):
        made.append(nn.Linear(4, 4, device=device))
        fill(tensor=made[-1].weight)
    return [p for module in made for p in module.parameters()], torch.get_rng_state()


def test_initializers_pass_over_the_meta_device_alone():
    expected, state = drawn("cpu")
    with WithoutInitializers():
        got, after = drawn("cpu")
    assert all(map(torch.equal, got, expected)) and torch.equal(after, state)
    with WithoutInitializers():
        got, after = drawn("meta")
    assert [(p.shape, p.is_meta) for p in got] == [(p.shape, True) for p in expected]
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state())
    called = []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Counted(), WithoutInitializers():
        nn.Sequential(
            nn.Linear(3, 4, device="meta"), nn.Conv1d(2, 2, 2, device="meta"), nn.Embedding(3, 2, device="meta")
        )
        with initialization.guard_torch_init_functions():
            initialization.normal_(torch.empty(2, 2, device="meta"))
    assert "empty" in called and not {"kaiming_uniform_", "uniform_", "normal_"} & set(called)
