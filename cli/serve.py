"""`vlv serve`: an OpenAI-compatible server of one VLV."""

import argparse
import os

from vlv.errors import UserError

from .address import check_address
from .models import choose_device, choose_model, loading, precision
from .parsers.serve import API_KEY_VARIABLE

MIN_CONNECTIONS = 256


def run(arguments: argparse.Namespace) -> int:
    check_address(arguments.host, arguments.port)
    try:
        from vlv.serving.app import ServerLimits, build_app
        from vlv.serving.images import ImageLimits
        from vlv.serving.run import serve
        from vlv.serving.served import ServedModel
    except ImportError as error:
        raise UserError(
            f"the server needs the extra vlv[serve] (pip install '.[serve]' in its source folder): {error}"
        ) from error
    keys = arguments.api_key or [os.environ.get(API_KEY_VARIABLE, "")]
    if arguments.api_key and not all(key.strip() for key in keys):
        raise UserError("--api-key is empty; give a key, or leave the option out to let everybody in")
    limits = ServerLimits(
        max_batch=arguments.max_batch,
        max_waiting=arguments.max_waiting,
        timeout=arguments.timeout,
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        api_keys=tuple(key for key in keys if key),
        images=ImageLimits(
            max_bytes=int(arguments.max_image_mb * 2**20),
            max_pixels=arguments.max_pixels,
            allow_urls=not arguments.no_urls,
            allow_private=arguments.allow_private_urls,
        ),
    )
    source = choose_model(arguments)
    with loading(source):
        model = ServedModel(
            source,
            name=arguments.name,
            revision=arguments.revision,
            device=choose_device(arguments),
            dtype=precision(arguments),
            reconstruct=not arguments.no_variations,
            max_new_tokens=arguments.max_new_tokens,
            max_tokens_limit=arguments.max_tokens,
            unknown_text=arguments.unknown_text,
        )

    def announce(address: str) -> None:
        routes = "captions, embeddings" + ("" if model.pipeline is None else ", variations")
        print(f"serving {model.name} at {address}/v1 ({routes}); Ctrl-C ends it", flush=True)

    connections = max(2 * arguments.max_waiting, MIN_CONNECTIONS)
    serve(build_app(model, limits), arguments.host, arguments.port, connections, announce)
    return 0
