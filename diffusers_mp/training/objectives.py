"""Training objectives: from clean latents and noise to a loss per sample."""

import math

import torch
from diffusers import DDPMScheduler


# Half the width of one of the 256 levels of a pixel in [-1, 1], as the discretised likelihood of DDPM counts them.
HALF_BIN = 1 / 255
# Values beyond this fall into the outermost levels, which reach to infinity.
LAST_BIN = 0.999
# A level's probability below this is taken for this, so that the likelihood of a far outlier stays finite.
MIN_PROBABILITY = 1e-12

LEARNED_RANGE = "learned_range"
# `learned` (no range) has no bound to train it by; `fixed_large_log` makes diffusers' step take the root of a log.
VARIANCE_TYPES = (LEARNED_RANGE, "fixed_small", "fixed_small_log", "fixed_large")


class DDPMObjective:
    """Noise prediction with a learned variance: squared error plus the variational bound of the drawn timestep.

        x_t  = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
        mse  = mean (ε̂ - ε)²
        vb   = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) for t > 0, -log p(x_0 | x_1) for t = 0, in bits, mean
        loss = mse + vb
    Equations 5, 6, 15 and 16 of improved DDPM (arXiv 2102.09672), trained on latents as by DiT (arXiv 2212.09748): the
    predicted mean is detached in the bound, so that `vb` trains the variance and `mse` the noise. Weight 1 on the
    bound of one timestep out of 1000 is λ = 0.001 on the whole bound. With a fixed variance `vb` has no gradient at
    all: it is reported, and `loss` is `mse`.

    At t = 0 the likelihood is that of pixel levels of width 2/255 whose outermost are open (beyond ±0.999). Latents
    have no levels; this is what the published runs train on, kept so that they can be reproduced.

    `clip_sample` and `thresholding` belong to the sampler and do nothing here.

    Args:
        scheduler (DDPMScheduler): gives `alphas_cumprod`, from which every table is derived as its own `step` derives
            them, so that the bound trained is that of the sampler. `variance_type` `learned_range` asks for
            predictions of 2C channels, noise then interpolation; `fixed_small`, `fixed_small_log` and `fixed_large`
            for C.
    Attributes:
        num_timesteps (int): timesteps to draw from, 0 to this exclusive.
        learns_variance (bool): whether predictions have 2C channels.
    Raises:
        TypeError: if `scheduler` is not a `DDPMScheduler`.
        ValueError: if its `prediction_type` or `variance_type` is not supported, or it ends at zero signal.
    """

    def __init__(self, scheduler: DDPMScheduler):
        if not isinstance(scheduler, DDPMScheduler):
            raise TypeError(f"`scheduler` must be a DDPMScheduler, received {type(scheduler).__name__}")
        prediction_type, variance_type = scheduler.config.prediction_type, scheduler.config.variance_type
        if prediction_type != "epsilon":
            raise ValueError(f"`prediction_type` of `scheduler` must be 'epsilon', received {prediction_type!r}")
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(
                f"`variance_type` of `scheduler` must be one of {list(VARIANCE_TYPES)}, received {variance_type!r}"
            )
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
        if alphas_cumprod[-1] <= 0:
            raise ValueError(
                "`alphas_cumprod` of `scheduler` must stay above 0, since without signal the noise says nothing about "
                f"the sample, received {alphas_cumprod[-1].item()} at the last timestep (`rescale_betas_zero_snr`)"
            )
        self.scheduler = scheduler
        self.num_timesteps = len(alphas_cumprod)
        self.learns_variance = variance_type == LEARNED_RANGE
        self._fixed_large = variance_type == "fixed_large"
        self._tables = {(torch.device("cpu"), torch.float64): _ddpm_tables(alphas_cumprod)}

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents x_t, computed in at least float32: in bf16 the scheduler's ᾱ_0 is 1 and adds no noise.

        Args:
            latents (torch.Tensor): clean standardised latents, shape (B, C, H, W).
            noise (torch.Tensor): standard normal, shape of `latents`.
            timesteps (torch.Tensor): integers in [0, num_timesteps), shape (B,).
        Returns:
            torch.Tensor: shape and dtype of `latents`.
        Raises:
            ValueError: if shapes disagree, or `timesteps` are not integers or, on the CPU, out of range.
        """
        self._check(latents, noise, timesteps)
        dtype = _compute_dtype(latents, noise)
        return self.scheduler.add_noise(latents.to(dtype), noise.to(dtype), timesteps).to(latents.dtype)

    def loss(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses per sample of a prediction for `add_noise(latents, noise, timesteps)`.

        Args:
            prediction (torch.Tensor): the model's output, shape (B, 2C, H, W) with a learned variance, noise first and
                then the interpolation v between the log-variances; else (B, C, H, W).
            latents (torch.Tensor): clean standardised latents, shape (B, C, H, W).
            noise (torch.Tensor): the noise that was added, shape of `latents`.
            timesteps (torch.Tensor): integers in [0, num_timesteps), shape (B,).
        Returns:
            dict: `loss`, `mse` and `vb` (bits per dimension), each of shape (B,), at least float32.
        Raises:
            ValueError: as in `add_noise`, or if the shape of `prediction` is another.
        """
        self._check(latents, noise, timesteps)
        expected = (latents.shape[0], latents.shape[1] * (2 if self.learns_variance else 1), *latents.shape[2:])
        if prediction.shape != expected:
            raise ValueError(
                f"`prediction` must have shape {expected} for latents of {latents.shape[1]} channels and "
                f"`variance_type` {self.scheduler.config.variance_type!r}, received {tuple(prediction.shape)}"
            )
        dtype = _compute_dtype(prediction, latents, noise)
        prediction, latents, noise = prediction.to(dtype), latents.to(dtype), noise.to(dtype)
        timesteps = timesteps.to(latents.device)
        min_log_variance, max_log_variance, noise_to_mean = self._table_rows(latents, timesteps)

        if self.learns_variance:
            predicted_noise, interpolation = prediction.chunk(2, dim=1)
            # v = -1 is the variance of the posterior, v = +1 is β (arXiv 2102.09672, equation 15).
            log_variance = min_log_variance + (interpolation + 1) / 2 * (max_log_variance - min_log_variance)
        else:
            predicted_noise = prediction
            log_variance = (max_log_variance if self._fixed_large else min_log_variance).expand_as(latents)

        noise_error = predicted_noise - noise
        mse = noise_error.square().flatten(1).mean(dim=1)
        # Both means come from the same x_t, so their difference needs no x_t: it is the error in the noise, scaled
        # (arXiv 2006.11239, equation 12). At t = 0 the posterior's mean is the sample itself.
        mean_error = -noise_to_mean * noise_error.detach()
        nats = torch.where(
            _broadcastable(timesteps == 0, latents),
            -_discretized_log_likelihood(latents, latents + mean_error, log_variance),
            _normal_kl(mean_error, min_log_variance, log_variance),
        )
        vb = nats.flatten(1).mean(dim=1) / math.log(2)
        return {"loss": mse + vb if self.learns_variance else mse, "mse": mse, "vb": vb}

    def _check(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> None:
        if noise.shape != latents.shape:
            raise ValueError(f"`noise` must have shape {tuple(latents.shape)}, received {tuple(noise.shape)}")
        if timesteps.shape != latents.shape[:1] or timesteps.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`timesteps` must be integers of shape ({latents.shape[0]},), received {timesteps.dtype} of shape "
                f"{tuple(timesteps.shape)}"
            )
        # Elsewhere than on the CPU looking would cost a synchronisation per step.
        if timesteps.device.type == "cpu" and timesteps.numel():
            smallest, largest = timesteps.min().item(), timesteps.max().item()
            if smallest < 0 or largest >= self.num_timesteps:
                raise ValueError(
                    f"`timesteps` must lie in [0, {self.num_timesteps}), received {smallest} to {largest}"
                )

    def _table_rows(self, latents: torch.Tensor, timesteps: torch.Tensor) -> list[torch.Tensor]:
        """The tables at `timesteps`, in the dtype and on the device of `latents`, where they move only once."""
        key = (latents.device, latents.dtype)
        if key not in self._tables:
            self._tables[key] = self._tables[torch.device("cpu"), torch.float64].to(latents.dtype).to(latents.device)
        return [_broadcastable(row, latents) for row in self._tables[key][:, timesteps]]


def _ddpm_tables(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Log-variance of the posterior, log β, and the factor from an error in the noise to one in the mean: (3, T)."""
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    betas = 1 - alphas
    # Equation 7 of arXiv 2006.11239. It is 0 at t = 0, where the next one stands in: its log is needed.
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]
    # Equation 11 of arXiv 2006.11239.
    noise_to_mean = betas / (alphas * (1 - alphas_cumprod)).sqrt()
    return torch.stack([posterior_variance.log(), betas.log(), noise_to_mean])


def _normal_kl(mean_difference: torch.Tensor, log_variance_q: torch.Tensor, log_variance_p: torch.Tensor):
    """KL(N(m, σq²) ‖ N(m + difference, σp²)) in nats, elementwise."""
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + mean_difference.square() * torch.exp(-log_variance_p))


def _discretized_log_likelihood(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of the level a value falls into, elementwise: equation 13 of arXiv 2006.11239."""
    precision = torch.exp(-0.5 * log_variance)
    distance = sample - mean
    below = _normal_cdf((distance + HALF_BIN) * precision)
    above = _normal_cdf((HALF_BIN - distance) * precision)
    # Taken on the side of the lower tail, where a difference of probabilities keeps its digits.
    nearest, farthest = HALF_BIN - distance.abs(), -HALF_BIN - distance.abs()
    inside = _normal_cdf(nearest * precision) - _normal_cdf(farthest * precision)
    probability = torch.where(sample < -LAST_BIN, below, torch.where(sample > LAST_BIN, above, inside))
    return probability.clamp(min=MIN_PROBABILITY).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    # erfc keeps relative precision in the lower tail, where torch.special.ndtr loses it in float32.
    return 0.5 * torch.erfc(x * -(0.5**0.5))


def _broadcastable(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
