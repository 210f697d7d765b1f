"""The Files and Batches endpoints: uploads, batches that live in tasks of their own, and downloads.

`Storage` answers the calls; `read_form` reads an upload from its connection.
"""

from .files import read_form
from .storage import Storage

__all__ = ["Storage", "read_form"]
