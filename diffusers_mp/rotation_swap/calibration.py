"""The mean of each shift over samples, which takes the place of the shift."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .sites import Site


@torch.no_grad()
def mean_shifts(model: nn.Module, sites: Sequence[Site], calibration: Iterable[Mapping]) -> dict[str, torch.Tensor]:
    """Mean of each shift over the samples of the calibration, shape (number of rotations, D) for each site."""
    sums, counts = {site.name: 0.0 for site in sites}, {site.name: 0 for site in sites}

    def record(site: Site):
        def hook(linear, args, output):
            rows = output.float().flatten(0, -2)
            sums[site.name] = sums[site.name] + rows.sum(dim=0)
            counts[site.name] += len(rows)

        return hook

    handles = [site.linear.register_forward_hook(record(site)) for site in sites]
    modes = {module: module.training for module in model.modules()}
    # Labels must not be dropped, as some embeddings do in training mode.
    model.eval()
    try:
        for inputs in calibration:
            if not isinstance(inputs, Mapping):
                raise ValueError(
                    f"`calibration` must be an iterable of mappings, got a {type(inputs).__name__} in it."
                )
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    unused = [name for name, count in counts.items() if not count]
    if unused:
        raise ValueError(
            f"`calibration` must run every modulation of the model at least once, it did not run {unused}."
        )
    means = {}
    for site in sites:
        mean = (sums[site.name] / counts[site.name]).unflatten(0, (len(site.kinds), -1))
        means[site.name] = mean[[index for index, kind in enumerate(site.kinds) if kind == "rotate"]]
    return means
