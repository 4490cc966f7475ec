"""Loss of held-out samples at fixed noise levels: the same samples, noise and timesteps at every call."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..data.feeding import to_device
from .objectives import Objective
from .samples import conditions_of


def validation_timesteps(objective: Objective, num_levels: int) -> torch.Tensor:
    """Timesteps in the middle of equally likely parts of those that the objective trains on.

    Args:
        objective (Objective): the training objective.
        num_levels (int): number of parts.
    Returns:
        torch.Tensor: whole numbers in the dtype of the objective's timesteps, increasing, each once.
    """
    time = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    return objective.timesteps(time).round().unique()


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[dict[str, Any]],
    timesteps: torch.Tensor,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss over held-out samples, for each noise level and over all of them.

    Args:
        model (nn.Module): in evaluation mode, called as `model(hidden_states, timestep=, **conditions).sample`.
        objective (Objective): the training objective.
        batches (iterable of dict): `latents` and `noise`, (B, C, H, W), and the conditions there are, see
            `conditions_of`; their own times are ignored.
        timesteps (torch.Tensor): noise levels, as `validation_timesteps` gives them.
        device (torch.device): where to compute.
    Returns:
        dict: `loss` and `mse` over all levels, and `mse_t<timestep>` for each.
    Raises:
        ValueError: if there are no samples.
    """
    sums, num_samples = [], 0
    for batch in batches:
        batch = to_device(batch, device)
        latents, noise, conditions = batch["latents"], batch["noise"], conditions_of(batch)
        num_samples += len(latents)
        for timestep in timesteps.to(device):
            timestep_batch = timestep.expand(len(latents))
            noisy = objective.add_noise(latents, noise, timestep_batch)
            prediction = model(noisy, timestep=timestep_batch, **conditions).sample
            terms = objective.loss(prediction, latents, noise, timestep_batch)
            sums.append(torch.stack([terms["loss"].sum(), terms["mse"].sum()]))
    if not num_samples:
        raise ValueError("`batches` must hold samples, got none.")
    # One read of the device.
    means = torch.stack(sums).cpu().double().unflatten(0, (-1, len(timesteps))).sum(0) / num_samples
    losses = dict(zip(("loss", "mse"), means.mean(0).tolist(), strict=True))
    for timestep, mse in zip(timesteps.tolist(), means[:, 1].tolist(), strict=True):
        losses[f"mse_t{timestep:04.0f}"] = mse
    return losses
