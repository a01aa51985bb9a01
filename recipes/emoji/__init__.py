"""The recipe of `emoji-t2i`."""
