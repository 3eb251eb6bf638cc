"""The tasks of MedPerf's three containers: data stay at their site, only numbers leave it."""
