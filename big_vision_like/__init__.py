"""big_vision_like: train, fine-tune, compare and take apart vision models."""

__version__ = "0.1.0"
