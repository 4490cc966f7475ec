"""Class ids or names in, images out."""

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from . import autoencoders, call_inputs, guidance, schedulers
from .configuration import check_latent_statistics
from .lora import TransformerLoraLoaderMixin
from .transformer_mpdit import MPDiTTransformer2DModel


class MPDiTPipeline(DiffusionPipeline, TransformerLoraLoaderMixin):
    """Class-conditional or unconditional image generation with an `MPDiTTransformer2DModel`.

    The transformer works on standardised latents, `(z - latents_mean) / latents_std` per channel, where z is the
    undivided latent of the VAE, as `autoencoders.encode` gives it (or, without a VAE, the image in [-1, 1]); the
    statistics travel with the pipeline.

    Args:
        transformer (MPDiTTransformer2DModel): the denoiser.
        scheduler (SchedulerMixin): noise schedule and sampler, for what the transformer predicts.
        vae (ModelMixin, optional): decoder of latents, of a class in `autoencoders.py`; None for a model of pixels.
        id2label (dict, optional): names of the classes; synonyms in one name are separated by commas.
        latents_mean (list of float, optional): mean of the training data's latents, one for each channel.
        latents_std (list of float, optional): standard deviation, one for each channel. Without both, a VAE's own
            `scaling_factor` and `shift_factor` are used.
        guidance_transformer (MPDiTTransformer2DModel, optional): a weaker model of the same task to guide away from,
            in place of the null condition: smaller, or an earlier snapshot (autoguidance, arXiv 2406.02507).
        guider (BaseGuidance, optional): a guider of `diffusers.guiders` that makes one prediction of two, in place of
            `guidance_scale`: it brings its own scale, start and stop.
        prediction_type (str, optional): what the transformer predicts, as schedulers name it: "epsilon",
            "v_prediction", "sample", or "flow_prediction", the velocity of a flow; "flow_sample" and "flow_epsilon",
            of which the velocity is made; "edm_epsilon" and "edm_v_prediction" for one trained with EDM's
            preconditioning. By default what `scheduler` takes it for. A scheduler that takes it for something else,
            put in later or on loading, is refused.
    Raises:
        TypeError: if a transformer is not of this package, or the scheduler or guider not of diffusers.
        ValueError: if the components do not fit each other, or the guider needs more than two predictions.
    """

    __module__ = "diffusers_mp"

    # The guidance transformer has no place in this chain, which would send one of the two away and back at every step:
    # so it gets its own hook, and stays beside the transformer for a whole call.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guidance_transformer", "guider"]
    _callback_tensor_inputs = ["latents", "noise_pred"]

    def __init__(
        self,
        transformer: MPDiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler,
        vae: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        guidance_transformer: MPDiTTransformer2DModel | None = None,
        guider: BaseGuidance | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        guidance.check_transformer(transformer)
        if not isinstance(scheduler, SchedulerMixin):
            raise TypeError(f"`scheduler` must be a scheduler of diffusers, got a {type(scheduler).__name__}.")
        guidance.check_guidance_transformer(guidance_transformer, transformer)
        guidance.check_guider(guider)
        in_channels, num_classes = transformer.config.in_channels, transformer.config.num_classes
        if vae is not None and (latent_channels := autoencoders.geometry(vae).latent_channels) != in_channels:
            raise ValueError(
                f"`vae` must have as many latent channels as the transformer has input channels ({in_channels}), got "
                f"{latent_channels}."
            )
        check_latent_statistics(latents_mean, latents_std, in_channels)
        # JSON knows string keys only.
        id2label = None if id2label is None else {int(id): label for id, label in id2label.items()}
        if id2label is not None and sorted(id2label) != list(range(num_classes or 0)):
            raise ValueError(
                f"`id2label` must name the ids 0 to {(num_classes or 0) - 1} of the transformer's `num_classes` "
                f"({num_classes}), got {len(id2label)} ids."
            )

        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            guidance_transformer=guidance_transformer,
            guider=guider,
        )
        self.register_to_config(
            id2label=None if id2label is None else {str(id): label for id, label in id2label.items()},
            latents_mean=None if latents_mean is None else [float(value) for value in latents_mean],
            latents_std=None if latents_std is None else [float(value) for value in latents_std],
            prediction_type=schedulers.prediction_type_of(scheduler) if prediction_type is None else prediction_type,
        )
        schedulers.check_scheduler(self.scheduler, self.config.prediction_type)
        self.id2label = id2label
        self.vae_scale_factor = 1 if vae is None else autoencoders.geometry(vae).factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "MPDiTPipeline":
        """Another pipeline of the same parts, and of others given by name, which share their memory.

        As in diffusers, but that parts keep their dtypes where none is asked for.

        Args:
            pipeline (DiffusionPipeline): what to take parts and settings from.
            kwargs: arguments of `MPDiTPipeline` that replace those of `pipeline`; `dtype`, or `torch_dtype`, for all
                parts.
        Returns:
            MPDiTPipeline: the new pipeline.
        Raises:
            TypeError: if there is no transformer of this package, or an argument is unknown.
            ValueError: if the components do not fit each other.
        """
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", torch_dtype)
        own = {**pipeline.config, **pipeline.components}
        names = inspect.signature(cls).parameters
        other = cls(**{"transformer": None, **{name: own[name] for name in names if name in own}, **kwargs})
        if "_name_or_path" in pipeline.config:
            other.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return other if dtype is None else other.to(dtype=dtype)

    @property
    def guidance_scale(self) -> float | None:
        """Guidance scale of the call in progress; None with a guider, which has its own."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress needs unconditional predictions, at some steps at least."""
        return self.guidance_transformer is None and (self.guider is not None or self._guidance_scale != 1)

    @property
    def num_timesteps(self) -> int:
        """Number of sampling steps of the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """Class ids for ids and names; a string is always a name.

        Args:
            class_labels (int, str, sequence of them, or integer tensor): an id in [0, num_classes), or a name (or one
                of its comma-separated synonyms) of `id2label`.
        Returns:
            list of int: one id for each label.
        Raises:
            ValueError: if an id is out of range, or a name is unknown or stands for several classes.
        """
        return call_inputs.label_ids(class_labels, self.transformer.config.num_classes, self.id2label)

    def check_guidance(
        self, guidance_scale: float | None, guidance_interval: tuple[float, float] | None = None
    ) -> None:
        """Check that the components can guide as asked.

        Args:
            guidance_scale (float, optional): as in `__call__`, default filled in; None with a guider.
            guidance_interval (tuple of float, optional): as in `__call__`.
        Raises:
            TypeError: if the guider is not of diffusers.
            ValueError: if the guider needs more than two predictions, or has a scale or interval given beside its own;
                if the scale is not finite or the interval not in order; if there is nothing to guide away from,
                neither a null condition that the transformer saw in training nor a guidance transformer; if that one
                is of another task.
        """
        guidance.check_guidance(self, guidance_scale, guidance_interval)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        init_noise_sigma: float | torch.Tensor,
    ) -> torch.Tensor:
        """Initial noise at the magnitude that the scheduler starts from.

        Args:
            batch_size (int): number of images B.
            height (int): height of the images in pixels.
            width (int): width of the images in pixels.
            generator (torch.Generator or list of them, optional): one for all or one for each image.
            latents (torch.Tensor or numpy.ndarray, optional): noise of RMS 1 to use instead of drawing it.
            init_noise_sigma (float or torch.Tensor): the magnitude, which some schedulers know once timesteps are set.
        Returns:
            torch.Tensor: shape (B, C, height / vae_scale_factor, width / vae_scale_factor), at least float32.
        Raises:
            ValueError: if `latents` or the list of generators does not fit.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, self.transformer.config.in_channels, height // factor, width // factor)
        # Samplers accumulate small steps, which half precision loses; the transformer gets its own dtype in the loop.
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        has_others = not all(isinstance(one, torch.Generator) for one in generators)
        if has_others or isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one torch.Generator or a list with one for each of the {batch_size} images, got "
                f"{generator if has_others else len(generator)}."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif not isinstance(latents, (torch.Tensor, np.ndarray)) or latents.shape != shape:
            got = getattr(latents, "shape", None)
            raise ValueError(
                f"`latents` must be a tensor of shape {shape}, got "
                f"{type(latents).__name__ if got is None else tuple(got)}."
            )
        else:
            latents = torch.as_tensor(latents).to(device=self._execution_device, dtype=dtype)
        return latents * init_noise_sigma

    def decode_latents(
        self, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Standardised latents to images.

        Args:
            latents (torch.Tensor): shape (B, C, h, w), as the transformer sees them.
            generator (torch.Generator or list of them, optional): for a VAE whose decoder draws noise.
        Returns:
            torch.Tensor: images of about [-1, 1], shape (B, channels, height, width).
        """
        if self.config.latents_mean is not None:
            statistics = self.config.latents_mean, self.config.latents_std
            mean, std = (latents.new_tensor(values).reshape(1, -1, 1, 1) for values in statistics)
            latents = latents * std + mean
        elif self.vae is not None:
            latents = autoencoders.to_units_of_autoencoder(self.vae, latents)
        return latents if self.vae is None else autoencoders.decode(self.vae, latents, generator)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        negative_pooled_projections: torch.Tensor | None = None,
        num_images_per_class: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MPDiTPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor]:
        """Generate images.

        Args:
            class_labels (int, str, list of them, or integer tensor): class ids and names, one for each image; a string
                is always a name. None for a transformer without classes.
            pooled_projections (torch.Tensor, optional): condition vectors, shape (N, pooled_projection_dim), one for
                each image, for a transformer that takes them; beside class labels as many as there are labels.
            negative_pooled_projections (torch.Tensor, optional): what guidance leads away from, shape (1 or N,
                pooled_projection_dim); by default zeros, which the transformer knows as no condition.
            num_images_per_class (int): images for each class label or condition vector, which follow each other.
            height (int, optional): height of the images in pixels; that of training by default.
            width (int, optional): width of the images in pixels; that of training by default.
            num_inference_steps (int): number of sampling steps; without effect where they are given.
            timesteps (sequence of float, optional): the steps, descending, in place of the scheduler's own, for one of
                a diffusion whose `set_timesteps` takes them.
            sigmas (sequence of float, optional): noise levels of the steps, descending, for a scheduler whose
                `set_timesteps` takes them and as it takes them: an EulerDiscreteScheduler with the last one, 0, one
                of a flow without it and before its shift.
            guidance_scale (float, optional): w in `u + w (c - u)`, for all channels, c being the prediction and u that
                of the null condition (arXiv 2207.12598 with its weight w - 1) or of the guidance transformer (arXiv
                2406.02507); 1 switches guidance off. By default 2 with a guidance transformer, 4 for a
                transformer trained with dropped conditions, else 1. None with a guider, which has its own.
            guidance_interval (tuple of float, optional): noise levels (low, high) between which to guide, at
                low < sigma <= high (arXiv 2404.07724); elsewhere u is not computed and the prediction is c.
                Sigma is the share of the noise over that of the signal: sqrt(1 / alpha_bar - 1), for a flow
                t / (1 - t). All noise levels by default.
            generator (torch.Generator or list of them, optional): one for all or one for each image.
            latents (torch.Tensor or numpy.ndarray, optional): initial noise of RMS 1, shape (B, C,
                height / vae_scale_factor, width / vae_scale_factor).
            output_type (str): "pil", "np" (B, H, W, channels in [0, 1]), "pt" (B, channels, H, W in [0, 1]) or
                "latent" (the transformer's standardised latents).
            return_dict (bool): return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end (callable, optional): called after each step as
                `callback(pipe, step, timestep, tensors)`; "latents" in the dict it returns replace those of the loop,
                None changes nothing. It may set `pipe._guidance_scale` for the next steps.
            callback_on_step_end_tensor_inputs (list of str, optional): tensors for the callback, out of "latents"
                (the default) and "noise_pred". A `PipelineCallback` of diffusers brings its own.
        Returns:
            ImagePipelineOutput or tuple: `images`.
        Raises:
            TypeError: if a transformer is not of this package, or the guider not of diffusers; if a callback returns
                something else than a dict or None.
            ValueError: naming the argument, the rule and what it got.
        """
        guidance.check_transformer(self.transformer)
        size_of_training = self.transformer.config.sample_size * self.vae_scale_factor
        height = size_of_training if height is None else height
        width = size_of_training if width is None else width
        if guidance_scale is None:
            guidance_scale = guidance.default_scale(self)
        if isinstance(generator, tuple):
            generator = list(generator)  # diffusers' randn_tensor knows lists only
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        names_for_callback = callback_on_step_end_tensor_inputs or ["latents"]

        # 1. Check the arguments against the components, which may have been exchanged since the last call
        numbers = {"num_images_per_class": num_images_per_class, "num_inference_steps": num_inference_steps}
        call_inputs.check_inputs(self, numbers, height, width, output_type, names_for_callback)
        conditions = call_inputs.conditions(self, class_labels, pooled_projections, num_images_per_class)
        batch_size = len(next(iter(conditions.values()), range(num_images_per_class)))
        self.check_guidance(guidance_scale, guidance_interval)
        # A callback may switch guidance on.
        first_scale = guidance_scale if callback_on_step_end is None else None
        guidance.check_negative(self, negative_pooled_projections, pooled_projections, first_scale)
        schedulers.check_scheduler(self.scheduler, self.config.prediction_type)

        # 2. Timesteps, and what predicts at each of them
        scheduler = schedulers.sampler_of(self.scheduler, self.transformer)
        side = self.vae_scale_factor * self.transformer.config.patch_size
        num_tokens = (height // side) * (width // side)
        call_inputs.set_timesteps(scheduler, num_tokens, num_inference_steps, timesteps, sigmas)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(scheduler.timesteps), False
        predict = guidance.GuidedPrediction(
            self, scheduler, conditions, negative_pooled_projections, guidance_interval
        )

        # 3. Initial noise; some schedulers know its magnitude only after their timesteps
        # Those of flows do not know it: a flow starts from noise of RMS 1, and leaves the model's input as it is.
        init_noise_sigma = getattr(scheduler, "init_noise_sigma", 1.0)
        latents = self.prepare_latents(batch_size, height, width, generator, latents, init_noise_sigma)
        scales_input = hasattr(scheduler, "scale_model_input")
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_options = {"return_dict": False, **({"generator": generator} if takes_generator else {})}

        # 4. Denoise
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step, timestep in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                model_input = scheduler.scale_model_input(latents, timestep) if scales_input else latents
                noise_pred = predict(step, timestep, model_input)
                latents = scheduler.step(noise_pred, timestep, latents, **step_options)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "noise_pred": noise_pred}
                    tensors = {name: tensors[name] for name in names_for_callback}
                    latents = call_inputs.latents_after(callback_on_step_end(self, step, timestep, tensors), latents)
                progress_bar.update()

        # 5. Decode
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents, generator), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
