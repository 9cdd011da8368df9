"""ARGenSeg in JAX: image segmentation as image generation by a multimodal LLM."""
__version__ = "0.1.0"
