"""Small models of many architectures with random weights, for `tools/zoo.py`: functions that `onnxlr export` calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS, WIDTH, LAYERS, LENGTH = 1000, 128, 2, 24


class Call(nn.Module):
    """A module called with keyword arguments by position, of whose result one tensor is given out."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], output: str, **fixed: Any) -> None:
        super().__init__()
        self.module, self.names, self.output, self.fixed = module.eval(), names, output, fixed

    def forward(self, *values: Tensor) -> Tensor:
        result = self.module(**dict(zip(self.names, values, strict=True)), **self.fixed)
        tensor: Tensor = result[self.output]
        return tensor


def _tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 90, (batch, length))


def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=4 * WIDTH, attn_implementation="eager",
    )  # fmt: skip
    return Call(BertModel(config), ("input_ids",), "last_hidden_state"), (_tokens(),)


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=4, attn_implementation="eager"
    )
    return Call(GPT2LMHeadModel(config), ("input_ids",), "logits", use_cache=False), (_tokens(),)


def llama() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return Call(LlamaForCausalLM(config), ("input_ids",), "logits", use_cache=False), (_tokens(),)


def t5() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=TOKENS, d_model=WIDTH, d_kv=32, d_ff=4 * WIDTH, num_layers=LAYERS, num_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return Call(model, ("input_ids", "decoder_input_ids"), "logits", use_cache=False), (_tokens(), _tokens(2, 9))


def whisper() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=TOKENS, num_mel_bins=40, encoder_layers=LAYERS, encoder_attention_heads=4, decoder_layers=LAYERS,
        decoder_attention_heads=4, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, d_model=WIDTH,
        max_source_positions=64, max_target_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    inputs = (torch.randn(2, 40, 128), _tokens(2, 9))
    return Call(model, ("input_features", "decoder_input_ids"), "logits", use_cache=False), inputs


def yolos() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=4 * WIDTH,
        image_size=[128, 128], num_detection_tokens=20, attn_implementation="eager",
    )  # fmt: skip
    return Call(YolosForObjectDetection(config), ("pixel_values",), "logits"), (torch.randn(2, 3, 128, 128),)


def segmentation() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    return Call(model, ("input",), "out"), (torch.randn(2, 3, 128, 128),)


def video() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision.models.video import r3d_18

    torch.manual_seed(0)
    return r3d_18(weights=None).eval(), (torch.randn(2, 3, 4, 48, 48),)


class UNet(nn.Module):
    """Two halvings of the image and back, by transposed convolutions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = self._pair(3, width), self._pair(width, 2 * width)
        self.bottom = self._pair(2 * width, 4 * width)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.from_second, self.from_first = self._pair(4 * width, 2 * width), self._pair(2 * width, width)
        self.head = nn.Conv2d(width, 5, 1)

    @staticmethod
    def _pair(c_in: int, c_out: int) -> nn.Module:
        layers = (nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())
        return nn.Sequential(*layers, nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        first = self.first(image)
        second = self.second(nn.functional.max_pool2d(first, 2))
        up = self.up_second(self.bottom(nn.functional.max_pool2d(second, 2)))
        up = self.up_first(self.from_second(torch.cat([up, second], 1)))
        scores: Tensor = self.head(self.from_first(torch.cat([up, first], 1)))
        return scores


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return UNet().eval(), (torch.randn(2, 3, 64, 64),)


class Experts(nn.Module):
    """An MLP whose layers are eight experts each, mixed by a gate: products with batches of matrices."""

    def __init__(self, width: int = WIDTH, experts: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / (2 * width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(x[:, None] @ self.up)
        weights = torch.softmax(self.gate(x), -1).transpose(1, 2)[..., None]
        return x + (weights * (hidden @ self.down)).sum(1)


def experts() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(Experts(), Experts()).eval(), (torch.randn(2, LENGTH, WIDTH),)


class Recurrent(nn.Module):
    """Frames, an LSTM in both directions, a GRU, and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 96, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(192, 96, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, frames: Tensor) -> Tensor:
        states, _ = self.gru(self.lstm(frames)[0])
        scores: Tensor = self.head(states[:, -1])
        return scores


def lstm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Recurrent().eval(), (torch.randn(2, LENGTH, WIDTH),)
