"""The operators of torch.library, each with its autograd."""
