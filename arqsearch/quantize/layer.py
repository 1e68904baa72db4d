"""`QuantizedLayer`: one conv or linear layer, batch norm folded, weights and input fake-quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.quantize.graph import Node
from arqsearch.quantize.quantizers import ActivationQuantizer, StepTable, code_range, fake_quantize


class QuantizedLayer(nn.Module):
    """A conv or linear layer with its batch norm, its weight steps and its input quantizer.

    :param node: the layer in the graph.
    :param layer: the user's module, whose parameters are used as they are.
    :param batch_norm: the batch norm that follows it.
    :param activation: quantizer of its input.
    :param last: whether it gives the logits, and so has one weight scale.
    """

    input_ratio: Tensor

    def __init__(
        self, node: Node, layer: nn.Module, batch_norm: nn.Module | None, activation: ActivationQuantizer, last: bool
    ) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert batch_norm is None or isinstance(batch_norm, nn.BatchNorm1d | nn.BatchNorm2d)
        self.node = node
        self.layer = layer
        self.batch_norm = batch_norm
        self.activation = activation
        self.weight_steps = StepTable(1 if last else node.shape[0], True, activation.power_of_two)
        self.register_buffer("input_ratio", torch.ones(0))
        self.bits = (8, 8)

    def fold_factor(self) -> Tensor | None:
        """``gamma / sqrt(var + eps)`` of the batch norm, shape ``(O,)``."""
        norm = self.batch_norm
        if norm is None:
            return None
        assert norm.running_var is not None
        return norm.weight / torch.sqrt(norm.running_var + norm.eps)

    def folded_weight(self) -> Tensor:
        """Float weights with batch norm (and the input channel ratio) folded in, layout OIHW or OI."""
        weight: Tensor = self.layer.weight
        factor = self.fold_factor()
        if factor is not None:
            weight = weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))
        if self.input_ratio.numel():
            weight = weight * self.input_ratio.reshape(1, -1, *(1,) * (weight.ndim - 2))
        return weight

    def folded_bias(self) -> Tensor:
        """Float bias with batch norm folded in, shape ``(O,)``."""
        weight, norm = self.layer.weight, self.batch_norm
        value = weight.new_zeros(weight.shape[0]) if self.layer.bias is None else self.layer.bias
        factor = self.fold_factor()
        if factor is None or norm is None:
            return value
        assert norm.running_mean is not None
        return norm.bias + (value - norm.running_mean) * factor

    def weight_scale(self) -> Tensor:
        """Weight step at the current bits, shape ``(O,)`` or ``(1,)``."""
        return self.weight_steps.step(self.bits[0])

    def quantized_weight(self, quantized: bool) -> Tensor:
        """Folded weights, fake-quantized unless in float mode."""
        weight = self.folded_weight()
        if not quantized:
            return weight
        step = self.weight_scale().reshape(-1, *(1,) * (weight.ndim - 1))
        if step.numel() == 1:
            return fake_quantize(weight, step.reshape(()), *code_range(self.bits[0], True))
        return fake_quantize(weight, step, *code_range(self.bits[0], True))

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The bare convolution or product."""
        if self.node.kind == "linear":
            return F.linear(x, weight, bias)
        top, bottom, left, right = self.node.attrs["padding"]
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, weight, bias, self.node.attrs["stride"], (top, left), 1, self.node.attrs["groups"])

    def quantized_bias(self, input_scale: Tensor) -> Tensor:
        """Folded bias on the accumulators' scale, rounded as in the program, straight-through."""
        bias = self.folded_bias()
        scale = (input_scale * self.weight_scale()).detach()
        return bias + ((bias / scale).round() * scale - bias).detach()

    def forward(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        """Layer output before the activation function; no `input_scale` means float mode."""
        weight = self.quantized_weight(input_scale is not None)
        norm = self.batch_norm
        if norm is None or not norm.training:
            return self.operate(
                x, weight, self.folded_bias() if input_scale is None else self.quantized_bias(input_scale)
            )
        # Live statistics: undo the folding after the convolution, then normalise by the batch.
        factor = self.fold_factor()
        assert factor is not None
        safe = torch.where(factor.abs() < 1e-6, torch.full_like(factor, 1e-6), factor)
        raw = self.operate(x, weight, None) / safe.reshape(1, -1, *(1,) * (x.ndim - 2))
        bias = self.layer.bias
        result: Tensor = norm(raw if bias is None else raw + bias.reshape(1, -1, *(1,) * (x.ndim - 2)))
        return result
