"""CLIP for few-shot tuning: loading, split attention, towers, pictures, the protocol, scores.

Only `protocol` may be imported without torch; the rest is imported where it is used.
"""
