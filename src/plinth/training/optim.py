"""Optimizers on fp32 master weights: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from plinth.config import UserError
from plinth.training.config import OptimizerConfig, Scale
from plinth.training.muon import orthogonalise, quintics, takes_kernels, update_on_kernels
from plinth.training.precision import MasterWeights

# Factors on AdamW's rate by name, 1 for the rest. nanochat moves x0_lambda a hundred times as fast as resid_lambda, but on a stream whose
# embedding has deviation 1; ours, where tied, has 0.02, so the same step weighs more. Short runs at the league's small size liked 3 better
# than 1 and hardly less than 10, on both seeds looked at; no sweep has been made.
OWN_RATES = {"x0_lambda": 3.0}
# Elements of the matrices orthogonalised in one call, of which a few copies live at a time: in a core's cache, in a device's memory.
CACHED_ELEMENTS, STACK_ELEMENTS = 1 << 19, 1 << 27


class Optimizer:
    """AdamW on some tensors and Muon on others; all state is a flat dictionary of tensors."""

    def __init__(
        self, masters: MasterWeights, config: OptimizerConfig, parts: dict[str, tuple[int, ...]], scales: dict[str, Scale] | None = None
    ):
        self.config, self.masters = config, masters
        plain = {name: masters.plain_name(name) for name in masters.tensors}
        self.scales = {name: (scales or {}).get(own, Scale(lr=OWN_RATES.get(own, 1.0))) for name, own in plain.items()}
        self.parts = parts if config.name == "muon" else {}
        self.num_updates = 0
        self.state: dict[str, torch.Tensor] = {}
        for name, tensor in masters.tensors.items():
            kinds = ("momentum",) if name in self.parts else ("exp_avg", "exp_avg_sq")
            self.state.update({f"{kind}/{name}": torch.zeros_like(tensor) for kind in kinds})
            if name in self.parts and config.normuon_beta2 is not None:
                self.state[f"row_square/{name}"] = torch.zeros_like(tensor[:, :1])

    @torch.no_grad()
    def step(self, grads: dict[str, torch.Tensor], lr_scale: float, workers: Any) -> None:
        """Update the master weights in place; `lr_scale` multiplies the peak rates."""
        self.num_updates += 1
        jobs: list[Callable[[], None]] = [lambda: self._adamw({name: grad for name, grad in grads.items() if self._moves(name)}, lr_scale)]
        if self.masters.ranks is None:
            jobs += [self._muon_job(grads, lr_scale, share) for share in self._muon_shares(workers.num_threads)]
        elif self.parts:
            jobs += [lambda: self._muon_over_ranks(grads, lr_scale)]
        workers.map(lambda job: job(), jobs[::-1])

    def _moves(self, name: str) -> bool:
        return self.num_updates > self.scales[name].begin

    def _adamw(self, grads: dict[str, torch.Tensor], lr_scale: float) -> None:
        config = self.config
        groups = defaultdict(list)  # one call for all tensors with the same rates
        for name in grads:
            if name not in self.parts:
                decayed = self.masters.tensors[name].dim() >= 2 and "embed" not in name
                groups[decayed, self.scales[name]].append(name)
        for (decayed, scale), group in groups.items():
            updates = torch.full((), float(self.num_updates - scale.begin), device=self.masters.device)
            torch._fused_adamw_(
                [self.masters.tensors[name] for name in group],
                [grads[name] for name in group],
                [self.state[f"exp_avg/{name}"] for name in group],
                [self.state[f"exp_avg_sq/{name}"] for name in group],
                [],
                [updates] * len(group),
                lr=config.lr * lr_scale * scale.lr,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=config.weight_decay * scale.weight_decay if decayed else 0.0,
                eps=self._eps() * scale.eps,
                amsgrad=False,
                maximize=False,
            )

    def _eps(self) -> float:
        return self.config.eps * ((1.0 - self.config.beta2**self.num_updates) ** -0.5 if self.config.tensorflow_eps else 1.0)

    def _muon_shares(self, num_shares: int) -> list[list[tuple[str, int, int]]]:
        """Split the matrices (name, first row, last row) into shares of one shape, each small enough for a core's cache."""
        by_shape = defaultdict(list)
        for name, rows in self.parts.items():
            if not self._moves(name):
                continue
            start = 0
            for count in rows:
                by_shape[count, self.masters.tensors[name].shape[1]].append((name, start, start + count))
                start += count
        limit = CACHED_ELEMENTS if self.masters.device.type == "cpu" else STACK_ELEMENTS
        shares = []
        for (rows, columns), group in by_shape.items():
            size = min(-(-len(group) // num_shares), max(1, limit // (rows * columns)))
            shares += [group[i : i + size] for i in range(0, len(group), size)]
        return shares

    def _muon_job(self, grads, lr_scale: float, share) -> Callable[[], None]:
        def job() -> None:
            config, dtype = self.config, self.masters.parameters[0].dtype
            polynomials = quintics(config.polynomials, config.newton_schulz_steps)
            first = grads[share[0][0]][share[0][1] : share[0][2]]
            if takes_kernels(first, dtype) and config.normuon_beta2 is None and not config.cautious_decay:
                return self._muon_on_kernels(grads, lr_scale, share, polynomials)
            updates = orthogonalise(torch.stack(self._directions(grads, share)), polynomials, dtype).float()
            if config.normuon_beta2 is not None:
                for (name, a, b), update in zip(share, updates):
                    normalise_neurons(update, self.state[f"row_square/{name}"][a:b], config.normuon_beta2)
            self._move(share, updates, lr_scale, updates.shape[1] / updates.shape[2])

        return job

    def _muon_on_kernels(self, grads, lr_scale: float, share, polynomials) -> None:
        config = self.config
        for name, a, b in share:
            scale, grad = self.scales[name], grads[name][a:b]
            lr = config.muon_lr * lr_scale * scale.lr
            update_on_kernels(
                self.masters.tensors[name][a:b], grad, self.state[f"momentum/{name}"][a:b], polynomials,
                momentum=config.momentum_at(self.num_updates), keep=1.0 - lr * config.weight_decay * scale.weight_decay,
                rate=lr * max(1.0, grad.shape[0] / grad.shape[1]) ** 0.5,
            )  # fmt: skip

    def _muon_over_ranks(self, grads, lr_scale: float) -> None:
        """Move this rank's shards; the ranks deal the matrices among them and send each other the shards of directions and updates."""
        masters: Any = self.masters  # a ShardedWeights
        names = [name for name in self.parts if self._moves(name)]
        shares = [(name, 0, masters.tensors[name].shape[0]) for name in names]
        polynomials = quintics(self.config.polynomials, self.config.newton_schulz_steps)
        updates = masters.orthogonalise(dict(zip(names, self._directions(grads, shares))), polynomials)
        by_ratio = defaultdict(list)
        for share in shares:
            rows, columns = masters.shapes[share[0]]
            by_ratio[rows / columns].append(share)
        for ratio, group in by_ratio.items():
            self._move(group, [updates[name] for name, _, _ in group], lr_scale, ratio)

    def _directions(self, grads, share) -> list[torch.Tensor]:
        """Move the momentum of the share's matrices and return what is to be orthogonalised (Nesterov)."""
        momentum = self.config.momentum_at(self.num_updates)
        buffers = [self.state[f"momentum/{name}"][a:b] for name, a, b in share]
        parts = [grads[name][a:b] for name, a, b in share]
        torch._foreach_lerp_(buffers, parts, 1.0 - momentum)
        return list(torch._foreach_lerp(parts, buffers, momentum))

    def _move(self, share, updates, lr_scale: float, ratio: float) -> None:
        """Decay and update the share's weights; `ratio` is rows over columns of the whole matrices."""
        config = self.config
        groups = defaultdict(list)  # one call for all matrices with the same rates
        for (name, a, b), update in zip(share, updates):
            groups[self.scales[name]].append((self.masters.tensors[name][a:b], update))
        for scale, pairs in groups.items():
            lr = config.muon_lr * lr_scale * scale.lr
            weights, moves = map(list, zip(*pairs))
            decay_weights(weights, moves, lr * config.weight_decay * scale.weight_decay, config.cautious_decay)
            torch._foreach_add_(weights, moves, alpha=-lr * max(1.0, ratio) ** 0.5)

    def load(self, state: dict[str, torch.Tensor], num_updates: int) -> None:
        """Take over saved state by name."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.num_updates = num_updates


def decay_weights(weights: list[torch.Tensor], updates: list[torch.Tensor], rate: float, cautious: bool) -> None:
    """Shrink the weights by `rate`, in place; when cautious only those that the updates, which are subtracted, shrink too.

    Source: Chen et al. 2025, arXiv:2510.12402 (cautious weight decay).
    """
    if not rate:
        return
    if cautious:
        for weight, update in zip(weights, updates):
            weight.addcmul_(weight, ((update * weight) > 0).to(weight.dtype), value=-rate)
    else:
        torch._foreach_mul_(weights, 1.0 - rate)


def normalise_neurons(update: torch.Tensor, row_square: torch.Tensor, beta2: float) -> None:
    """Divide each row of an orthogonal update by the root of its running mean square, in place; the whole update's norm stays.

    `row_square`, (rows, 1), is moved in place too.
    Source: Li et al. 2025, arXiv:2510.05491 (NorMuon).  Differs: the norm stays the orthogonal update's own, so that the
    learning rate means the same with and without.
    """
    norm = update.norm()
    row_square.lerp_(update.square().mean(-1, keepdim=True), 1.0 - beta2)
    update.mul_(torch.rsqrt(row_square + 1e-12))
    update.mul_(norm / (update.norm() + 1e-12))


def build_optimizer(masters: MasterWeights, config: OptimizerConfig, scales: dict[str, Scale] | None = None) -> Optimizer:
    """Make the optimizer for a model; the model says by `matrix_parts` which parameters Muon may take and how to cut them.

    `scales` gives factors by parameter name; a parameter that it does not name keeps the configured rates. Raises UserError for
    NorMuon over several ranks, whose means need whole rows.
    """
    if masters.ranks is not None and config.normuon_beta2 is not None:
        raise UserError(
            f"normuon_beta2={config.normuon_beta2} needs whole matrices on each process. Leave it out, or train on one process."
        )
    return Optimizer(masters, config.resolved(), masters.matrix_parts(), scales)
