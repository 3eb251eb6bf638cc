"""From a fingerprint, a machine and a goal to a config: rules, costs, and the table of both."""
