"""Lightning: automatic optimization in its precisions, and `fit(ckpt_path=...)`."""

import pytest
import torch

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer
from tests.support.models import padded, safety_rows, tiny_model, tiny_peft, trainable

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
]


def fitted(module, folder, rows, fit_options=None, **options):
    """Train a module in Lightning, quietly, two rows at a time; return the trainer."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=padded)
    trainer.fit(module.train(), loader, **(fit_options or {}))
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning(precision, accumulation, tmp_path):
    dtype = {"32-true": None, "bf16-mixed": torch.bfloat16}[precision]
    rates = []

    class Module(lightning.LightningModule):
        def __init__(self, safe):
            super().__init__()
            self.model = tiny_peft(torch.float32)
            self.safe = safe

        def training_step(self, batch):
            return self.model(**batch, use_cache=False).loss

        def configure_optimizers(self):
            base = torch.optim.AdamW(trainable(self.model), lr=0.02)
            self.optimizer = base
            if self.safe:
                alignment = KLAlignment(self.model, safety_rows(4), autocast_dtype=dtype)
                self.optimizer = SafeGradOptimizer(base, alignment, rho=20.0)
            scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.5, total_iters=4)
            return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_train_batch_end(self, *_):
            rates.append(self.optimizer.param_groups[0]["lr"])

    def fit(safe):
        lightning.seed_everything(0, verbose=False)
        rates.clear()
        module = Module(safe)
        options = {"max_epochs": 1, "precision": precision, "accumulate_grad_batches": accumulation}
        fitted(module, tmp_path, safety_rows(8 * accumulation, seed=5), **options)
        return module

    safe = fit(safe=True)
    assert safe.optimizer.counts.steps == 4
    assert safe.optimizer.counts.negligible == 1
    assert safe.optimizer.counts.unprotected == 0
    assert safe.optimizer.alignment.state_dict()["taken"] == 4
    assert rates[-1] == pytest.approx(0.01)
    plain = fit(safe=False)

    def divergence(module):
        alignment = KLAlignment(module.model, safety_rows(4), reference=Reference(resumed=True))
        alignment(trainable(module.model))
        return float(alignment.last_loss)

    assert divergence(safe) < 0.7 * divergence(plain)


@pytest.mark.parametrize("make", [tiny_model, tiny_peft])
def test_a_run_goes_on_from_a_checkpoint(make, tmp_path):
    """`fit(ckpt_path=...)` loads the weights before configure_optimizers() builds the alignment."""

    class Module(lightning.LightningModule):
        def __init__(self, resumed):
            super().__init__()
            self.model, self.resumed = make(dtype=torch.float32), resumed

        def training_step(self, batch):
            return self.model(**batch, use_cache=False).loss

        def configure_optimizers(self):
            file = None if make is tiny_peft else tmp_path / "reference.safetensors"
            reference = Reference(resumed=self.resumed, file=file)
            alignment = KLAlignment(self.model, safety_rows(6), batch_size=2, reference=reference)
            self.optimizer = SafeGradOptimizer(
                torch.optim.AdamW(trainable(self.model), lr=0.02), alignment, refresh_every=2
            )
            return self.optimizer

    def fit(epochs, resumed=False, **options):
        lightning.seed_everything(0, verbose=False)
        module = Module(resumed)
        trainer = fitted(module, tmp_path, safety_rows(6, seed=5), options, max_epochs=epochs)
        return trainer, module

    _, whole = fit(2)
    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    if make is tiny_model:
        with pytest.raises(ValueError, match=r"other weights.*Reference\(resumed=True\)"):
            fit(2, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    _, resumed = fit(2, resumed=True, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert resumed.optimizer.counts == whole.optimizer.counts
    assert resumed.optimizer.counts.steps == 6
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
