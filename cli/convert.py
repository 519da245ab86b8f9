"""`vlv convert`: checkpoints of the authors' code."""

import argparse
import shlex

from safetensors import SafetensorError

from vlv.errors import UserError
from vlv.hub import convert


def run(arguments: argparse.Namespace) -> int:
    try:
        result = convert(
            arguments.output,
            stage1=arguments.stage1,
            stage2=arguments.stage2,
            stable_diffusion=arguments.stable_diffusion,
            florence=arguments.florence,
            language_model=arguments.language_model,
            image_size=arguments.image_size,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"could not convert: {error}") from error
    for name, reason in result.dropped.items():
        print(f"left out: {name} ({reason})")
    print(f"converted: {result.folder}")
    folder = shlex.quote(str(result.folder))
    if arguments.stage2:
        print(f"next: vlv caption IMAGES --as-original --model {folder}")
    if arguments.stage1 or arguments.stage2:
        print(f"next: vlv reconstruct IMAGES --model {folder}")
    else:
        print(f"next: vlv train stage1 CONFIG.yaml --image_encoder {folder}")
    return 0
