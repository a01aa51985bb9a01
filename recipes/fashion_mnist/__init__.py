"""The recipes of `fashion-llamagen` and `fashion-var`."""
