"""Loss of held-out samples at fixed noise levels: the same samples, noise and timesteps at every call."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .objectives import DDPMObjective


def validation_timesteps(num_train_timesteps: int, num_levels: int) -> list[int]:
    """Timesteps in the middle of equal parts of the noise schedule.

    Args:
        num_train_timesteps (int): timesteps of the schedule.
        num_levels (int): number of parts.
    Returns:
        list of int: increasing.
    """
    return [int((level + 0.5) * num_train_timesteps / num_levels) for level in range(num_levels)]


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    objective: DDPMObjective,
    batches: Iterable[dict[str, Any]],
    timesteps: list[int],
    device: torch.device,
) -> dict[str, float]:
    """Mean loss over held-out samples, for each noise level and over all of them.

    Args:
        model (nn.Module): in evaluation mode, called as `model(hidden_states, timestep=, class_labels=).sample`.
        objective (DDPMObjective): the training objective.
        batches (iterable of dict): `latents` and `noise`, (B, C, H, W), and `class_label` (B,) unless unconditional;
            their own timesteps are ignored.
        timesteps (list of int): noise levels.
        device (torch.device): where to compute.
    Returns:
        dict: `loss` and `mse` over all levels, and `mse_t<timestep>` for each.
    """
    sums = {timestep: torch.zeros(2, dtype=torch.float64) for timestep in timesteps}
    num_samples = 0
    for batch in batches:
        latents, noise = batch["latents"].to(device), batch["noise"].to(device)
        class_labels = batch["class_label"].to(device) if "class_label" in batch else None
        num_samples += len(latents)
        for timestep in timesteps:
            timestep_batch = torch.full((len(latents),), timestep, device=device)
            noisy = objective.add_noise(latents, noise, timestep_batch)
            prediction = model(noisy, timestep=timestep_batch, class_labels=class_labels).sample
            terms = objective.loss(prediction, latents, noise, timestep_batch)
            sums[timestep] += torch.stack([terms["loss"].sum(), terms["mse"].sum()]).double().cpu()
    total = torch.stack(list(sums.values())).mean(0) / num_samples
    losses = {"loss": total[0].item(), "mse": total[1].item()}
    for timestep, (_, mse) in sums.items():
        losses[f"mse_t{timestep:04d}"] = mse.item() / num_samples
    return losses
