"""BitFit (arXiv 2106.10199): a small BERT that reads digits learns new ones by its biases.

    python examples/bitfit.py [--stock]

A digit is a text of 64 words, its pixels in 17 shades. For an encoder stock's own way, frozen
parameters, is as fast: what wus_ext adds is the switch (docs/recipes.md).
"""

import time

import torch
from options import options
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification

import wus_ext


def texts():
    """Words (1797, 64) and what they mean (1797,)."""
    bunch = load_digits()
    return torch.from_numpy(bunch.data).long(), torch.from_numpy(bunch.target)


def reader(width: int = 64) -> BertForSequenceClassification:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    config = BertConfig(vocab_size=17, num_hidden_layers=2, num_labels=5, **sizes)
    return BertForSequenceClassification(config)


def train(model, words, labels, steps: int, lr: float) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(0, len(words), (32,))
        loss = model(input_ids=words[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def biases_only(model, stock: bool):
    """Biases train, and the classifier, whose classes are new."""
    if stock:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bias" in name or name.startswith("classifier"))
    else:
        wus_ext.convert(model)
        wus_ext.set_skip(model, True)
        wus_ext.set_skip(model, False, layers="classifier")


def main(arguments=None) -> None:
    given = options(__doc__, arguments, steps=250, stock=False)

    torch.manual_seed(0)
    words, labels = texts()
    model = reader()
    train(model, words[labels < 5], labels[labels < 5], given.steps, lr=1e-3)
    biases_only(model, given.stock)
    model.classifier.reset_parameters()
    new, digits = words[labels > 4], labels[labels > 4] - 5
    start = time.perf_counter()
    losses = train(model, new[:-200], digits[:-200], given.steps, lr=1e-2)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model.eval()(input_ids=new[-200:]).logits.argmax(1) == digits[-200:]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {seconds:.1f} s")
    print(f"accuracy on the new digits {100 * right.float().mean().item():.0f} %")


if __name__ == "__main__":
    main()
