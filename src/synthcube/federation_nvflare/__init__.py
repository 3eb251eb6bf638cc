"""NVIDIA FLARE as the transport of a federation; no other package of SynthCube imports nvflare."""
