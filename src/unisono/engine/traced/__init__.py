"""A call inside ``torch.compile`` and ``torch.export``, which can't follow the usual driver."""
