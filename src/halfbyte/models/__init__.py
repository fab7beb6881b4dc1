"""Models on disk and in memory: the only importer of transformers' models. A skeleton, its checkpoint, its blocks."""

from halfbyte.models.blockwise import Blockwise, Kept, identity
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.edges import Edge, Edges, edges, head_bytes, untie
from halfbyte.models.gguf import parts
from halfbyte.models.importance import importance
from halfbyte.models.loading import Loaded, is_encoder, load, parse_dtype, resolve, sha256, skeleton
from halfbyte.models.saving import own_container, save
from halfbyte.models.structure import blocks, role_of_parameter, roles, stacks, tied

__all__ = [
    "Blockwise", "Checkpoint", "Edge", "Edges", "Kept", "Loaded", "blocks", "edges", "head_bytes", "identity",
    "importance", "is_encoder", "load", "own_container", "parse_dtype", "parts", "resolve", "role_of_parameter",
    "roles", "save", "sha256", "skeleton", "stacks", "tied", "untie",
]  # fmt: skip
