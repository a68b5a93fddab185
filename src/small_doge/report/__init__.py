"""The report of a run: its pictures, its numbers in words, and the page that holds them."""
