"""What a model may predict of a noisy sample, and what an error in it counts in other units.

    x_t = s x + r ε                        (signal s and rate r: √ᾱ and √(1 - ᾱ) of a diffusion, 1 - t and t of a flow)
    v   = s ε - r x,  for a flow ε - x
Given x_t, each of x, ε and v is an affine function of each other one, and for both kinds of v errors are as

    |δx| : |δε| : |δv| = r : s : 1

Nothing heavy is imported, so that a script can name the choices at once.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# Units of x, ε and v, in which a loss may be taken.
LOSS_SPACES = ("sample", "epsilon", "velocity")
# Unit of what a model predicts, by the names of diffusers' schedulers; those know `flow_prediction` alone of flows.
SPACE_OF = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "velocity",
    "flow_epsilon": "epsilon",
    "flow_sample": "sample",
    "flow_prediction": "velocity",
}
FLOW_PREDICTIONS = tuple(name for name in SPACE_OF if name.startswith("flow_"))
# What s and r are at least where something is divided by them: that of JiT (arXiv 2511.13720).
MIN_DENOMINATOR = 0.05
# What a sampler's t is at least. It divides by t and then goes a step of t at most, which needs no larger one.
MIN_TIME = 1e-7


def error_factor(predicted: str, space: str, signal: "torch.Tensor", rate: "torch.Tensor") -> "torch.Tensor":
    """What an error of 1 in a prediction is in the units of a loss.

        r, s or 1 of `space` over r, s or 1 of `predicted`
    The denominator is clipped at `MIN_DENOMINATOR`, as if prediction and target were converted with it.

    Args:
        predicted (str): unit of the prediction, one of `LOSS_SPACES`.
        space (str): unit of the loss, one of them.
        signal (torch.Tensor): share of the clean sample, in [0, 1], any shape.
        rate (torch.Tensor): share of the noise, shape of `signal`.
    Returns:
        torch.Tensor: shape of `signal`, not negative; 1 for equal units.
    """
    size = {"sample": rate, "epsilon": signal, "velocity": signal.new_ones(signal.shape)}
    if predicted == space:
        return size["velocity"]
    return size[space] / size[predicted].clamp(min=MIN_DENOMINATOR)


def flow_velocity(
    prediction: "torch.Tensor", noisy: "torch.Tensor", time: float, prediction_type: str
) -> "torch.Tensor":
    """Velocity ε - x of a flow, which its samplers take, of what a model predicts.

        (x_t - x) / t,  (ε - x_t) / (1 - t)
    Where x is predicted t is clipped at `MIN_TIME`, so that it is exact at all steps. Where ε is predicted x is
    (x_t - t ε) / (1 - t) with 1 - t clipped at `MIN_DENOMINATOR`: noise says less and less about x, an error in it
    would be multiplied without bound, and at t = 1 x becomes the mean of standardised latents, 0.

    Args:
        prediction (torch.Tensor): the model's output, any shape.
        noisy (torch.Tensor): x_t, shape of `prediction`.
        time (float): share of the noise t, in [0, 1].
        prediction_type (str): one of `FLOW_PREDICTIONS`.
    Returns:
        torch.Tensor: shape of `prediction`.
    """
    if prediction_type == "flow_sample":
        return (noisy - prediction) / max(time, MIN_TIME)
    if prediction_type == "flow_epsilon":
        if 1 - time < MIN_DENOMINATOR:
            clean = (noisy - time * prediction) / MIN_DENOMINATOR
            return (noisy - clean) / time
        return (prediction - noisy) / (1 - time)
    return prediction
