"""The contrastive loss of texts and images: each finds its own among those of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.models.dual_encoder import LARGEST_LOGIT_SCALE, DualEncoder


class _Bounded(torch.autograd.Function):
    """Cuts a number off at a bound; behind it only a gradient that leads back is let through."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.beyond = x > bound
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.beyond & (grad < 0), torch.zeros_like(grad), grad), None


def contrastive_sum(image_NP: torch.Tensor, text_NP: torch.Tensor, logit_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of N pairs in nats, and how many of the 2 N choices are right.

    Both are vectors of length 1, row i of one belongs to row i of the other. Of each pair the loss is half the cross-entropy of finding
    the text of the image, and half that of finding the image of the text, among all N.
    Source: Radford et al. 2021, arXiv:2103.00020, figure 3; the loss is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4) in
    both directions.
    """
    logits_NN = logit_scale.exp() * image_NP @ text_NP.t()
    own_N = torch.arange(len(logits_NN), device=logits_NN.device)
    both = [F.cross_entropy(logits, own_N, reduction="sum") for logits in (logits_NN, logits_NN.t())]
    right = (logits_NN.argmax(1) == own_N).sum() + (logits_NN.argmax(0) == own_N).sum()
    return (both[0] + both[1]) / 2, right


def contrastive_loss(model: DualEncoder, batch: tuple[torch.Tensor, ...]):
    """Return the symmetric contrastive loss; the batch is (captions (N, T), images (N, C, S, S)), and counts N.

    Only the pairs of one batch are compared: unlike other losses here it is not the same however a step is cut into micro-batches.
    Above exp(logit_scale) = 100 the scale is held, and returns when the gradient leads back. Metrics: `accuracy`, the share of texts and
    images that find their own, and `logit_scale`, exp of it.
    """
    tokens_NT, pixels_NCSS = batch
    scale = _Bounded.apply(model.logit_scale.float(), LARGEST_LOGIT_SCALE)
    loss, right = contrastive_sum(model.encode_image(pixels_NCSS), model.encode_text(tokens_NT), scale)
    count = len(tokens_NT)
    return loss, count, {"accuracy": right.detach() / 2, "logit_scale": scale.detach().exp() * count}


@torch.no_grad()
def bound_logit_scale(model: DualEncoder) -> None:
    """Let the temperature itself be what training computed with, as a published model's is read without a bound."""
    model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
