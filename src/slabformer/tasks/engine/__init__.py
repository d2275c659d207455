"""What every task's training shares: the loop, checkpoints, logs, signals and the guard against NaN."""

from slabformer._extras import require

require("accelerate", extra="train")
