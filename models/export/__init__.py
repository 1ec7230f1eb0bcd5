"""Trained networks as exact +-1 weights, ONNX or OpenVINO.  No training imports this."""
