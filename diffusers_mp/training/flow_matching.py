"""The objective of rectified flow."""

import math
from collections.abc import Mapping

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..predictions import FLOW_PREDICTIONS, SPACE_OF, error_factor
from ..schedulers import shift_of
from .objectives import Objective, broadcastable, widest_dtype


# Values of a latent at which arXiv 2510.11690 shifts nothing: 4 x 32 x 32.
BASE_DIMENSION = 4096


class FlowMatchObjective(Objective):
    """Rectified flow (arXiv 2209.03003) with the logit-normal times of Stable Diffusion 3 (arXiv 2403.03206).

        x_σ    = (1 - σ) x_0 + σ ε,   timestep = num_train_timesteps · σ, not rounded
        target = ε - x_0, x_0 or ε
        mse    = mean (prediction - target)², times the square of `predictions.error_factor` in another `loss_space`
        loss   = mse
        σ      = s u / (1 + (s - 1) u),   logit u ~ N(logit_mean, logit_std²)
    Positive `logit_mean` dwells on noise, negative on data. (diffusers' SD3 script reads its table of timesteps from
    the noisy end, so that there it is the other way round.) s is the shift of the sampler: the scheduler's `shift`, or
    with `use_dynamic_shifting` that of `num_tokens` image tokens; like log s added to `logit_mean`.

    What else the scheduler has for its sampler does nothing here, `shift_terminal` among it.

    Args:
        scheduler (FlowMatchEulerDiscreteScheduler): gives `num_train_timesteps` and the shift.
        logit_mean (float): of the normal distribution of logit u.
        logit_std (float): of the normal distribution of logit u.
        prediction_type (str): "flow_prediction" for the velocity ε - x_0, "flow_sample" or "flow_epsilon". The
            scheduler does not say it: a pipeline has to be told.
        loss_space (str, optional): where the squared error is taken, "sample", "epsilon" or "velocity"; by default
            where the prediction is. Denominators σ and 1 - σ are clipped at 0.05.
        num_tokens (int, optional): image tokens of the transformer in training, for `use_dynamic_shifting`.
    Attributes:
        num_train_timesteps (int): the timestep of pure noise.
        shift (float): s.
    Raises:
        TypeError: if `scheduler` is not a `FlowMatchEulerDiscreteScheduler`.
        ValueError: if its `invert_sigmas` is set, `logit_std` is not positive, `prediction_type` or `loss_space` is
            none of those, or `num_tokens` is missing.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        prediction_type: str = "flow_prediction",
        loss_space: str | None = None,
        num_tokens: int | None = None,
    ):
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise TypeError(f"`scheduler` must be a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
        if scheduler.config.invert_sigmas:
            raise ValueError("`invert_sigmas` of `scheduler` must be False, since here σ = 1 is noise, got True")
        if not logit_std > 0:
            raise ValueError(f"`logit_std` must be positive, got {logit_std}")
        if prediction_type not in FLOW_PREDICTIONS:
            raise ValueError(f"`prediction_type` must be one of {list(FLOW_PREDICTIONS)}, got {prediction_type!r}")
        if scheduler.config.use_dynamic_shifting and num_tokens is None:
            raise ValueError(
                "`num_tokens` must be the number of image tokens for a `scheduler` with use_dynamic_shifting, whose "
                "shift follows from it, got None"
            )
        self.prediction_type = prediction_type
        self._take_loss_in(loss_space)
        self.shift = shift_of(scheduler, num_tokens)
        self.scheduler = scheduler
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.logit_mean = logit_mean
        self.logit_std = logit_std

    @classmethod
    def of_recipe(
        cls,
        prediction_type: str,
        model_config: Mapping | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        loss_space: str | None = None,
        shift: float | str | None = None,
        base_shift: float | None = None,
        max_shift: float | None = None,
    ) -> "FlowMatchObjective":
        """Timesteps from 0 to 1000; see `Objective.of_recipe`.

        `shift` is a number; "dimension" for √(m / 4096), where a latent has m values (arXiv 2510.11690); or
        "resolution" for the scheduler's `use_dynamic_shifting` from `base_shift` to `max_shift`. The last two need the
        `model_config`.
        """
        options, num_tokens = {} if shift is None else {"shift": shift}, None
        if shift == "dimension":
            num_values = model_config["in_channels"] * model_config["sample_size"] ** 2
            options = {"shift": math.sqrt(num_values / BASE_DIMENSION)}
        elif shift == "resolution":
            bounds = {"base_shift": base_shift, "max_shift": max_shift}
            options = {name: value for name, value in bounds.items() if value is not None}
            options["use_dynamic_shifting"] = True
            num_tokens = (model_config["sample_size"] // model_config["patch_size"]) ** 2
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **options)
        return cls(scheduler, logit_mean, logit_std, prediction_type, loss_space, num_tokens)

    def timesteps(self, time: torch.Tensor) -> torch.Tensor:
        """num_train_timesteps · σ, σ being the shifted logit-normal quantile of `time` (float32); see `Objective`."""
        self._check_time(time)
        sigmas = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(time))
        sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
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
        prediction, latents, noise = prediction.to(dtype), latents.to(dtype), noise.to(dtype)
        predicted = SPACE_OF[self.prediction_type]
        target = {"sample": latents, "epsilon": noise}.get(predicted)
        target = noise - latents if target is None else target
        mse = (prediction - target).square().flatten(1).mean(dim=1)
        if self.loss_space != predicted:
            sigmas = timesteps.to(latents.device, dtype) / self.num_train_timesteps
            mse = error_factor(predicted, self.loss_space, 1 - sigmas, sigmas).square() * mse
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
