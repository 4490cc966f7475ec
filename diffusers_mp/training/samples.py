"""Training samples as functions of (seed, epoch, index), and the order in which optimiser steps consume them.

Nothing here depends on how many processes, workers or micro batches share the work, nor on what was drawn before: so
one process and eight train the same run, and a resumed run needs no stored random state, only its step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..data.draws import keyed_generator, sample_draws


if TYPE_CHECKING:
    from ..data.latents import LatentDataset


def split_validation(
    num_samples: int, num_validation: int, seed: int, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets samples aside for validation: the same ones for the same seed, and more of them contains fewer.

    Args:
        num_samples (int): in the data set.
        num_validation (int): of them to hold out, in [0, num_samples).
        seed (int): of the run.
        labels (torch.Tensor, optional): their class ids, int64, (num_samples,). Each class keeps one sample to train
            on, so that fewer are held out where classes are as small as that.
    Returns:
        tuple[torch.Tensor, torch.Tensor]: sorted indices (int64) for training and for validation.
    Raises:
        ValueError: if nothing would be left to train on.
    """
    if not 0 <= num_validation < num_samples:
        raise ValueError(f"`num_validation` must be in [0, {num_samples}), got {num_validation}.")
    order = torch.randperm(num_samples, generator=keyed_generator(seed))
    if labels is not None:
        # The last of each class in this order goes to its end.
        last = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
        last = last.scatter_reduce(0, labels[order], torch.arange(num_samples), "amax")[labels.unique()]
        is_last = torch.zeros(num_samples, dtype=torch.bool).index_fill(0, last, True)
        order = torch.cat([order[~is_last], order[is_last]])
        num_validation = min(num_validation, num_samples - len(last))
    return order[num_validation:].sort().values, order[:num_validation].sort().values


def hold_out(latents: "LatentDataset", num_validation: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`split_validation` of encoded images, but for the last image of a class.

    Args:
        latents (LatentDataset): encoded images.
        num_validation (int, optional): of them to hold out; 256, at most one in 20, if left out.
        seed (int): of the run.
    Returns:
        tuple[torch.Tensor, torch.Tensor]: as `split_validation` gives them.
    """
    return split_validation(len(latents), num_to_hold_out(len(latents), num_validation), seed, latents.labels())


def num_to_hold_out(num_samples: int, num_validation: int | None) -> int:
    """How many samples are to be held out where no number is given: 256, at most one in 20."""
    return min(256, num_samples // 20) if num_validation is None else num_validation


class TrainingSamples(Dataset):
    """One training sample per (epoch, position): standardised latents, noise, time and class id.

        latents = (mean + std · e - latents_mean) / latents_std       e, noise ~ N(0, 1), time ~ U[0, 1)

    std is 0 of pixels, and of the points of an autoencoder without posteriors. Posterior draw e, noise, time (of which
    the objective makes a timestep), mirroring and label dropout are functions of (seed, epoch, index), where index
    counts the whole data set. All are drawn in a fixed order whether used or not: no option moves another's draw.

    Args:
        dataset (LatentDataset): encoded images.
        seed (int): of the run.
        num_classes (int): of the model; its null id is `num_classes`. None: the model knows no classes.
        class_dropout_prob (float): probability that the condition is dropped: the class id replaced by the null id,
            the condition vector by zeros, both together.
        random_flip (bool): mirror half of the samples.
        indices (Sequence[int]): the samples to use, for a hold-out; all by default.
        latents_mean, latents_std (Sequence[float]): per channel, the units that a pretrained model knows; by default
            those of the data.
    Raises:
        ValueError: if the data have no labels, too many classes or no mirror images for what is asked.
    """

    def __init__(
        self,
        dataset: "LatentDataset",
        *,
        seed: int,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.0,
        random_flip: bool = False,
        indices: Sequence[int] | torch.Tensor | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        if num_classes is not None and dataset.id2label is None:
            raise ValueError(f"`num_classes` must be None for unlabelled data, got {num_classes}.")
        if num_classes is not None and num_classes <= max(dataset.id2label):
            raise ValueError(f"`num_classes` must be at least {max(dataset.id2label) + 1}, got {num_classes}.")
        is_conditional = num_classes is not None or dataset.pooled_projection_dim is not None
        if not 0 <= class_dropout_prob <= is_conditional:
            raise ValueError(
                f"`class_dropout_prob` must be in [0, 1], and 0 without conditions, got {class_dropout_prob}."
            )
        if random_flip and not dataset.can_flip:
            raise ValueError("`random_flip=True` needs data encoded with `random_flip=True`.")
        self.dataset = dataset
        self.seed = seed
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.random_flip = random_flip
        self.indices = torch.arange(len(dataset)) if indices is None else torch.as_tensor(indices)
        self.latents_mean = torch.tensor(latents_mean or dataset.latents_mean).view(-1, 1, 1)
        self.latents_std = torch.tensor(latents_std or dataset.latents_std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int] | list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """One sample, or a batch of them made in one go: the same samples in a fraction of the time.

        Args:
            key (tuple[int, int]): epoch and position in `indices`; or a list of B such keys, what `StreamBatchSampler`
                yields.
        Returns:
            dict[str, torch.Tensor]: `latents` and `noise` (float32, (C, H, W)), `time` (float64 scalar), `index`
            (int64 scalar) and, if the model knows classes, `class_label` (int64 scalar) and, if the data have them,
            `pooled_projections` (float32, (P,)); of a batch all with B in front.
        """
        if not isinstance(key, list):
            return {name: values[0] for name, values in self[[key]].items()}
        epochs, positions = np.array(key, np.int64).T
        indices, shape = self.indices[torch.from_numpy(positions)], (len(key), *self.dataset.latent_shape)
        draws = sample_draws(self.seed, epochs, indices.numpy(), math.prod(shape[1:]))
        (time, flip, dropout), noise, draw = draws[0].unbind(1), *(normal.view(shape) for normal in draws[1:])

        posterior = self.dataset.read_batch(indices, (flip < 0.5) & self.random_flip)
        latents = posterior["mean"]
        if "std" in posterior:
            # Not `addcmul`, which may round a number otherwise at another place of a batch.
            latents.add_(draw.mul_(posterior["std"]))
        latents.sub_(self.latents_mean).div_(self.latents_std)
        batch = {"latents": latents, "noise": noise, "time": time.clone(), "index": indices}
        dropped = dropout < self.class_dropout_prob
        if "pooled_projections" in posterior:
            batch["pooled_projections"] = posterior["pooled_projections"].masked_fill_(dropped[:, None], 0)
        if self.num_classes is not None:
            batch["class_label"] = posterior["label"].masked_fill_(dropped, self.num_classes)
        return batch


def conditions_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The conditions in a batch of `TrainingSamples`, as the model's forward names them.

    Args:
        batch (mapping): may hold `class_label`, (B,), and `pooled_projections`, (B, P).
    Returns:
        dict: `class_labels` and `pooled_projections`, those there are.
    """
    names = {"class_label": "class_labels", "pooled_projections": "pooled_projections"}
    return {name: batch[key] for key, name in names.items() if key in batch}


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro batches of one process, as lists of (epoch, position), cut from one stream that all processes share.

    The stream is one permutation of the data after another, each a function of (seed, epoch). With
    G = train_batch_size · num_processes · gradient_accumulation_steps, optimiser step s consumes its places
    [s·G, (s+1)·G): micro batches in order, within each the processes in order. Batches run over the borders of epochs,
    nothing is dropped or repeated, and a run that resumes at `start_step` continues as if it had not stopped.

    Args:
        num_samples (int): in the data set.
        seed (int): of the run.
        train_batch_size (int): samples per process and micro batch.
        max_train_steps (int): optimiser steps after which the stream ends.
        start_step (int): optimiser steps already done.
        num_processes, process_index (int): how many share the stream, and which one this is.
        gradient_accumulation_steps (int): micro batches per optimiser step.
    Raises:
        ValueError: if a count is not positive, or `start_step` or `process_index` is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        train_batch_size: int,
        max_train_steps: int,
        start_step: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        gradient_accumulation_steps: int = 1,
    ):
        counts = {
            "num_samples": num_samples,
            "train_batch_size": train_batch_size,
            "num_processes": num_processes,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be in [0, {num_processes}), got {process_index}.")
        if not 0 <= start_step <= max_train_steps:
            raise ValueError(f"`start_step` must be in [0, {max_train_steps}], got {start_step}.")
        self.num_samples = num_samples
        self.seed = seed
        self.train_batch_size = train_batch_size
        self.max_train_steps = max_train_steps
        self.start_step = start_step
        self.num_processes = num_processes
        self.process_index = process_index
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def __len__(self) -> int:
        return (self.max_train_steps - self.start_step) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known_epoch, order = None, None
        batch_of_all = self.train_batch_size * self.num_processes
        for micro_step in range(
            self.start_step * self.gradient_accumulation_steps, self.max_train_steps * self.gradient_accumulation_steps
        ):
            first = micro_step * batch_of_all + self.process_index * self.train_batch_size
            batch = []
            while len(batch) < self.train_batch_size:
                epoch, place = divmod(first + len(batch), self.num_samples)
                if epoch != known_epoch:
                    known_epoch = epoch
                    order = torch.randperm(self.num_samples, generator=keyed_generator(self.seed, epoch))
                positions = order[place : place + self.train_batch_size - len(batch)].tolist()
                batch += [(epoch, position) for position in positions]
            yield batch
