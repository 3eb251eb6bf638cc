"""OpenFL as the transport of a federation; no other package of SynthCube imports openfl."""
