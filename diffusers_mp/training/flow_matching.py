"""The objective of rectified flow."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .objectives import Objective, broadcastable, widest_dtype


class FlowMatchObjective(Objective):
    """Rectified flow (arXiv 2209.03003) with the logit-normal times of Stable Diffusion 3 (arXiv 2403.03206).

        x_σ    = (1 - σ) x_0 + σ ε,   timestep = num_train_timesteps · σ, not rounded
        target = ε - x_0
        mse    = mean (prediction - target)²,   loss = mse
        logit σ ~ N(logit_mean, logit_std²)
    Positive `logit_mean` dwells on noise, negative on data. (diffusers' SD3 script reads its table of timesteps from
    the noisy end, so that there it is the other way round.)

    `shift` and the other options of the scheduler belong to the sampler and do nothing here: to train at the shifted
    times of Stable Diffusion 3, add log(shift) to `logit_mean`.

    Args:
        scheduler (FlowMatchEulerDiscreteScheduler): gives `num_train_timesteps`.
        logit_mean (float): of the normal distribution of logit σ.
        logit_std (float): of the normal distribution of logit σ.
    Attributes:
        num_train_timesteps (int): the timestep of pure noise.
    Raises:
        TypeError: if `scheduler` is not a `FlowMatchEulerDiscreteScheduler`.
        ValueError: if its `invert_sigmas` is set, or `logit_std` is not positive.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, logit_mean: float = 0.0, logit_std: float = 1.0):
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise TypeError(f"`scheduler` must be a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
        if scheduler.config.invert_sigmas:
            raise ValueError("`invert_sigmas` of `scheduler` must be False, since here σ = 1 is noise, got True")
        if not logit_std > 0:
            raise ValueError(f"`logit_std` must be positive, got {logit_std}")
        self.scheduler = scheduler
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.logit_mean = logit_mean
        self.logit_std = logit_std

    @classmethod
    def of_recipe(cls, prediction_type: str, logit_mean: float = 0.0, logit_std: float = 1.0) -> "FlowMatchObjective":
        """Timesteps from 0 to 1000; `prediction_type` can be "flow_prediction" only. See `Objective.of_recipe`."""
        return cls(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000), logit_mean, logit_std)

    def timesteps(self, time: torch.Tensor) -> torch.Tensor:
        """num_train_timesteps · σ, where σ is the logit-normal quantile of `time` (float32); see `Objective`."""
        self._check_time(time)
        sigmas = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(time))
        return (self.num_train_timesteps * sigmas).float()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_σ for floats in [0, num_train_timesteps]; see `Objective.add_noise`."""
        self._check(latents, noise, timesteps)
        dtype = widest_dtype(latents, noise)
        # As the scheduler's `scale_noise`, which knows the timesteps of its own table only.
        sigmas = broadcastable(timesteps.to(latents.device, dtype) / self.num_train_timesteps, latents)
        return ((1 - sigmas) * latents.to(dtype) + sigmas * noise.to(dtype)).to(latents.dtype)

    def loss(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss` and `mse`, which are the same, for floats in [0, num_train_timesteps]; see `Objective.loss`."""
        self._check(latents, noise, timesteps)
        if prediction.shape != latents.shape:
            raise ValueError(
                f"`prediction` must have shape {tuple(latents.shape)}, that of the latents, got "
                f"{tuple(prediction.shape)}"
            )
        dtype = widest_dtype(prediction, latents, noise)
        target = noise.to(dtype) - latents.to(dtype)
        mse = (prediction.to(dtype) - target).square().flatten(1).mean(dim=1)
        return {"loss": mse, "mse": mse}

    def preview_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)

    def _check(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> None:
        self._check_noise(latents, noise)
        if timesteps.shape != latents.shape[:1] or timesteps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`timesteps` must be float32 or float64 of shape ({latents.shape[0]},), got {timesteps.dtype} "
                f"of shape {tuple(timesteps.shape)}"
            )
        if timesteps.device.type == "cpu" and timesteps.numel():
            smallest, largest = timesteps.min().item(), timesteps.max().item()
            if not 0 <= smallest <= largest <= self.num_train_timesteps:
                raise ValueError(
                    f"`timesteps` must lie in [0, {self.num_train_timesteps}], got {smallest} to {largest}"
                )
