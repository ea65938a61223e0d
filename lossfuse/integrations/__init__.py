"""Adapters for trainers with a chunked loss of their own. Each imports its library;
lossfuse imports none of them.

For other trainers (transformers, accelerate, Lightning, torchtune, custom loops) use
``lossfuse.fuse_lm_head``."""
