"""Thin adapters for trainers that make no logits themselves; each imports its library, none is
imported by lossfuse.

For trainers that do (transformers, accelerate, Lightning, torchtune, loops of your own)
``lossfuse.fuse_lm_head`` is all there is."""
