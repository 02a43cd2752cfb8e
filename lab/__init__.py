"""NoRA Lab: which compact adapter is best for my data, at my budget?"""

__version__ = "0.1.0"
