"""Training objectives: from clean latents and noise to a loss per sample. Here what they share, and that of DDPM.

All of them answer the same calls, so that a training loop need not know which one it has:

    timesteps = objective.timesteps(time)                              # time ~ U[0, 1), one for each sample
    noisy = objective.add_noise(latents, noise, timesteps)
    prediction = model(noisy, timestep=timesteps, class_labels=class_labels).sample
    loss = objective.loss(prediction, latents, noise, timesteps)["loss"].mean()

`objective.scheduler`, saved beside the model, says all that sampling needs to know.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from ..predictions import LOSS_SPACES, SPACE_OF, error_factor
from .bound import discretized_log_likelihood, normal_kl


LEARNED_RANGE = "learned_range"
# `learned` (no range) has no bound to train it by; `fixed_large_log` makes diffusers' step take the root of a log.
VARIANCE_TYPES = (LEARNED_RANGE, "fixed_small", "fixed_small_log", "fixed_large")


class _Prediction(NamedTuple):
    """What a model may be trained to say of x_t, and what an error in it counts."""

    target: Callable  # of scheduler, latents, noise, timesteps
    error_to_mean: Callable  # of α, ᾱ before and ᾱ: an error in the posterior's mean over the one in the target
    weight: Callable  # of SNR and min(SNR, γ): min-SNR's, the same for all on the error in x_0


PREDICTIONS = {
    "epsilon": _Prediction(
        target=lambda scheduler, latents, noise, timesteps: noise,
        # Equation 11 of arXiv 2006.11239.
        error_to_mean=lambda alphas, before, cumprod: -(1 - alphas) / (alphas * (1 - cumprod)).sqrt(),
        weight=lambda snr, capped_snr: capped_snr / snr,
    ),
    "sample": _Prediction(
        target=lambda scheduler, latents, noise, timesteps: latents,
        # Equation 7 of arXiv 2006.11239.
        error_to_mean=lambda alphas, before, cumprod: (1 - alphas) * before.sqrt() / (1 - cumprod),
        weight=lambda snr, capped_snr: capped_snr,
    ),
    "v_prediction": _Prediction(
        target=lambda scheduler, latents, noise, timesteps: scheduler.get_velocity(latents, noise, timesteps),
        # An error in v is one of √ᾱ times as much in the noise; written so that it may be used at ᾱ = 0.
        error_to_mean=lambda alphas, before, cumprod: -(1 - alphas) * (before / (1 - cumprod)).sqrt(),
        weight=lambda snr, capped_snr: capped_snr / (snr + 1),
    ),
}


class Objective(ABC):
    """What every objective answers.

    Attributes:
        scheduler (SchedulerMixin): what is saved with the model, so that its samples need no further word.
        prediction_type (str): what the model is trained to predict, as `MPDiTPipeline` names it.
        loss_space (str): where its squared error is taken: "sample" (x), "epsilon" (ε) or "velocity" (v).
        learns_variance (bool): whether predictions have 2C channels.
    """

    scheduler: SchedulerMixin
    prediction_type: str
    loss_space: str
    learns_variance: bool = False

    @classmethod
    @abstractmethod
    def of_recipe(cls, prediction_type: str, model_config: Mapping | None = None, **options: Any) -> "Objective":
        """The objective of the trainer's flags.

        Args:
            prediction_type (str): what the model predicts, of those that the class knows.
            model_config (mapping, optional): that of the model, for times that depend on the size of its input.
            **options: the flags of this objective, see `objective_arguments.OBJECTIVES`.
        """

    @abstractmethod
    def timesteps(self, time: torch.Tensor) -> torch.Tensor:
        """Timesteps of training, distributed as the objective wants them where `time` is uniform, and increasing.

        Args:
            time (torch.Tensor): floating point in [0, 1), any shape. Float64 on the CPU gives every device the same
                run; in float32 a product may round up to the end.
        Returns:
            torch.Tensor: shape of `time`, of the dtype that `add_noise`, `loss` and the model take.
        Raises:
            ValueError: if `time` is not of floating point or, on the CPU, out of range.
        """

    @abstractmethod
    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents, computed in at least float32.

        Args:
            latents (torch.Tensor): clean standardised latents, shape (B, C, H, W).
            noise (torch.Tensor): standard normal, shape of `latents`.
            timesteps (torch.Tensor): as `timesteps` gives them, shape (B,).
        Returns:
            torch.Tensor: shape and dtype of `latents`.
        Raises:
            ValueError: if shapes disagree, or `timesteps` are of another kind or, on the CPU, out of range.
        """

    @abstractmethod
    def loss(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses per sample of a prediction for `add_noise(latents, noise, timesteps)`.

        Args:
            prediction (torch.Tensor): the model's output, shape (B, 2C, H, W) with a learned variance, target first
                and then the interpolation between the log-variances; else (B, C, H, W).
            latents (torch.Tensor): clean standardised latents, shape (B, C, H, W).
            noise (torch.Tensor): the noise that was added, shape of `latents`.
            timesteps (torch.Tensor): as `timesteps` gives them, shape (B,).
        Returns:
            dict: `loss`, to be minimised, and `mse`, the unweighted squared error in `loss_space`, among others; each
            of shape (B,), at least float32.
        Raises:
            ValueError: as in `add_noise`, or if the shape of `prediction` is another.
        """

    @abstractmethod
    def preview_scheduler(self) -> SchedulerMixin:
        """A fresh scheduler that makes images of the model in few steps."""

    def _check_time(self, time: torch.Tensor) -> None:
        if not time.is_floating_point():
            raise ValueError(f"`time` must be of floating point, got {time.dtype}")
        if time.device.type == "cpu" and time.numel():
            smallest, largest = time.min().item(), time.max().item()
            if not 0 <= smallest <= largest < 1:
                raise ValueError(f"`time` must lie in [0, 1), got {smallest} to {largest}")

    def _take_loss_in(self, loss_space: str | None) -> None:
        if loss_space not in (None, *LOSS_SPACES):
            raise ValueError(f"`loss_space` must be one of {list(LOSS_SPACES)}, got {loss_space!r}")
        self.loss_space = SPACE_OF[self.prediction_type] if loss_space is None else loss_space

    def _check_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> None:
        if noise.shape != latents.shape:
            raise ValueError(f"`noise` must have shape {tuple(latents.shape)}, got {tuple(noise.shape)}")


class DDPMObjective(Objective):
    """Prediction of noise, of v or of the sample, and the bound of the drawn timestep for a learned variance.

        x_t    = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
        target = ε, x_0, or v = √ᾱ_t ε - √(1 - ᾱ_t) x_0
        mse    = mean (prediction - target)², times the square of `predictions.error_factor` in another `loss_space`
        vb     = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) for t > 0, -log p(x_0 | x_1) for t = 0, in bits, mean
        loss   = weight · mse + vb
    Equations 5, 6, 15 and 16 of improved DDPM (arXiv 2102.09672), trained on latents as by DiT (arXiv 2212.09748): the
    predicted mean is detached in the bound, so that `vb` trains the variance and `mse` the target. Weight 1 on the
    bound of one timestep out of 1000 is λ = 0.001 on the whole bound. With a fixed variance `vb` has no gradient at
    all: it is reported, and `loss` is `weight · mse`. v is that of progressive distillation (arXiv 2202.00512).

    The weight is 1, or with `snr_gamma` that of min-SNR (arXiv 2303.09556), where SNR = ᾱ_t / (1 - ᾱ_t):
    min(SNR, γ) / SNR for noise, min(SNR, γ) / (SNR + 1) for v: the same weight min(SNR, γ) on the error in x_0. The
    loss would be the same in every space, so that another one than the prediction's is refused with it. The bound is
    not weighted: it trains the variance alone, which min-SNR says nothing about.

    At t = 0 the likelihood is that of pixel levels of width 2/255 whose outermost are open (beyond ±0.999). Latents
    have no levels; this is what the published runs train on, kept so that they can be reproduced.

    `clip_sample` and `thresholding` belong to the sampler and do nothing here.

    Args:
        scheduler (DDPMScheduler): gives `alphas_cumprod`, from which every table is derived as its own `step` derives
            them, so that the bound trained is that of the sampler. `prediction_type` is `epsilon`, `v_prediction` or
            `sample`; `variance_type` `learned_range` asks for predictions of 2C channels, target then interpolation;
            `fixed_small`, `fixed_small_log` and `fixed_large` for C, the only ones for `sample`.
        snr_gamma (float, optional): γ of min-SNR, 5 in its paper; None for equal weights.
        loss_space (str, optional): where the squared error is taken, "sample", "epsilon" or "velocity" (v); by default
            where the prediction is. Denominators √ᾱ_t and √(1 - ᾱ_t) are clipped at 0.05.
    Attributes:
        num_timesteps (int): timesteps to draw from, 0 to this exclusive, all equally likely.
    Raises:
        TypeError: if `scheduler` is not a `DDPMScheduler`.
        ValueError: if its `prediction_type` or `variance_type` is not supported, or not together, it ends at zero
            signal though noise is predicted, `snr_gamma` is not positive, `loss_space` is none or of no effect.
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None, loss_space: str | None = None):
        if not isinstance(scheduler, DDPMScheduler):
            raise TypeError(f"`scheduler` must be a DDPMScheduler, got {type(scheduler).__name__}")
        prediction_type, variance_type = scheduler.config.prediction_type, scheduler.config.variance_type
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"`prediction_type` of `scheduler` must be one of {list(PREDICTIONS)}, got {prediction_type!r}"
            )
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(
                f"`variance_type` of `scheduler` must be one of {list(VARIANCE_TYPES)}, got {variance_type!r}"
            )
        if prediction_type == "sample" and variance_type == LEARNED_RANGE:
            raise ValueError(
                "`variance_type` of `scheduler` must be 'fixed_small' or 'fixed_large' for prediction_type 'sample', "
                f"since a learned variance is trained beside noise or v, got {variance_type!r}"
            )
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"`snr_gamma` must be positive, or None for equal weights, got {snr_gamma}")
        self.prediction_type = prediction_type
        self._take_loss_in(loss_space)
        predicted = SPACE_OF[prediction_type]
        if snr_gamma is not None and self.loss_space != predicted:
            raise ValueError(
                "`loss_space` must be None with `snr_gamma`, whose weights make the loss the same in every space, "
                f"got {loss_space!r}"
            )
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
        self._prediction = PREDICTIONS[prediction_type]
        factor = error_factor(predicted, self.loss_space, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        tables = torch.cat([_ddpm_tables(alphas_cumprod, self._prediction, snr_gamma), factor.square()[None]])
        if alphas_cumprod[-1] <= 0 and not tables.isfinite().all():
            raise ValueError(
                "`alphas_cumprod` of `scheduler` must stay above 0, since without signal the noise says nothing about "
                f"the sample, got {alphas_cumprod[-1].item()} at the last timestep (`rescale_betas_zero_snr`); "
                "`prediction_type` 'v_prediction' and 'sample' can do it"
            )
        self.scheduler = scheduler
        self.num_timesteps = len(alphas_cumprod)
        self.learns_variance = variance_type == LEARNED_RANGE
        self._fixed_large = variance_type == "fixed_large"
        self._tables = {(torch.device("cpu"), torch.float64): tables}

    @classmethod
    def of_recipe(
        cls,
        prediction_type: str,
        model_config: Mapping | None = None,
        variance_type: str = LEARNED_RANGE,
        snr_gamma: float | None = None,
        loss_space: str | None = None,
    ) -> "DDPMObjective":
        """Noise levels of DiT: 1000, β linear from 1e-4 to 0.02; see `Objective.of_recipe`."""
        scheduler = DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_sample=False,
        )
        return cls(scheduler, snr_gamma, loss_space)

    def timesteps(self, time: torch.Tensor) -> torch.Tensor:
        """⌊time · num_timesteps⌋ (int64); see `Objective.timesteps`."""
        self._check_time(time)
        return (time * self.num_timesteps).long()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t for integers in [0, num_timesteps); see `Objective.add_noise`."""
        self._check(latents, noise, timesteps)
        # In bf16 the scheduler's ᾱ_0 is 1 and adds no noise.
        dtype = widest_dtype(latents, noise)
        return self.scheduler.add_noise(latents.to(dtype), noise.to(dtype), timesteps).to(latents.dtype)

    def loss(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss`, `mse` and `vb` (bits per dimension) for integers in [0, num_timesteps); see `Objective.loss`."""
        self._check(latents, noise, timesteps)
        expected = (latents.shape[0], latents.shape[1] * (2 if self.learns_variance else 1), *latents.shape[2:])
        if prediction.shape != expected:
            raise ValueError(
                f"`prediction` must have shape {expected} for latents of {latents.shape[1]} channels and "
                f"`variance_type` {self.scheduler.config.variance_type!r}, got {tuple(prediction.shape)}"
            )
        dtype = widest_dtype(prediction, latents, noise)
        prediction, latents, noise = prediction.to(dtype), latents.to(dtype), noise.to(dtype)
        timesteps = timesteps.to(latents.device)
        rows = self._table_rows(latents, timesteps)
        min_log_variance, max_log_variance, error_to_mean, weight, in_loss_space = rows

        if self.learns_variance:
            predicted_target, interpolation = prediction.chunk(2, dim=1)
            # -1 is the variance of the posterior, +1 is β (arXiv 2102.09672, equation 15).
            log_variance = min_log_variance + (interpolation + 1) / 2 * (max_log_variance - min_log_variance)
        else:
            predicted_target = prediction
            log_variance = (max_log_variance if self._fixed_large else min_log_variance).expand_as(latents)

        error = predicted_target - self._prediction.target(self.scheduler, latents, noise, timesteps)
        mse = in_loss_space.flatten() * error.square().flatten(1).mean(dim=1)
        # Both means come from the same x_t, so their difference needs no x_t: it is the error in the target, scaled.
        # At t = 0 the posterior's mean is the sample itself.
        mean_error = error_to_mean * error.detach()
        nats = torch.where(
            broadcastable(timesteps == 0, latents),
            -discretized_log_likelihood(latents, latents + mean_error, log_variance),
            normal_kl(mean_error, min_log_variance, log_variance),
        )
        vb = nats.flatten(1).mean(dim=1) / math.log(2)
        weighted = weight.flatten() * mse
        return {"loss": weighted + vb if self.learns_variance else weighted, "mse": mse, "vb": vb}

    def preview_scheduler(self) -> DPMSolverMultistepScheduler:
        return DPMSolverMultistepScheduler.from_config(self.scheduler.config)

    def _check(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> None:
        self._check_noise(latents, noise)
        if timesteps.shape != latents.shape[:1] or timesteps.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`timesteps` must be integers of shape ({latents.shape[0]},), got {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}"
            )
        # Elsewhere than on the CPU looking would cost a synchronisation per step.
        if timesteps.device.type == "cpu" and timesteps.numel():
            smallest, largest = timesteps.min().item(), timesteps.max().item()
            if smallest < 0 or largest >= self.num_timesteps:
                raise ValueError(f"`timesteps` must lie in [0, {self.num_timesteps}), got {smallest} to {largest}")

    def _table_rows(self, latents: torch.Tensor, timesteps: torch.Tensor) -> list[torch.Tensor]:
        """The tables at `timesteps`, in the dtype and on the device of `latents`, where they move only once."""
        key = (latents.device, latents.dtype)
        if key not in self._tables:
            self._tables[key] = self._tables[torch.device("cpu"), torch.float64].to(latents.dtype).to(latents.device)
        return [broadcastable(row, latents) for row in self._tables[key][:, timesteps]]


def _ddpm_tables(alphas_cumprod: torch.Tensor, prediction: _Prediction, snr_gamma: float | None) -> torch.Tensor:
    """Log-variance of the posterior, log β, the factor from an error in the target to one in the mean, and the weight
    of the squared error: (4, T)."""
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    betas = 1 - alphas
    # Equation 7 of arXiv 2006.11239. It is 0 at t = 0, where the next one stands in: its log is needed.
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = torch.ones_like(snr) if snr_gamma is None else prediction.weight(snr, snr.clamp(max=snr_gamma))
    error_to_mean = prediction.error_to_mean(alphas, previous, alphas_cumprod)
    return torch.stack([posterior_variance.log(), betas.log(), error_to_mean, weight])


def broadcastable(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value for each sample, shape (B,), in as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def widest_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The widest dtype of `tensors`, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
