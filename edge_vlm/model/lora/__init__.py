"""Low-rank adapters (LoRA, arXiv 2106.09685): layers, peft's file format, folders of them."""
