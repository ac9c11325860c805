"""``nn.MultiheadAttention``: the input projection and the output projection, each a block.

The fused input projection is one block ``(3·embedding, in)``, as a fused ``nn.Linear`` for query, key and value would
be. In cross-attention its uses for query, key and value are laid side by side, each with zeros in the outputs that it
does not fill. Projections of their own for keys and values of other widths are blocks of their own, and then the fused
bias is one too. Attention itself is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayes_kfac.curvature.modules.base import CompositeAdapter, ModuleAdapter, Record, register
from bayes_kfac.curvature.modules.product import Captured, product, recorded_linear


@register(nn.MultiheadAttention)
class MultiheadAttentionAdapter(CompositeAdapter):
    """Self- and cross-attention with every mask and option of torch's."""

    def parts(self) -> dict[str, Any]:  # noqa: D102
        parts: dict[str, type[ModuleAdapter] | Any] = {}
        if self.module._qkv_same_embed_dim:
            parts["in_proj"] = product("in_proj_weight", "in_proj_bias")
        else:
            parts = {name: product(f"{name}_weight") for name in ("q_proj", "k_proj", "v_proj")}
            parts["in_proj"] = product("", "in_proj_bias")
        return parts | {"out_proj": product("out_proj.weight", "out_proj.bias")}

    def forward(  # noqa: D102
        self,
        record: Record,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        is_batched = query.ndim == 3
        same_key, same_value = key is query, value is key
        if not is_batched:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif module.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = self._project(record, query, key, value, fused=same_key and same_value)
        attended, weights = self._attend(
            q,
            k,
            v,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        output = recorded_linear(record, "out_proj", attended, module.out_proj.weight, module.out_proj.bias)
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if module.batch_first else output, weights

    def _project(self, record: Record, query: Tensor, key: Tensor, value: Tensor, *, fused: bool) -> list[Tensor]:
        module, width = self.module, self.module.embed_dim
        if not module._qkv_same_embed_dim:
            return self._project_apart(record, query, key, value)
        if fused:
            joint = recorded_linear(record, "in_proj", query, module.in_proj_weight, module.in_proj_bias)
            return list(joint.chunk(3, dim=-1))
        weights = module.in_proj_weight.chunk(3)
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return [
            recorded_linear(record, "in_proj", tensor, weights[i], biases[i], offset=i * width)
            for i, tensor in enumerate((query, key, value))
        ]

    def _project_apart(self, record: Record, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        module, width = self.module, self.module.embed_dim
        projected = []
        for i, (name, tensor) in enumerate({"q_proj": query, "k_proj": key, "v_proj": value}.items()):
            output = recorded_linear(record, name, tensor, getattr(module, f"{name}_weight"), None)
            if module.in_proj_bias is not None:
                output = output + module.in_proj_bias[i * width : (i + 1) * width]
                output = record("in_proj", Captured(tensor, i * width), output)
            projected.append(output)
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Torch's own attention between projections by the identity, which are exact."""
        module, width = self.module, self.module.embed_dim
        identity = torch.eye(width, dtype=q.dtype, device=q.device)
        attended, weights = functional.multi_head_attention_forward(
            q,
            k,
            v,
            width,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            identity,
            None,
            training=module.training,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            **options,
        )
        return attended, weights
