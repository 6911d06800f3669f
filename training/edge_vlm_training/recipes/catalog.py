"""All recipes by name."""

from __future__ import annotations

from edge_vlm_training.recipes import demo, molmo2

RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        *(demo.demo_cpu, demo.demo_larger, demo.demo_present, demo.demo_streams, demo.smoke),
        *(molmo2.stts_demo_cpu, molmo2.stts_demo_gpu, molmo2.stts_demo_lora, molmo2.stts_smoke),
        *(molmo2.molmo2_4b_stts_50, molmo2.molmo2_4b_stts_30, molmo2.molmo2_4b_stream),
        molmo2.molmo2_4b_stts_50_lora,
    )
}
