"""A pack that many ranks share through a work folder: any of them may die and be run again, the bytes are the same.

from rac.ranks import Asked, finish, pack_rank
pack_rank("model/", "s3://bucket/job", Asked(bits=3), rank=7, world=64)   # on each of 64 machines
finish("s3://bucket/job", "model.rac")                                    # on any
"""

from rac.encode.asked import Asked
from rac.ranks.packing import How, Share, finish, pack_rank
from rac.ranks.store import open_store
from rac.ranks.view import View, look

__all__ = ["Asked", "How", "Share", "View", "finish", "look", "open_store", "pack_rank"]
