"""The paper's tables and figures, each a YAML file of runs, measured into a CSV and drawn."""
