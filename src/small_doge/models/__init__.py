"""The Doge model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache import DynamicMaskCache
from .configuration_doge import DogeConfig
from .loading import load_causal_lm, load_model
from .modeling_doge import DogeForCausalLM, DogeForSequenceClassification, DogeModel
from .sizes import SIZES, config_for
from .upcycle import upcycle

__all__ = [
    "SIZES",
    "DogeConfig",
    "DogeForCausalLM",
    "DogeForSequenceClassification",
    "DogeModel",
    "DynamicMaskCache",
    "config_for",
    "load_causal_lm",
    "load_model",
    "upcycle",
]

# transformers has a Doge of its own under the same model type; from here on the Auto classes give ours.
AutoConfig.register(DogeConfig.model_type, DogeConfig, exist_ok=True)
AutoModel.register(DogeConfig, DogeModel, exist_ok=True)
AutoModelForCausalLM.register(DogeConfig, DogeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DogeConfig, DogeForSequenceClassification, exist_ok=True)
