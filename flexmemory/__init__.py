"""flexmemory: token-addressed memory language models, trained from scratch, folded to disk, served
offloaded.
"""
