"""All recovery methods, by name."""

from slimgpt.recovery.methods.base import RecoveryMethod
from slimgpt.recovery.methods.distill import Distill
from slimgpt.recovery.methods.full import Full
from slimgpt.recovery.methods.lora import LoRA

RECOVERY_METHODS: dict[str, type[RecoveryMethod]] = {"lora": LoRA, "full": Full, "distill": Distill}
