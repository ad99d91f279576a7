"""Weights that are FP8, of which the stand-in has none."""

from transformer_engine.interface import checked, exists
from transformer_engine.pytorch.not_here import not_here

replace_raw_data = checked("replace_raw_data")(not_here)
cast_master_weights_to_fp8 = checked("cast_master_weights_to_fp8")(not_here)
if exists("post_all_gather_processing"):
    post_all_gather_processing = checked("post_all_gather_processing")(not_here)
