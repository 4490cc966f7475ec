"""The two terms of the variational bound: a divergence of Normals, and the likelihood of discrete levels."""

import torch


# Half the width of one of the 256 levels of a pixel in [-1, 1], as the discretised likelihood of DDPM counts them.
HALF_BIN = 1 / 255
# Values beyond this fall into the outermost levels, which reach to infinity.
LAST_BIN = 0.999
# A level's probability below this is taken for this, so that the likelihood of a far outlier stays finite.
MIN_PROBABILITY = 1e-12


def normal_kl(mean_difference: torch.Tensor, log_variance_q: torch.Tensor, log_variance_p: torch.Tensor):
    """KL(N(m, σq²) ‖ N(m + difference, σp²)) in nats, elementwise."""
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + mean_difference.square() * torch.exp(-log_variance_p))


def discretized_log_likelihood(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
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
