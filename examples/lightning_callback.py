"""Lightning: one callback skips weight updates where the accuracy has become flat.

python examples/lightning_callback.py [--epochs N]
"""

import lightning.pytorch as pl
import torch
from network import network
from options import options
from real_images import digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from wus_ext.integrations.lightning import WeightUpdateSkipping


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        return cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, index):
        right = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class Report(pl.Callback):
    """A line for each epoch."""

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            values = trainer.callback_metrics
            skipped = "skipped" if values.get("skipping_weight_updates") else "trained"
            print(f"epoch {trainer.current_epoch}: {values['val_acc']:.3f}, weights {skipped}")


def main(arguments=None) -> None:
    given = options(__doc__, arguments, epochs=8, images=800)

    pl.seed_everything(0, verbose=False)
    images, labels = digits()
    train = TensorDataset(images[: given.images], labels[: given.images])
    held_out = TensorDataset(images[-400:], labels[-400:])
    skipping = WeightUpdateSkipping("val_acc", threshold=2.0, patience=1, warmup=2, full="fused")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=given.epochs,
        accelerator="cpu",
        callbacks=[skipping, Report()],
        enable_model_summary=False,
        **quiet,
    )
    loaders = DataLoader(train, 64, shuffle=True), DataLoader(held_out, 200)
    trainer.fit(Classifier(), *loaders)


if __name__ == "__main__":
    main()
