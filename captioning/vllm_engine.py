"""`--engine vllm`: the model's encoder makes prefixes, and its language model in vLLM writes the captions.

vLLM reads a prefix as `prompt_embeds`. Those of a run have one length, and no penalties are set: vLLM ends at
penalties with prompts of several lengths. It keeps prompts in memory, so that a new process is started now and then.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlv import hub
from vlv.errors import UserError
from vlv.pipelines import trim_caption

from .batches import Batch
from .captioner import Captioner
from .prefixes import read_prefixes
from .sharded import ShardCaptioner, ShardJob, load_captioner
from .shards import ShardFolder

LANGUAGE_MODEL = "language-model"
MEMORY = 0.7
"""Share of a GPU's memory that vLLM takes; the encoder needs some, too."""


def caption_by_vllm(
    job: ShardJob, shards: ShardFolder, wanted: Sequence[int], restart_every: int
) -> Iterator[dict[str, int] | None]:
    """Captions shards; yields the counts of each when it is done.

    Args:
        wanted: Numbers of shards.
        restart_every: Shards of a process.

    Raises:
        ImportError: If vLLM is not installed.
        UserError: If a process ends before its shards are done.
    """
    require_vllm()
    spawning = multiprocessing.get_context("spawn")  # vLLM does not start in a fork of a process that has used CUDA
    for start in range(0, len(wanted), restart_every):
        group = wanted[start : start + restart_every]
        receiver, sender = spawning.Pipe(duplex=False)
        process = spawning.Process(target=_caption_group, args=(job, shards.folder, group, sender))
        process.start()
        sender.close()
        try:
            for _ in group:
                yield receiver.recv()
        except EOFError as error:
            process.join()
            raise UserError(
                f"the process of vLLM ended with exit code {process.exitcode}; its messages stand above. The shards "
                "that are done are kept: run the command again"
            ) from error
        process.join()


def require_vllm() -> None:
    """Raises `ImportError` with a remedy if vLLM is not installed."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError("--engine vllm needs vLLM (pip install vllm), which needs a GPU") from error


def recorded_engine() -> dict[str, str]:
    """What a run records of the engine, so that captions of two engines are not mixed. Raises as `require_vllm`."""
    require_vllm()
    return {"engine": "vllm", "vllm": version("vllm")}


def _caption_group(job: ShardJob, folder: Path, group: Sequence[int], results: Connection) -> None:
    shards = ShardFolder.open_existing(folder)
    captioner = load_captioner(job)
    model, processor = captioner.model, captioner.processor
    exported = shards.make_folder(LANGUAGE_MODEL, lambda path: hub.export_language_model(path, model, processor))
    writer = ShardCaptioner(job, start_vllm(captioner, job.dtype, exported))
    for index in group:
        results.send(writer.caption(shards, index))


@dataclass(frozen=True)
class VllmCaptioner(Captioner):
    """A captioner whose language model is in vLLM.

    Args:
        llm: A `vllm.LLM` of the language model, with `enable_prompt_embeds=True`.
        sampling: Its `vllm.SamplingParams`.
    """

    llm: Any = None
    sampling: Any = None

    def caption(self, batch: Batch) -> list[list[str]]:
        """One caption of each input of a batch."""
        prompts = [{"prompt_embeds": prefix} for prefix in read_prefixes(self, batch).cpu()]
        results = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        captions = [result.outputs[0].text.strip() for result in results]
        return [[trim_caption(caption) if self.settings.trim else caption] for caption in captions]


def start_vllm(captioner: Captioner, dtype: str, folder: Path) -> VllmCaptioner:
    """Starts vLLM with the language model of a captioner, which `hub.export_language_model` has written."""
    from vllm import LLM, SamplingParams

    model, processor, settings = captioner.model, captioner.processor, captioner.settings
    llm = LLM(model=str(folder), dtype=dtype, enable_prompt_embeds=True, gpu_memory_utilization=MEMORY)
    sampling = SamplingParams(temperature=0.0, max_tokens=settings.max_new_tokens)
    return VllmCaptioner(model, processor, settings, llm=llm, sampling=sampling)
