"""A web page that computes a metric of the `evaluate` library, for its Space on the Hub."""

import json
from typing import Any

import datasets
import evaluate
from evaluate.utils.gradio import infer_gradio_input_types, json_to_string_type, parse_gradio_data


def build_page(metric: evaluate.EvaluationModule) -> Any:
    """The page: a table of inputs, or one image and its other inputs; and the result.

    `evaluate.utils.launch_gradio_widget` needs a gradio below 4, which is too old for `huggingface_hub` 1.

    Raises:
        ImportError: If gradio is not installed.
    """
    import gradio as gr

    features: dict[str, Any] = metric.features if isinstance(metric.features, dict) else metric.features[0]
    names = list(features)
    of_images = any(isinstance(kind, datasets.Image) for kind in features.values())
    types = infer_gradio_input_types(features.values())
    if of_images:
        inputs: list[Any] = [
            gr.Image(type="pil", label=name) if isinstance(kind, datasets.Image) else gr.Textbox(label=name)
            for name, kind in features.items()
        ]
    else:
        inputs = [
            gr.Dataframe(
                headers=names, column_count=len(names), row_count=1, datatype=json_to_string_type(types), type="pandas"
            )
        ]
    settings = gr.Textbox(
        "{}", label="Settings", info="JSON, such as a model or a vocabulary, where the metric needs it"
    )

    def compute(*values: Any) -> dict[str, Any]:
        *given, text = values
        try:
            if of_images:
                found = {name: [value] for name, value in zip(names, given, strict=True)}
            else:
                found = parse_gradio_data(given[0].astype(object), types)
            return metric.compute(**found, **json.loads(text or "{}"))
        except Exception as error:  # of the inputs: the page says what is wrong with them
            raise gr.Error(f"{type(error).__name__}: {error}", print_exception=False) from error

    description = f'{metric.info.description}\n\nA list is written as JSON, such as `["a dog", "a red dog"]`.'
    return gr.Interface(
        compute,
        [*inputs, settings],
        gr.JSON(label="Result"),
        title=metric.name,
        description=metric.info.description if of_images else description,
        article=f"```\n{metric.info.inputs_description}\n```\n\n{metric.info.citation}",
        flagging_mode="never",
        api_name="compute",
    )
