"""Predicted against measured, claim by claim, with standard errors, rivals and verdicts."""
