"""A whole model: observe its inputs, plan, quantize, report."""

from wush_jax.calibration.auto import choose_recipes
from wush_jax.calibration.calibration import Calibration, calibrate
from wush_jax.calibration.model import quantize_model
from wush_jax.calibration.model_free import round_folder
from wush_jax.calibration.observe import Masked, Site, collect_moments, find_sites
from wush_jax.calibration.planning import ModelPlan, plan
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.sequential import Sequential, Stack
from wush_jax.calibration.site_plan import SitePlan
from wush_jax.calibration.streaming import quantize_folder

__all__ = [
    "Calibration",
    "LayerReport",
    "Masked",
    "ModelPlan",
    "Report",
    "Sequential",
    "Site",
    "SitePlan",
    "Stack",
    "calibrate",
    "choose_recipes",
    "collect_moments",
    "find_sites",
    "plan",
    "quantize_folder",
    "quantize_model",
    "round_folder",
]
