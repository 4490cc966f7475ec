"""The magnitude-preserving diffusion transformer: DiT in configurations A to E of arXiv 2505.19122."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
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

from . import _registration, functional  # noqa: F401
from .blocks import ACTIVATIONS, MPDiTConditioning, MPDiTOutput, MPDiTTransformerBlock, plain_linear
from .layers import MPLinear, MPPatchEmbed
from .modulation import MODULATION_KINDS, Modulation, check_kinds
from .rows import AdaptedModelOfRows


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
        pooled_projection_dim: int | None = None,
    ):
        super().__init__()
        counts = {
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "num_layers": num_layers,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "sample_size": sample_size,
            "patch_size": patch_size,
            "num_classes": num_classes,
            "pooled_projection_dim": pooled_projection_dim,
        }
        for name, count in counts.items():
            is_optional = name in ("out_channels", "num_classes", "pooled_projection_dim")
            if not (is_optional and count is None) and not (isinstance(count, Integral) and count >= 1):
                rule = "an integer of at least 1, or None" if is_optional else "an integer of at least 1"
                raise ValueError(f"`{name}` must be {rule}, got {count}.")
        dim = num_attention_heads * attention_head_dim
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"`mlp_ratio` must give the feed-forward a width of at least 1, got {mlp_ratio}.")
        check_kinds(modulation)
        if dim % 4:
            raise ValueError(
                "`num_attention_heads * attention_head_dim` must be divisible by 4 for the position table, got "
                f"{num_attention_heads} * {attention_head_dim} = {dim}."
            )
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"`activation_fn` must be one of {list(ACTIVATIONS)}, got {activation_fn!r}.")
        if forced_weight_normalization and not weight_normalization:
            raise ValueError(
                "`forced_weight_normalization=True` needs `weight_normalization=True`: rows that are not normalised "
                "on use carry meaning in their norm. Got `weight_normalization=False`."
            )
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` must be divisible by `patch_size` ({patch_size}), got {sample_size}.")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"`class_dropout_prob` must be in [0, 1), got {class_dropout_prob}.")
        if not 0 < residual_t < 1:
            raise ValueError(f"`residual_t` must be in (0, 1), got {residual_t}.")
        # A list, and integers that are not NumPy's, so that the config equals the one that is read back from JSON.
        counts = {name: count if count is None else int(count) for name, count in counts.items()}
        self.register_to_config(modulation=list(modulation), **counts)

        self.inner_dim = dim
        self.gradient_checkpointing = False

        linear = plain_linear
        if weight_normalization:
            linear = partial(MPLinear, forced_weight_normalization=forced_weight_normalization)
        activation = ACTIVATIONS[activation_fn][0 if mp_silu else 1]
        site = partial(
            Modulation,
            dim,
            dim,
            weight_normalization=weight_normalization,
            forced_weight_normalization=forced_weight_normalization,
        )
        ungated = [kind for kind in modulation if MODULATION_KINDS[kind].argument is not None]

        self.patch_embed = MPPatchEmbed(patch_size, in_channels, dim, linear)
        self.conditioning_embedder = MPDiTConditioning(
            dim,
            num_classes,
            pooled_projection_dim,
            mp_residual,
            mp_embedding,
            forced_weight_normalization,
            linear,
            activation,
        )
        self.transformer_blocks = nn.ModuleList(
            MPDiTTransformerBlock(
                dim,
                num_attention_heads,
                mlp_ratio,
                cosine_attention,
                layer_norm,
                residual_t if mp_residual else None,
                partial(site, modulation),
                linear,
                activation,
            )
            for _ in range(num_layers)
        )
        self.output = MPDiTOutput(
            dim,
            patch_size * patch_size * (out_channels or in_channels),
            layer_norm,
            partial(site, ungated) if ungated else lambda: None,
            weight_normalization,
            linear,
        )
        if not weight_normalization:
            # DiT's initialisation; the modulations and the output start at zero.
            embedder = self.conditioning_embedder
            nn.init.normal_(embedder.time_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.time_embedder.linear_2.weight, std=0.02)
            if num_classes is not None and not mp_embedding:
                nn.init.normal_(embedder.class_embedder.weight, std=0.02)
            if pooled_projection_dim is not None and not mp_embedding:
                nn.init.normal_(embedder.pooled_embedder.null_embedder.weight, std=0.02)

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
        self._check_adapters()
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
            hidden_states = functional.mp_sum(hidden_states, positions, functional.BALANCED_T)
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
        config = self.config
        if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
            raise ValueError(
                f"`hidden_states` must have shape (B, {config.in_channels}, H, W), got {tuple(hidden_states.shape)}."
            )
        if hidden_states.shape[-2] % config.patch_size or hidden_states.shape[-1] % config.patch_size:
            raise ValueError(
                f"Height and width of `hidden_states` must be divisible by `patch_size` ({config.patch_size}), got "
                f"{hidden_states.shape[-2]}x{hidden_states.shape[-1]}."
            )
        batch_size = hidden_states.shape[0]
        weight = self.patch_embed.proj.weight
        has_other_dtype = weight.is_floating_point() and hidden_states.dtype != weight.dtype
        if has_other_dtype and not torch.is_autocast_enabled(hidden_states.device.type):
            raise ValueError(
                f"`hidden_states` must have the dtype of the model, {weight.dtype}, got {hidden_states.dtype}: "
                "convert one to the other, or use `torch.autocast`."
            )
        if not isinstance(timestep, torch.Tensor):
            raise ValueError(
                f"`timestep` must be a tensor of shape ({batch_size},), got {timestep!r}: "
                f"`torch.full(({batch_size},), {timestep!r})`."
            )
        if timestep.shape != (batch_size,):
            raise ValueError(
                f"`timestep` must have shape ({batch_size},), one for each sample; got {tuple(timestep.shape)}."
            )
        if timestep.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                "`timestep` must be an integer or at least float32, since half precision rounds neighbouring steps to "
                f"one value; got {timestep.dtype}."
            )
        if (pooled_projections is None) != (config.pooled_projection_dim is None):
            rule = "None" if config.pooled_projection_dim is None else "given"
            raise ValueError(
                f"`pooled_projections` must be {rule} for a model with `pooled_projection_dim="
                f"{config.pooled_projection_dim}`."
            )
        if pooled_projections is not None:
            shape = (batch_size, config.pooled_projection_dim)
            if pooled_projections.shape != shape or not pooled_projections.is_floating_point():
                raise ValueError(
                    f"`pooled_projections` must be floating point vectors of shape {shape}, got "
                    f"{pooled_projections.dtype} of shape {tuple(pooled_projections.shape)}."
                )
        if config.num_classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` must be None for a model without classes (`num_classes=None`).")
            return
        if class_labels is None:
            raise ValueError(
                f"`class_labels` must be given for a model of {config.num_classes} classes; the null id "
                f"{config.num_classes} stands for no class."
            )
        if not isinstance(class_labels, torch.Tensor):
            raise ValueError(f"`class_labels` must be a tensor of shape ({batch_size},), got {class_labels!r}.")
        if class_labels.shape != (batch_size,) or class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"`class_labels` must be integers (int64 or int32) of shape ({batch_size},), got {class_labels.dtype} "
                f"of shape {tuple(class_labels.shape)}."
            )
        # Reading values off an accelerator would stall it and breaks a compiled graph, and fake tensors and those of
        # `torch.func` have none: there ids are checked outside.
        has_values = type(class_labels) is torch.Tensor and not torch._C._are_functorch_transforms_active()
        if batch_size and has_values and class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = class_labels.min().item(), class_labels.max().item()
            if lowest < 0 or highest > config.num_classes:
                raise ValueError(
                    f"`class_labels` must be in [0, {config.num_classes}], where {config.num_classes} is the null id; "
                    f"got values from {lowest} to {highest}."
                )
