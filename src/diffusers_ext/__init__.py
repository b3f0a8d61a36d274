"""diffusers_ext: model families that Hugging Face diffusers has dropped, never had, or has only for sampling.

Importing it introduces its classes to diffusers (see `registration.py`; `DIFFUSERS_EXT_NO_REGISTER=1` opts out).
"""

# diffusers' loader looks for the base classes in the namespace that `model_index.json` names, so they are re-exported.
from diffusers.guiders.guider_utils import BaseGuidance as BaseGuidance
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline as DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from transformers import PreTrainedModel as PreTrainedModel

from .guidance import NormalizedClassifierFreeGuidance, classifier_free_guidance, normalized_guidance
from .models.autoencoder_optimus import AutoencoderOptimus
from .models.discriminator import PatchDiscriminator
from .models.encoder_glide_text import GlideTextEncoder
from .models.encoder_piti import PITIEncoder
from .models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler
from .models.unet_cascaded import CascadedUNet
from .models.unet_ldm import LDMUNet
from .models.unet_paella import PaellaUNet
from .models.unet_versatile import VersatileUNet
from .models.vq_gumbel import GumbelVQModel
from .models.vq_paella import PaellaVQModel
from .pipelines.cascaded.pipeline_cascaded import CascadedDiffusionPipeline
from .pipelines.cascaded.pipeline_cascaded_base import CascadedBasePipeline
from .pipelines.cascaded.pipeline_cascaded_upscale import CascadedUpscalePipeline
from .pipelines.glide.pipeline_glide import GlidePipeline
from .pipelines.ldm.pipeline_ldm_class import LDMClassConditionalPipeline
from .pipelines.ldm.pipeline_ldm_inpaint import LDMInpaintPipeline
from .pipelines.ldm.pipeline_ldm_layout import LDMLayoutPipeline
from .pipelines.ldm.pipeline_ldm_semantic import LDMSemanticPipeline
from .pipelines.ldm.pipeline_ldm_text import LDMTextPipeline
from .pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
from .pipelines.ldm.pipeline_ldm_upscale import LDMUpscalePipeline
from .pipelines.paella.pipeline_paella import PaellaPipeline
from .pipelines.paella.pipeline_paella_image_variation import PaellaImageVariationPipeline
from .pipelines.paella.pipeline_paella_img2img import PaellaImg2ImgPipeline
from .pipelines.paella.pipeline_paella_inpaint import PaellaInpaintPipeline
from .pipelines.piti.pipeline_piti import PITIPipeline
from .pipelines.versatile.pipeline_versatile import VersatilePipeline
from .pipelines.versatile.pipeline_versatile_edit import VersatileEditPipeline
from .registration import register
from .schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from .schedulers.scheduling_normalized_cfg import NormalizedCFGScheduler
from .schedulers.scheduling_respaced import RespacedScheduler
from .schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler

__version__ = "0.1.0"

__all__ = [
    "AutoencoderOptimus",
    "CascadedBasePipeline",
    "CascadedDiffusionPipeline",
    "CascadedUNet",
    "CascadedUpscalePipeline",
    "DiscreteRenoisingScheduler",
    "GlidePipeline",
    "GlideTextEncoder",
    "GumbelVQModel",
    "LDMClassConditionalPipeline",
    "LDMClassEmbedder",
    "LDMInpaintPipeline",
    "LDMLayoutEncoder",
    "LDMLayoutPipeline",
    "LDMSemanticPipeline",
    "LDMSpatialRescaler",
    "LDMTextPipeline",
    "LDMUNet",
    "LDMUnconditionalPipeline",
    "LDMUpscalePipeline",
    "NormalizedCFGScheduler",
    "NormalizedClassifierFreeGuidance",
    "PITIEncoder",
    "PITIPipeline",
    "PaellaImageVariationPipeline",
    "PaellaImg2ImgPipeline",
    "PaellaInpaintPipeline",
    "PaellaPipeline",
    "PaellaUNet",
    "PaellaVQModel",
    "PatchDiscriminator",
    "RespacedScheduler",
    "TruncatedConditioningScheduler",
    "VersatileEditPipeline",
    "VersatilePipeline",
    "VersatileUNet",
    "classifier_free_guidance",
    "normalized_guidance",
]

register()
