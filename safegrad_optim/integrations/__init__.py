"""Glue to training frameworks; importing a file here imports its framework.

In comes what a framework has: its arguments, its model, its callbacks. Out comes what it takes: of
`transformers`, `safegrad_optimizer` for `Trainer(optimizer_cls_and_kwargs=...)`, and `SafeGradCallback`.
"""
