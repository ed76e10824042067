"""Checkpoints: snapshot, staging, upload, the commit log, resume. Importing this package does not import torch.

Files, in the order in which a save passes them: `engine` (when), `snapshot` (what), `staging` (the local file),
`client` (tells the uploader), `uploader` and `uploads` (to the bucket), `commitlog` (the commit), `stores` (where).
`resume` is the way back. docs/architecture.md section 4 has the flow.
"""

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError, CheckpointMismatch

__all__ = ["CheckpointConfig", "CheckpointError", "CheckpointMismatch"]
