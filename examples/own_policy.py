"""A policy of one's own: an epoch without weights after each that brought little.

    python examples/own_policy.py [--epochs N]

With a learning-rate finder for the start and ReduceLROnPlateau for the way down.
"""

import torch
from network import network
from options import options
from real_images import digits
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau

import wus_ext
from wus_ext.training import find_lr


class SkipAfterLittle:
    """Skips the epoch after one that trained weights and lowered the loss by less than a part."""

    def __init__(self, model, part: float = 0.2) -> None:
        self.model, self.part = model, part
        self.last = float("inf")
        self.skipping = False

    def step(self, loss: float) -> bool:
        """Decide for the next epoch by the held-out loss of the last."""
        little = loss > (1 - self.part) * self.last
        self.last, self.skipping = loss, little and not self.skipping
        wus_ext.set_skip(self.model, self.skipping)
        return self.skipping

    def state_dict(self) -> dict:
        return {"last": self.last, "skipping": self.skipping}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.skipping = state["last"], state["skipping"]
        wus_ext.set_skip(self.model, self.skipping)


@torch.no_grad()
def held_out_loss(model, images, labels) -> float:
    return cross_entropy(model.eval()(images), labels).item()


def main(arguments=None) -> None:
    given = options(__doc__, arguments, epochs=8, images=512)

    torch.manual_seed(0)
    images, labels = digits()
    train = images[: given.images], labels[: given.images]
    model = wus_ext.convert(network(), full="fused")
    batches = list(zip(*(tensor.split(64) for tensor in train), strict=True))
    lr = find_lr(model, batches, lowest=1e-4, highest=0.5, steps=12).suggestion
    print(f"learning rate {lr:.3g}")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    policy = SkipAfterLittle(model)
    for epoch in range(1, given.epochs + 1):
        model.train()
        skipped = policy.skipping
        for batch in torch.randperm(given.images).split(64):
            cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
            optimizer.zero_grad()  # a window leaves no gradient of a weight
        loss = held_out_loss(model, images[-300:], labels[-300:])
        scheduler.step(loss)
        policy.step(loss)
        print(f"epoch {epoch}: loss {loss:.3f}, weights {'skipped' if skipped else 'trained'}")


if __name__ == "__main__":
    main()
