"""What calibration, evaluation and the runtime share about transformers models."""
