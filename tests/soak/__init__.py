"""`make soak`: machines made, run and closed for half an hour, and two hundred alive at once.

See tests/soak/__main__.py.
"""
