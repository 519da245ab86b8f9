"""The classes that `from_pretrained` of the reconstruction pipelines loads itself, without code of the repository.

diffusers looks up a component's class by its name in a module that is imported already, and its loading method by the
base class of that name in the same module.
"""

from transformers import ImageProcessingMixin, PreTrainedModel

from vlv import VLVImageProcessor, VLVModel

from .pipeline_vlv_pooled_reconstruction import VLVPooledReconstructionPipeline
from .pipeline_vlv_reconstruction import VLVReconstructionPipeline

__all__ = ["ImageProcessingMixin", "PreTrainedModel", "VLVImageProcessor", "VLVModel"]

for pipeline in (VLVReconstructionPipeline, VLVPooledReconstructionPipeline):
    pipeline._own_components = {
        "encoder": [__name__, VLVModel.__name__],
        "image_processor": [__name__, VLVImageProcessor.__name__],
    }
