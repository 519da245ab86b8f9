"""Measures what each library downloads of a repository: `python benchmarks/hub_traffic.py`, at the root of a checkout.

Pushes the embedded miniature to the Hub server of the tests and loads it in new processes without this package. Prints
the table of README.md. Bytes are those that the server sent.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.hub.machine import Machine
from tests.hub.server import Hub, serve
from vlv.checkpoints import MINIATURE

REPO = "org/vlv-miniature"
TRUSTED = f"'{REPO}', trust_remote_code=True)"
LOADS = {
    'transformers `pipeline("image-to-text", ...)`': (
        f"from transformers import pipeline; pipeline('image-to-text', model={TRUSTED}"
    ),
    "diffusers `DiffusionPipeline`": f"from diffusers import DiffusionPipeline as P; P.from_pretrained({TRUSTED}",
}


def main() -> None:
    hub = Hub()
    with serve(hub) as endpoint, tempfile.TemporaryDirectory() as folder:
        pushed = Machine(Path(folder) / "owner", endpoint).vlv("push", MINIATURE, REPO, "--token", "hf_org")
        if pushed.returncode:
            raise SystemExit(pushed.stderr)
        files = hub.repos[REPO].at("main").files
        print("| loaded with | encoder | language model | denoiser and autoencoder | downloaded, MB |")
        print("|---|---|---|---|---|")
        for number, (name, script) in enumerate(LOADS.items()):
            hub.forget_traffic()
            Machine(Path(folder) / str(number), endpoint).without_package(script + "; print('null')")
            sent = {path.removeprefix(REPO + "/"): size for path, size in hub.downloads.items()}
            parts = [
                any(path.startswith(start) and path.endswith(".safetensors") for path in sent)
                for start in ("encoder/", "captioner", ("unet/", "vae/"))
            ]
            print(f"| {name} | {' | '.join('yes' if p else 'no' for p in parts)} | {sum(sent.values()) / 1e6:.1f} |")
        print(f"\nThe whole repository: {sum(map(len, files.values())) / 1e6:.1f} MB in {len(files)} files.")


if __name__ == "__main__":
    main()
