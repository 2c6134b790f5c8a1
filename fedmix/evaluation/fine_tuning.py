"""The image encoder trained end to end with a linear head, on 1, 10 and 100 % of the probe's labels.

What BenchX (2410.21969) compares pre-trained encoders by: a linear probe says what the features hold, this says what they are
a good start for. The head begins as the linear probe of the same studies (LP-FT, 2202.10054): a head of chance would first
bend the encoder's features to itself, and a few studies are not enough to bend them back. A copy is trained; the encoder that
was given stays as it is.

Shapes: B, n, N studies, S pixels a side, F features, K labels.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmix.evaluation.classification import Linear, fit_probe, image_rows
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    Findings,
    NotEvaluableError,
    device_of,
    evaluating,
    pixels,
    random_for,
)
from fedmix.evaluation.label_shares import probe_by_share, scores_by_share, shares_report
from fedmix.evaluation.tuning import batches, known_label_loss, minimise

BATCH_SIZE = 32
MOST_EPOCHS = 10  # of a draw; a few studies seen more often are learnt by heart
RATE = 3e-4  # highest; low enough for a pre-trained encoder
WEIGHT_DECAY = 0.05


class Tuned(nn.Module):
    """A copy of an encoder under a linear head: images [B, S, S] to logits [B, K]."""

    def __init__(self, encoder: nn.Module, start: Linear) -> None:
        """``start``: the probe whose regressions and standardised features the head begins with; zero where it has none."""
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        device = device_of(encoder)
        self.mean_F = torch.from_numpy(start.scaler.mean_).float().to(device)
        self.spread_F = torch.from_numpy(start.scaler.scale_).float().to(device)
        self.head = nn.Linear(len(self.mean_F), len(start.models), device=device)
        with torch.no_grad():
            for k, model in enumerate(start.models):
                self.head.weight[k] = 0.0 if model is None else torch.from_numpy(model.coef_[0]).to(device)
                self.head.bias[k] = 0.0 if model is None else float(model.intercept_[0])

    def forward(self, image_BSS: Tensor) -> Tensor:
        """Logits [B, K] of images 0..1."""
        features_BF = cast(Encoder, self.encoder).image_features(image_BSS)
        logits_BK: Tensor = self.head((features_BF - self.mean_F) / self.spread_F)
        return logits_BK


def fine_tuned(
    encoder: Encoder, start: Linear, images: NDArray[np.uint8], labels: NDArray[np.int8], *, num_steps: int, seed: int = 0
) -> Tuned:
    """A copy of the encoder and a head, trained on images uint8 [N, S, S] and their labels int8 [N, K] from a probe on.

    At most ``num_steps`` batches, and at most MOST_EPOCHS times each image. NotEvaluableError for an encoder without weights.
    """
    if not isinstance(encoder, nn.Module) or not any(True for _ in encoder.parameters()):
        raise NotEvaluableError("the encoder has no weights to train further")
    device = device_of(encoder)
    num_steps = min(num_steps, MOST_EPOCHS * max(1, len(images) // BATCH_SIZE))
    order = batches(len(images), BATCH_SIZE, num_steps, random_for(seed, "fine-tuning batches"))
    labels_NK = torch.from_numpy(labels).to(device).float()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # for an encoder with dropout
        model = Tuned(encoder, start).train()

        def loss(step: int) -> Tensor:
            rows = order[step]
            return known_label_loss(model(pixels(images[rows], device)), labels_NK[torch.from_numpy(rows).to(device)])

        minimise([{"params": list(model.parameters()), "lr": RATE, "weight_decay": WEIGHT_DECAY}], loss, num_steps)
    return model.eval().requires_grad_(False)


def predicted(model: Tuned, images: NDArray[np.uint8], *, batch_size: int = 256) -> NDArray[np.float64]:
    """Logits [n, K] of images uint8 [n, S, S], in their order."""
    device = device_of(model)
    with evaluating(model):
        parts = [model(pixels(images[i : i + batch_size], device)).double().cpu() for i in range(0, len(images), batch_size)]
    scores: NDArray[np.float64] = torch.cat(parts).numpy()
    if not np.isfinite(scores).all():
        raise NotEvaluableError("fine-tuning gave values that are not finite; training has probably diverged")
    return scores


def evaluate_fine_tuning(context: EvaluationContext) -> Findings:
    """Fine-tuning with growing shares of the labels, beside the linear probe on the same studies."""
    rows, test_rows = image_rows(context)
    held_out, settings = context.held_out, context.settings
    train, test = context.probe_studies(image=True), context.test_studies(image=True, label=True)
    test_images = held_out.images_of(test)

    def scores(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        probe = fit_probe(rows.take(drawn), test_rows.features, num_train=len(drawn), seed=settings.seed)
        model = fine_tuned(
            context.encoder,
            probe.linear,
            held_out.images_of(train[drawn]),
            held_out.labels_of(train[drawn]),
            num_steps=settings.fine_tune_steps,
            seed=settings.seed,
        )
        found = predicted(model, test_images, batch_size=settings.batch_size)
        return np.where(np.isnan(probe.scores), np.nan, found)  # a label that no study of the draw teaches is guessed

    return Findings(shares_report(context, scores_by_share(context, len(train), scores), probe_by_share(context)))
