"""How the shipped models were made: python -m recipes.NAME.STEP from the root of the repository."""
