"""Other runtimes than torch for a model's networks: ONNX Runtime and OpenVINO.

The networks are converted, one by one, and the samplers stay what they are, in Python: a model
that computes with a runtime is the same model, whose networks are called elsewhere.
"""
