"""What may be done to the gradients of a step before the optimizer reads them: one file each, a dataclass Config and `wrap(engine, config)`, which is
called once and sets `engine.optimizer.before_step`. The config is optim.wrapper, the group configs/wrapper.

`before_step` is called where gradients are whole, averaged over ranks and clipped, never for a step that is left out. ZeRO calls it once for each of
its groups, with the gradients of that group alone.
"""

from __future__ import annotations

from models.registry import Registry

KINDS = Registry("training.wrappers", "optim.wrapper", ("wrap",))
