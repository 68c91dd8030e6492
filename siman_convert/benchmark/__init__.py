"""`siman bench`: how fast a binary network is beside full precision and int8 of the same architecture.

Nothing is imported here: the child processes that memory is measured in are to load no more than they need.
"""
