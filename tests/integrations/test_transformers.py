"""The Transformers callback, in Hugging Face's own Trainer; and bias-only fine-tuning."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import wus_ext
from wus_ext.nn import is_bias

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from wus_ext.integrations import _decisions  # noqa: E402
from wus_ext.integrations.transformers import WeightUpdateSkipping  # noqa: E402

FLAT = [0.1, 0.5, 0.502, 0.504, 0.503, 0.505, 0.6, 0.601]
EXPECTED = [False, False, False, True, True, False, True, False]
SETTINGS = {"threshold": 1.0, "patience": 1, "max_window": 2, "warmup": 1}


class Texts(torch.utils.data.Dataset):
    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 40, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": int(self.tokens[index].sum() % 2)}


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return transformers.BertForSequenceClassification(config)


class Watch(transformers.TrainerCallback):
    """Notes between evaluations which parameters moved."""

    def __init__(self) -> None:
        self.trained: list[set[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def note(self, model) -> None:
        if self.before:
            self.trained.append(
                {n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])}
            )
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_begin(self, *args, model, **kwargs):
        self.note(model)

    def on_epoch_end(self, *args, model, **kwargs):
        self.note(model)

    def skipped(self) -> list[bool]:
        return [all(map(is_bias, names)) for names in self.trained]


def trainer(folder, callback, *, model=None, accuracies=FLAT, epochs=8, **options):
    """A Trainer whose n-th evaluation gives the n-th accuracy."""
    evaluations = iter(accuracies)
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
    } | options
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **settings,
    )
    watch = Watch()
    made = transformers.Trainer(
        model=bert() if model is None else model,
        args=arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        compute_metrics=lambda _: {"accuracy": next(evaluations)},
        callbacks=[watch, *([] if callback is None else [callback])],
    )
    made.remove_callback(transformers.PrinterCallback)
    made.watch = watch
    return made


@pytest.mark.parametrize("monitor", ["accuracy", "eval_accuracy"])
def test_epochs_after_a_flat_accuracy_skip(monitor, tmp_path):
    callback = WeightUpdateSkipping(monitor, **SETTINGS)
    made = trainer(tmp_path, callback)
    made.train()
    assert made.watch.skipped() == EXPECTED
    assert not wus_ext.is_skipping(made.model)
    assert isinstance(made.model, transformers.BertForSequenceClassification)


def test_an_evaluation_after_training_changes_nothing(tmp_path):
    callback = WeightUpdateSkipping(**SETTINGS)
    made = trainer(tmp_path, callback, accuracies=[*FLAT, 0.9])
    made.train()
    state = callback.state()
    made.evaluate()
    assert callback.state() == state


@pytest.mark.parametrize("lr_drop", [0.5, None])
def test_a_drop_of_the_learning_rate_reopens(lr_drop, tmp_path):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.1)  # two steps an epoch
    callback = WeightUpdateSkipping(lr_drop=lr_drop, **(SETTINGS | {"max_window": 9}))
    made = trainer(tmp_path, callback, model=model, accuracies=[0.5] * 6, epochs=6)
    made.optimizer, made.lr_scheduler = optimizer, schedule
    made.train()
    assert made.watch.skipped() == [False, False, True, lr_drop is None, True, True]
    assert schedule.last_epoch == 12


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumed_training_decides_alike(stop, tmp_path):
    options = {
        "save_strategy": "epoch",
        "restore_callback_states_from_checkpoint": True,
        "lr_scheduler_type": "linear",
    }
    whole = trainer(tmp_path, WeightUpdateSkipping(**SETTINGS), **options)
    whole.train()
    rest = trainer(tmp_path, WeightUpdateSkipping(**SETTINGS), accuracies=FLAT[stop:], **options)
    path = tmp_path / f"checkpoint-{2 * stop}"
    saved = json.loads((path / "trainer_state.json").read_text())["stateful_callbacks"]
    recorded = saved["WeightUpdateSkipping"]["attributes"]["saved_decisions"]["recorded"]
    assert recorded == pytest.approx(100 * FLAT[stop - 1])
    rest.train(resume_from_checkpoint=str(path))
    assert rest.watch.skipped() == whole.watch.skipped()[stop:]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(rest.model.get_parameter(name), parameter), name


def test_resuming_without_the_state_warns(tmp_path):
    trainer(tmp_path, WeightUpdateSkipping(), epochs=1, save_strategy="epoch").train()
    rest = trainer(tmp_path, WeightUpdateSkipping(), epochs=2)
    with pytest.warns(UserWarning, match="restore_callback_states_from_checkpoint=True"):
        rest.train(resume_from_checkpoint=True)


def test_autocast(tmp_path):
    made = trainer(tmp_path, WeightUpdateSkipping(**SETTINGS), bf16=True)
    made.train()
    assert made.watch.skipped() == EXPECTED


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="threshold must be"):
        WeightUpdateSkipping(threshold=-1.0)
    with pytest.raises(ValueError, match="set eval_strategy='epoch'"):
        trainer(tmp_path, WeightUpdateSkipping(), eval_strategy="no").train()
    with pytest.raises(ValueError, match=r"evaluation gave no 'eval_f1'; there are .*accuracy"):
        trainer(tmp_path, WeightUpdateSkipping("f1")).train()
    with pytest.raises(ValueError, match="got 50, expected an accuracy, a fraction"):
        trainer(tmp_path, WeightUpdateSkipping(), accuracies=[50.0]).train()


def test_bias_only_fine_tuning_equals_stocks(tmp_path):
    """BitFit in two lines, against requires_grad: the same biases after training with clipping."""
    model, stock = bert(), bert()
    wus_ext.convert(model)
    wus_ext.set_skip(model, True)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(is_bias(name))
    losses = []
    for made in (model, stock):
        options = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
        run = trainer(tmp_path, None, model=made, epochs=2, eval_strategy="no", **options)
        losses.append(run.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before = bert().state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_bias(name), name
        torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_saved_models_load_in_stock(tmp_path):
    model = wus_ext.convert(bert())
    model.save_pretrained(tmp_path)
    stock = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(stock) is transformers.BertForSequenceClassification
    for name, tensor in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name


def test_settings_of_convert_and_layers_survive_a_checkpoint(tmp_path, monkeypatch):
    """The Trainer makes a restored callback anew, from JSON."""
    given = []
    original = _decisions.convert

    def convert(module, **settings):
        given.append(settings)
        return original(module, **settings)

    monkeypatch.setattr(_decisions, "convert", convert)
    options = {"save_strategy": "epoch", "restore_callback_states_from_checkpoint": True}
    settings = {"layers": "bert", "full": "fused", "norm": "frozen", "algo": "direct"}

    def callback():
        return WeightUpdateSkipping(**settings, **SETTINGS)

    whole = trainer(tmp_path, callback(), **options)
    whole.train()
    assert given == [{"full": "fused", "norm": "frozen", "algo": "direct"}]
    for trained, skipped in zip(whole.watch.trained, EXPECTED, strict=True):
        assert "classifier.weight" in trained
        assert ("bert.pooler.dense.weight" in trained) is not skipped
    rest = trainer(tmp_path, callback(), accuracies=FLAT[4:], **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert rest.watch.trained == whole.watch.trained[4:]
    with pytest.raises(TypeError, match="layers: expected a name pattern"):
        WeightUpdateSkipping(layers=lambda name, module: True)
