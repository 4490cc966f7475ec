"""The magnitude-preserving diffusion transformer: DiT in configurations A to E of arXiv 2505.19122."""

import copy
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import _registration, functional  # noqa: F401
from .layers import MPEmbedding, MPLeakyReLU, MPLinear, MPPatchEmbed, MPSiLU, MPTimestepEmbedding
from .modulation import Modulation, check_kinds
from .rows import ModelOfRows


_ACTIVATIONS = {
    # activation_fn: (magnitude preserving, plain)
    "silu": (MPSiLU, nn.SiLU),
    "leaky_relu": (MPLeakyReLU, nn.LeakyReLU),
}
_ACTIVATE_IN_PLACE = {
    MPSiLU: lambda act, x: functional.mp_silu(x, inplace=True),
    MPLeakyReLU: lambda act, x: functional.mp_leaky_relu(x, act.negative_slope, inplace=True),
    nn.SiLU: lambda act, x: F.silu(x, inplace=True),
    nn.LeakyReLU: lambda act, x: F.leaky_relu(x, act.negative_slope, inplace=True),
}


# Ways to start a LoRA that change the weight beside it, by the beginning of their names in PEFT, in small letters.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


_NOT_MERGED = (
    "`fuse_lora` and PEFT's merges need rows that are used as they are stored; with "
    "`forced_weight_normalization=False` they are normalised on use: keep the LoRA unmerged."
)


class MPDiTAttnProcessor:
    """Self-attention over all tokens; with `cosine_attention`, of queries and keys at RMS 1.

        softmax(q k^T / sqrt(d)) v,   q and k scaled to RMS 1 over d, so that the logits are sqrt(d) cos(q, k)
    Section 4 of arXiv 2505.19122. EDM2 (arXiv 2312.02696) scales v as well.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "MPDiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            if any(type(layer) is not type(attn.to_qkv) for layer in (attn.to_q, attn.to_k, attn.to_v)):
                raise ValueError(
                    "`fuse_qkv_projections` must come after a LoRA is merged and unloaded, got one in maps that are "
                    "fused already: call `unfuse_qkv_projections()` first."
                )
            # Heads of queries and keys are scaled together, at half the overhead.
            heads = attn.to_qkv(hidden_states).unflatten(-1, (3, -1, attn.head_dim))
            query_key, value = heads[:, :, :2], heads[:, :, 2]
            if attn.cosine_attention:
                query_key = functional.unit_magnitude(query_key)
            query, key = query_key.unbind(2)
        else:
            query = attn.to_q(hidden_states).unflatten(-1, (-1, attn.head_dim))
            key = attn.to_k(hidden_states).unflatten(-1, (-1, attn.head_dim))
            value = attn.to_v(hidden_states).unflatten(-1, (-1, attn.head_dim))
            if attn.cosine_attention:
                query = functional.unit_magnitude(query)
                key = functional.unit_magnitude(key)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2, 3))


class MPDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with bias-free maps. Shapes: (B, N, D) → (B, N, D)."""

    _default_processor_cls = MPDiTAttnProcessor
    _available_processors = [MPDiTAttnProcessor]

    def __init__(self, dim: int, num_heads: int, cosine_attention: bool, linear=MPLinear):
        super().__init__()
        self.heads = num_heads
        self.head_dim = dim // num_heads
        self.cosine_attention = cosine_attention
        self.to_q = linear(dim, dim)
        self.to_k = linear(dim, dim)
        self.to_v = linear(dim, dim)
        self.to_out = nn.ModuleList([linear(dim, dim)])
        self.set_processor(MPDiTAttnProcessor())
        self.register_state_dict_post_hook(_without_fused_map)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Make one map of three, of their class: rows are independent, so that it normalises them where they do."""
        if self.fused_projections:
            return
        maps = (self.to_q, self.to_k, self.to_v)
        if self.training:
            raise ValueError("`fuse_qkv_projections` is for inference: call `model.eval()` first.")
        if not all(type(layer) in (MPLinear, nn.Linear) and type(layer.weight.data) is torch.Tensor for layer in maps):
            raise ValueError(
                "`fuse_qkv_projections` needs plain query, key and value maps, without LoRA and not quantised; got "
                f"{[type(layer).__name__ for layer in maps]}."
            )
        if any(layer.weight.is_meta or _hooks_of_diffusers(layer) for layer in maps):
            raise ValueError(
                "`fuse_qkv_projections` needs maps that are neither offloaded nor cast by layer, got some that are: "
                "fuse before `enable_layerwise_casting` and `enable_group_offload`; offloading weight by weight, as "
                "Accelerate does it, goes without fused maps."
            )
        # A copy of one of them keeps its class, options and device.
        self.to_qkv = copy.deepcopy(self.to_q)
        self.to_qkv.out_features = 3 * self.to_q.out_features
        self.to_qkv.weight = nn.Parameter(torch.cat([layer.weight for layer in maps]))
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        """Go back to three maps, which have been there all along."""
        if self.fused_projections:
            del self.to_qkv
            self.fused_projections = False


def has_hooks(module: nn.Module) -> bool:
    """Whether something may look at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())


def _hooks_of_diffusers(module: nn.Module) -> dict:
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def _without_fused_map(attn: MPDiTAttention, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    # It is a copy of others.
    state_dict.pop(f"{prefix}to_qkv.weight", None)


class MPDiTFeedForward(nn.Module):
    """Linear map, activation, linear map. Shapes: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, mult: float, linear=MPLinear, activation=MPSiLU):
        super().__init__()
        self.linear_1 = linear(dim, int(dim * mult))
        self.act = activation()
        self.linear_2 = linear(int(dim * mult), dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_1(hidden_states)
        # The widest tensor of the model: no second one of it where neither a gradient nor a hook needs the first.
        is_needed = torch.is_grad_enabled() or has_hooks(self.linear_1) or has_hooks(self.act)
        if is_needed or torch.compiler.is_compiling():
            return self.linear_2(self.act(hidden_states))
        return self.linear_2(_ACTIVATE_IN_PLACE[type(self.act)](self.act, hidden_states))


class MPDiTPooledEmbedding(nn.Module):
    """Pooled vector, such as that of a text or image encoder, to a conditioning vector. Shapes: (B, P) → (B, D).

    Vectors are brought to RMS 1 first if `magnitude_preserving`. A vector of zeros stands for no condition, and is
    given a learned embedding.
    """

    def __init__(self, pooled_projection_dim: int, dim: int, magnitude_preserving: bool, table, linear, activation):
        super().__init__()
        self.magnitude_preserving = magnitude_preserving
        self.linear_1 = linear(pooled_projection_dim, dim)
        self.act = activation()
        self.linear_2 = linear(dim, dim)
        self.null_embedder = table(1, dim)

    def forward(self, pooled_projections: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        is_null = (pooled_projections == 0).all(dim=-1)
        if self.magnitude_preserving:
            pooled_projections = functional.unit_magnitude(pooled_projections)
        embedding = self.linear_2(self.act(self.linear_1(pooled_projections.to(dtype))))
        return torch.where(
            is_null[:, None], self.null_embedder(torch.zeros_like(is_null, dtype=torch.long)), embedding
        )


class MPDiTConditioning(nn.Module):
    """Timestep, class and pooled vector, or those there are, to the activated conditioning vector.

    Shapes: (B,), (B,) or None, (B, P) or None → (B, D).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int | None,
        pooled_projection_dim: int | None,
        mp_residual: bool,
        mp_embedding: bool,
        forced: bool,
        linear,
        activation,
    ):
        super().__init__()
        self.mp_residual = mp_residual
        table = partial(MPEmbedding, forced_weight_normalization=forced) if mp_embedding else nn.Embedding
        self.time_embedder = MPTimestepEmbedding(dim, mp_embedding, linear=linear, activation=activation)
        self.class_embedder = table(num_classes + 1, dim) if num_classes is not None else None
        self.pooled_embedder = None
        if pooled_projection_dim is not None:
            self.pooled_embedder = MPDiTPooledEmbedding(
                pooled_projection_dim, dim, mp_embedding, table, linear, activation
            )
        self.act = activation()

    def forward(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        conditioning = self.time_embedder(timestep, dtype)
        if self.class_embedder is not None:
            conditioning = self._sum(conditioning, self.class_embedder(class_labels), functional.BALANCED_T)
        if self.pooled_embedder is not None:
            t = functional.BALANCED_T if self.class_embedder is None else functional.THIRD_T
            conditioning = self._sum(conditioning, self.pooled_embedder(pooled_projections, dtype), t)
        return self.act(conditioning)

    def _sum(self, conditioning: torch.Tensor, embedding: torch.Tensor, t: float) -> torch.Tensor:
        return functional.mp_sum(conditioning, embedding, t) if self.mp_residual else conditioning + embedding


class MPDiTTransformerBlock(nn.Module):
    """Attention, then feed-forward, each modulated before, gated after and summed with the residual stream.

        x = mp_sum(x, gate * branch(modulate(norm(x))), residual_t)
    Section 4 of arXiv 2505.19122. Shapes: (B, N, D), (B, D) → (B, N, D).
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float,
        cosine_attention: bool,
        layer_norm: bool,
        residual_t: float | None,
        modulation,
        linear,
        activation,
    ):
        super().__init__()
        self.residual_t = residual_t
        self.norm1 = _make_norm(dim, layer_norm)
        self.attn_modulation = modulation()
        self.attn = MPDiTAttention(dim, num_attention_heads, cosine_attention, linear)
        self.norm2 = _make_norm(dim, layer_norm)
        self.ff_modulation = modulation()
        self.ff = MPDiTFeedForward(dim, mlp_ratio, linear, activation)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        modulated, gate = self.attn_modulation(self.norm1(hidden_states), conditioning)
        hidden_states = functional.gated_sum(hidden_states, self.attn(modulated), gate, self.residual_t)
        modulated, gate = self.ff_modulation(self.norm2(hidden_states), conditioning)
        return functional.gated_sum(hidden_states, self.ff(modulated), gate, self.residual_t)


class MPDiTOutput(nn.Module):
    """Modulate tokens, map them to patches, with a gain from 0. Shapes: (B, N, D), (B, D) → (B, N, p p C)."""

    def __init__(self, dim: int, out_features: int, layer_norm: bool, modulation, weight_normalization: bool, linear):
        super().__init__()
        self.norm = _make_norm(dim, layer_norm)
        self.modulation = modulation()
        self.proj = linear(dim, out_features)
        self.gain = nn.Parameter(torch.zeros(1)) if weight_normalization else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros at the start: of the gain, or of the plain map."""
        nn.init.zeros_(self.proj.weight if self.gain is None else self.gain)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm(hidden_states)
        if self.modulation is not None:
            hidden_states, _ = self.modulation(hidden_states, conditioning)
        hidden_states = self.proj(hidden_states)
        return hidden_states if self.gain is None else hidden_states * self.gain


def _plain_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def _make_norm(dim: int, layer_norm: bool) -> nn.Module:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) if layer_norm else nn.Identity()


class MPDiTTransformer2DModel(ModelOfRows, ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
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
        if activation_fn not in _ACTIVATIONS:
            raise ValueError(f"`activation_fn` must be one of {list(_ACTIVATIONS)}, got {activation_fn!r}.")
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

        linear = _plain_linear
        if weight_normalization:
            linear = partial(MPLinear, forced_weight_normalization=forced_weight_normalization)
        activation = _ACTIVATIONS[activation_fn][0 if mp_silu else 1]
        site = partial(
            Modulation,
            dim,
            dim,
            weight_normalization=weight_normalization,
            forced_weight_normalization=forced_weight_normalization,
        )
        ungated = [kind for kind in modulation if kind != "gate"]

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
        if self._normalizes_on_use() and any(getattr(module, "merged", False) for module in self.modules()):
            raise ValueError(_NOT_MERGED)  # by PEFT itself, which asks nobody
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

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with the rows exactly as they were saved.

        Raises:
            ValueError: if a model whose rows are normalised on use (`weight_normalization` without
                `forced_weight_normalization`) is quantised: quantised maps use rows as they are stored.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # `output_loading_info`
        if getattr(model, "hf_quantizer", None) is not None and model._normalizes_on_use():
            raise ValueError(
                "`quantization_config` must be None for a model with `forced_weight_normalization=False`, whose rows "
                "are normalised on use, which quantised maps do not do; got "
                f"{type(model.hf_quantizer.quantization_config).__name__}."
            )
        return loaded

    def _normalizes_on_use(self) -> bool:
        return self.config.weight_normalization and not self.config.forced_weight_normalization

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """As in diffusers; where rows are normalised on use, refuses a LoRA that moves part of a weight into itself.

        Raises:
            ValueError: for a model whose rows are normalised on use (`weight_normalization` without
                `forced_weight_normalization`), if `init_lora_weights` is "pissa", "olora", "corda", "loftq" or
                "lora_ga", or there is a `kasa_config`.
        """
        kind = getattr(adapter_config, "init_lora_weights", None)
        if getattr(adapter_config, "kasa_config", None) is not None:
            kind = "kasa_config"  # comes beside any of the names
        # PEFT takes some names in any case.
        if self._normalizes_on_use() and isinstance(kind, str) and kind.lower().startswith(_CHANGES_WEIGHTS):
            raise ValueError(
                "`init_lora_weights` must leave the weights as they are for a model with "
                "`forced_weight_normalization=False`, whose rows are normalised on use: True, False, 'gaussian', "
                f"'orthogonal', 'eva' or 'mica'; got {kind!r}."
            )
        super().add_adapter(adapter_config, adapter_name)

    def train(self, mode: bool = True):
        """As `torch.nn.Module.train`; refuses training mode while attention maps are fused.

        Raises:
            ValueError: if training would change fused weights that others are copies of.
        """
        if mode and any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError("`train` needs separate attention maps: call `unfuse_qkv_projections()` first.")
        return super().train(mode)

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None):
        """As in diffusers.

        Raises:
            ValueError: for a model whose rows are normalised on use (`weight_normalization` without
                `forced_weight_normalization`), where merged weights are another function.
        """
        if self._normalizes_on_use():
            raise ValueError(_NOT_MERGED)
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

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
