"""The notebooks run headless and in order."""
