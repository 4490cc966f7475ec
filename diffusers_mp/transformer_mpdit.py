"""The magnitude-preserving diffusion transformer: DiT in configurations A to E of arXiv 2505.19122, and F."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from . import _registration, functional, fused  # noqa: F401
from .blocks import MPDiTConditioning, MPDiTOutput, MPDiTTransformerBlock
from .configuration import Parts, check_configuration
from .layers import MPPatchEmbed
from .rows import AdaptedModelOfRows


# Arguments of `forward`: the key of the config that wants one, which dtype is right, that in words, and the way out.
_INPUTS = {
    "timestep": (
        None,
        lambda timestep: timestep.dtype not in (torch.bfloat16, torch.float16),
        "integers or at least float32",
        "half precision rounds neighbouring steps to one value; `torch.full({shape}, step)` is one step for all",
    ),
    "class_labels": (
        "num_classes",
        lambda class_labels: class_labels.dtype in (torch.int64, torch.int32),
        "integers (int64 or int32)",
        "the null id {wanted} stands for no class",
    ),
    "pooled_projections": (
        "pooled_projection_dim",
        torch.Tensor.is_floating_point,
        "floating point vectors",
        "a vector of zeros stands for no condition",
    ),
}


class MPDiTTransformer2DModel(AdaptedModelOfRows, ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Class-conditional diffusion transformer, magnitude preserving in its default configuration (E).

    Every linear map, activation and sum keeps RMS 1, so that no normalisation layer is needed. `get_preset` gives the
    published sizes and configurations. Sources: arXiv 2505.19122, and arXiv 2212.09748 for configuration A. Differs
    from the paper's research code: time features are smooth in t, weights are normalised after the optimiser step
    rather than inside `forward`.

    Args:
        num_attention_heads (int): number of attention heads H.
        attention_head_dim (int): channels per head; the width D is their product, divisible by 4.
        num_layers (int): number of transformer blocks.
        in_channels (int): channels C of the input.
        out_channels (int, optional): channels of the output; `in_channels` if None. Twice `in_channels` when the
            variance is learned.
        sample_size (int): height and width of the training samples; any size divisible by `patch_size` can be passed.
        patch_size (int): side of a patch.
        mlp_ratio (float): hidden width of the feed-forward in units of D.
        num_classes (int, optional): number of classes; None for an unconditional model. The null id is `num_classes`.
        class_dropout_prob (float): share of labels that training replaced by the null id; a record, which guidance
            needs. The model itself drops nothing.
        modulation (list of str): non-empty subset of "scale", "shift", "rotate", "gate".
        residual_t (float): weight of a branch in the MP sum with the residual stream.
        activation_fn (str): "silu" or "leaky_relu".
        cosine_attention (bool): queries and keys at RMS 1.
        weight_normalization (bool): unit rows on use, gains, gate `1 + g`; else plain maps, modulations and output
            starting at 0, gate `g`.
        forced_weight_normalization (bool): rows return to norm 1 after each update; needs `weight_normalization`.
        mp_residual (bool): MP sum for input, conditioning and residuals; else plain sums.
        mp_silu (bool): activations scaled to keep RMS 1.
        mp_pos_embed (bool): position rows centred and scaled to RMS 1.
        mp_embedding (bool): label rows at RMS 1, time features times sqrt(2).
        layer_norm (bool): LayerNorm without parameters before each modulation.
        max_magnitude (float, optional): largest RMS of a token of the residual stream after each sum, and of what a
            branch adds to it after its gate; None is no limit.
        pooled_projection_dim (int, optional): width P of a pooled vector that conditions the model, beside class
            labels or, with `num_classes=None`, instead of them. A vector of zeros stands for no condition.
    Raises:
        ValueError: if an argument is outside of these rules.
    """

    __module__ = "diffusers_mp"

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MPDiTConditioning", "MPDiTTransformerBlock", "MPDiTOutput"]
    _repeated_blocks = ["MPDiTTransformerBlock"]
    # Both ends of the model; gains are exact anyway, since only linear maps and tables are cast.
    _skip_layerwise_casting_patterns = ["patch_embed", "conditioning_embedder", "output"]
    # Tokens are divided; the conditioning vector goes to every process.
    _cp_plan = {
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
        },
        "output": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        in_channels: int = 4,
        out_channels: int | None = None,
        sample_size: int = 16,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        modulation: Sequence[str] = ("scale", "rotate", "gate"),
        residual_t: float = functional.RESIDUAL_T,
        activation_fn: str = "silu",
        cosine_attention: bool = True,
        weight_normalization: bool = True,
        forced_weight_normalization: bool = True,
        mp_residual: bool = True,
        mp_silu: bool = True,
        mp_pos_embed: bool = True,
        mp_embedding: bool = True,
        layer_norm: bool = False,
        max_magnitude: float | None = None,
        pooled_projection_dim: int | None = None,
    ):
        super().__init__()
        # The decorator has put the arguments into the config.
        self.register_to_config(**check_configuration(self.config))
        parts = Parts(self.config)
        self.inner_dim = parts.dim
        self.gradient_checkpointing = False

        self.patch_embed = MPPatchEmbed(patch_size, in_channels, parts.dim, parts.linear)
        self.conditioning_embedder = MPDiTConditioning(parts)
        self.transformer_blocks = nn.ModuleList(MPDiTTransformerBlock(parts) for _ in range(num_layers))
        self.output = MPDiTOutput(parts)
        if not weight_normalization:
            self.conditioning_embedder.initialize_as_dit()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict from noisy samples.

        Args:
            hidden_states (torch.Tensor): noisy samples, shape (B, C, H, W), RMS about 1, H and W divisible by the
                patch size.
            timestep (torch.Tensor): shape (B,), integer or at least float32; fractions are meaningful.
            class_labels (torch.Tensor, optional): integer class ids, shape (B,), in [0, num_classes]; `num_classes` is
                the null id. None for a model without classes.
            pooled_projections (torch.Tensor, optional): vectors of shape (B, P) for a model with
                `pooled_projection_dim` P; one of zeros stands for no condition.
            return_dict (bool): return a `Transformer2DModelOutput` rather than a tuple.
        Returns:
            Transformer2DModelOutput or tuple: `sample`, shape (B, C_out, H, W).
        Raises:
            ValueError: if an argument has the wrong shape or dtype or, where that can be checked without asking a
                device, is out of range.
        """
        self._check_inputs(hidden_states, timestep, class_labels, pooled_projections)
        self._check_free_rows()
        patch_size = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch_size, hidden_states.shape[-1] // patch_size
        dtype = hidden_states.dtype

        # 1. Input
        conditioning = self.conditioning_embedder(timestep, class_labels, pooled_projections, dtype)
        hidden_states = self.patch_embed(hidden_states)
        positions = functional.position_table(
            height, width, self.inner_dim, hidden_states.device, hidden_states.dtype, self.config.mp_pos_embed
        )
        if self.config.mp_residual:
            hidden_states = fused.mp_sum(hidden_states, positions, functional.BALANCED_T)
        else:
            hidden_states = hidden_states + positions

        # 2. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)

        # 3. Output
        hidden_states = self.output(hidden_states, conditioning)
        sample = functional.unpatchify(hidden_states, patch_size, height, width)

        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub_options,
    ) -> "MPDiTTransformer2DModel":
        """Load from one safetensors file, apart from its folder.

        diffusers' own `from_single_file` guesses the config from the keys of models that it knows; here it is given.

        Args:
            pretrained_model_link_or_path (str or Path): a file, or a link to one on the Hub.
            config (str or Path): folder or Hub id with the `config.json` of the model.
            subfolder (str, optional): where it lies in there, such as "transformer".
            dtype (torch.dtype, optional): of the model; that of the file by default.
            torch_dtype (torch.dtype, optional): another name for `dtype`, as in diffusers.
            hub_options: `token`, `cache_dir`, `local_files_only`, `revision`, `force_download`, as in
                `from_pretrained`.
        Returns:
            MPDiTTransformer2DModel: in evaluation mode.
        Raises:
            RuntimeError: if the keys or shapes in the file are not those of the config.
        """
        state_dict = load_single_file_checkpoint(str(pretrained_model_link_or_path), **hub_options)
        with init_empty_weights():
            model = cls.from_config(cls.load_config(config, subfolder=subfolder, **hub_options))
        model.eval().load_state_dict(state_dict, assign=True)
        dtype = torch_dtype if dtype is None else dtype
        return model if dtype is None else model.to(dtype)

    def train(self, mode: bool = True):
        """As `torch.nn.Module.train`; refuses training mode while attention maps are fused.

        Raises:
            ValueError: if training would change fused weights that others are copies of.
        """
        if mode and any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError("`train` needs separate attention maps: call `unfuse_qkv_projections()` first.")
        return super().train(mode)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
    ) -> None:
        config, shape = self.config, hidden_states.shape
        if len(shape) != 4 or shape[1] != config.in_channels:
            raise ValueError(f"`hidden_states` must have shape (B, {config.in_channels}, H, W), got {tuple(shape)}.")
        if shape[2] % config.patch_size or shape[3] % config.patch_size:
            raise ValueError(
                f"Height and width of `hidden_states` must be divisible by `patch_size` ({config.patch_size}), got "
                f"{shape[2]}x{shape[3]}."
            )
        weight = self.patch_embed.proj.weight
        has_other_dtype = weight.is_floating_point() and hidden_states.dtype != weight.dtype
        if has_other_dtype and not torch.is_autocast_enabled(hidden_states.device.type):
            raise ValueError(
                f"`hidden_states` must have the dtype of the model, {weight.dtype}, got {hidden_states.dtype}: "
                "convert one to the other, or use `torch.autocast`."
            )
        for name, value, per_sample in (
            ("timestep", timestep, ()),
            ("class_labels", class_labels, ()),
            ("pooled_projections", pooled_projections, (config.pooled_projection_dim,)),
        ):
            key, has_right_dtype, rule, way_out = _INPUTS[name]
            wanted = key is None or config[key]
            if wanted is None and value is not None:
                raise ValueError(f"`{name}` must be None for a model with `{key}=None`, got a {type(value).__name__}.")
            if wanted is None:
                continue
            expected, is_tensor = (shape[0], *per_sample), isinstance(value, torch.Tensor)
            if not is_tensor or value.shape != expected or not has_right_dtype(value):
                of_model = "" if key is None else f" for a model with `{key}={wanted}`"
                got = f"{value.dtype} of shape {tuple(value.shape)}" if is_tensor else repr(value)
                way_out = way_out.format(shape=expected, wanted=wanted)
                raise ValueError(f"`{name}` must be {rule} of shape {expected}{of_model}, got {got}: {way_out}.")
        if class_labels is not None:
            self._check_range(class_labels)

    def _check_range(self, class_labels: torch.Tensor) -> None:
        # Reading values off an accelerator would stall it and breaks a compiled graph, and fake tensors and those of
        # `torch.func` have none: there ids are checked outside.
        has_values = type(class_labels) is torch.Tensor and class_labels.device.type == "cpu"
        if len(class_labels) and has_values and not fused.formulas_rule():
            num_classes = self.config.num_classes
            lowest, highest = class_labels.min().item(), class_labels.max().item()
            if lowest < 0 or highest > num_classes:
                raise ValueError(
                    f"`class_labels` must be in [0, {num_classes}], where {num_classes} is the null id; got values "
                    f"from {lowest} to {highest}."
                )
