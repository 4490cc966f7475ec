"""What the model is built of: attention, feed-forward, conditioning, block and output."""

import copy

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional, fused
from .configuration import Parts
from .layers import MPLeakyReLU, MPLinear, MPSiLU, MPTimestepEmbedding
from .modulation import MODULATION_KINDS


_ACTIVATE_IN_PLACE = {
    MPSiLU: lambda act, x: functional.mp_silu(x, inplace=True),
    MPLeakyReLU: lambda act, x: functional.mp_leaky_relu(x, act.negative_slope, inplace=True),
    nn.SiLU: lambda act, x: F.silu(x, inplace=True),
    nn.LeakyReLU: lambda act, x: F.leaky_relu(x, act.negative_slope, inplace=True),
}


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
                query_key = fused.unit_magnitude(query_key)
            query, key = query_key.unbind(2)
        else:
            query = attn.to_q(hidden_states).unflatten(-1, (-1, attn.head_dim))
            key = attn.to_k(hidden_states).unflatten(-1, (-1, attn.head_dim))
            value = attn.to_v(hidden_states).unflatten(-1, (-1, attn.head_dim))
            if attn.cosine_attention:
                query = fused.unit_magnitude(query)
                key = fused.unit_magnitude(key)
        if fused.is_transformed() and self._parallel_config is None:
            hidden_states = functional.attention(query, key, value)
        else:
            hidden_states = dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return attn.to_out[0](hidden_states.flatten(2, 3))


class MPDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with bias-free maps. Shapes: (B, N, D) → (B, N, D)."""

    _default_processor_cls = MPDiTAttnProcessor
    _available_processors = [MPDiTAttnProcessor]

    def __init__(self, parts: Parts):
        super().__init__()
        self.heads = parts.config.num_attention_heads
        self.head_dim = parts.config.attention_head_dim
        self.cosine_attention = parts.config.cosine_attention
        self.to_q = parts.linear(parts.dim, parts.dim)
        self.to_k = parts.linear(parts.dim, parts.dim)
        self.to_v = parts.linear(parts.dim, parts.dim)
        self.to_out = nn.ModuleList([parts.linear(parts.dim, parts.dim)])
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

    def __init__(self, parts: Parts):
        super().__init__()
        hidden_dim = int(parts.dim * parts.config.mlp_ratio)
        self.linear_1 = parts.linear(parts.dim, hidden_dim)
        self.act = parts.activation()
        self.linear_2 = parts.linear(hidden_dim, parts.dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_1(hidden_states)
        # The widest tensor of the model: no second one of it where neither a gradient nor a hook needs the first.
        is_needed = torch.is_grad_enabled() or has_hooks(self.linear_1) or has_hooks(self.act)
        if is_needed or torch.compiler.is_compiling():
            return self.linear_2(self.act(hidden_states))
        return self.linear_2(_ACTIVATE_IN_PLACE[type(self.act)](self.act, hidden_states))


class MPDiTPooledEmbedding(nn.Module):
    """Pooled vector, such as that of a text or image encoder, to a conditioning vector. Shapes: (B, P) → (B, D).

    With `mp_embedding` vectors are brought to RMS 1 first. A vector of zeros stands for no condition, and is
    given a learned embedding.
    """

    def __init__(self, parts: Parts):
        super().__init__()
        self.magnitude_preserving = parts.config.mp_embedding
        self.linear_1 = parts.linear(parts.config.pooled_projection_dim, parts.dim)
        self.act = parts.activation()
        self.linear_2 = parts.linear(parts.dim, parts.dim)
        self.null_embedder = parts.table(1)

    def forward(self, pooled_projections: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        is_null = (pooled_projections == 0).all(dim=-1)
        if self.magnitude_preserving:
            pooled_projections = fused.unit_magnitude(pooled_projections)
        embedding = self.linear_2(self.act(self.linear_1(pooled_projections.to(dtype))))
        return torch.where(
            is_null[:, None], self.null_embedder(torch.zeros_like(is_null, dtype=torch.long)), embedding
        )


class MPDiTConditioning(nn.Module):
    """Timestep, class and pooled vector, or those there are, to the activated conditioning vector.

    Shapes: (B,), (B,) or None, (B, P) or None → (B, D).
    """

    def __init__(self, parts: Parts):
        super().__init__()
        config = parts.config
        self.mp_residual = config.mp_residual
        self.time_embedder = MPTimestepEmbedding(parts.dim, config.mp_embedding, parts.linear, parts.activation)
        self.class_embedder = parts.table(config.num_classes + 1) if config.num_classes is not None else None
        self.pooled_embedder = MPDiTPooledEmbedding(parts) if config.pooled_projection_dim is not None else None
        self.act = parts.activation()

    def initialize_as_dit(self) -> None:
        """DiT's initialisation of plain maps and tables; elsewhere it is Xavier's, or zeros."""
        tables = [self.class_embedder, self.pooled_embedder and self.pooled_embedder.null_embedder]
        tables = [table for table in tables if type(table) is nn.Embedding]
        for layer in (self.time_embedder.linear_1, self.time_embedder.linear_2, *tables):
            nn.init.normal_(layer.weight, std=0.02)

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
        return fused.mp_sum(conditioning, embedding, t) if self.mp_residual else conditioning + embedding


class MPDiTTransformerBlock(nn.Module):
    """Attention, then feed-forward, each modulated before, gated after and summed with the residual stream.

        x = mp_sum(x, gate * branch(modulate(norm(x))), residual_t)
    Section 4 of arXiv 2505.19122; `max_magnitude` caps the gated branch and the sum.
    Shapes: (B, N, D), (B, D) → (B, N, D).
    """

    def __init__(self, parts: Parts):
        super().__init__()
        config = parts.config
        self.residual_t = config.residual_t if config.mp_residual else None
        self.max_magnitude = config.max_magnitude
        self.norm1 = parts.norm()
        self.attn_modulation = parts.modulation(config.modulation)
        self.attn = MPDiTAttention(parts)
        self.norm2 = parts.norm()
        self.ff_modulation = parts.modulation(config.modulation)
        self.ff = MPDiTFeedForward(parts)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        modulated, gate = self.attn_modulation(self.norm1(hidden_states), conditioning)
        hidden_states = self._sum(hidden_states, self.attn(modulated), gate)
        modulated, gate = self.ff_modulation(self.norm2(hidden_states), conditioning)
        return self._sum(hidden_states, self.ff(modulated), gate)

    def _sum(self, hidden_states: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return fused.gated_sum(hidden_states, branch, gate, self.residual_t, self.max_magnitude)


class MPDiTOutput(nn.Module):
    """Modulate tokens, map them to patches, with a gain from 0. Shapes: (B, N, D), (B, D) → (B, N, p p C)."""

    def __init__(self, parts: Parts):
        super().__init__()
        config = parts.config
        self.norm = parts.norm()
        # There is no branch that a gate could act on.
        self.modulation = parts.modulation([k for k in config.modulation if MODULATION_KINDS[k].argument is not None])
        self.proj = parts.linear(parts.dim, config.patch_size**2 * (config.out_channels or config.in_channels))
        self.gain = nn.Parameter(torch.zeros(1)) if config.weight_normalization else None
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
